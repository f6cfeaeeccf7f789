"""Seeds of the simulator: what must hold holds in each, and each is the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from vmferry.testing.sim.__main__ import main
from vmferry.testing.sim.run import run, run_scenario
from vmferry.testing.sim.scenario import CALM, KINDS, Fault, Trigger, draw

MANY = 5000
SHARE = 100
"""As many as take some ten seconds; `make sim SEEDS=5000` runs more."""
CHUNK = 20
REPRODUCED = ("32", "435")
"""With restarts, cuts, refusals and a recovery in them."""


@pytest.mark.parametrize("first", range(0, SHARE, CHUNK))
@pytest.mark.proves("S13", "S35", "S36", "S42", "S53", "S55", "S58")
def test_no_seed_breaks_what_must_hold(first: int) -> None:
    for number in range(first, first + CHUNK):
        verdict = run(str(number))
        assert verdict.ok, "\n".join([*verdict.trace, *verdict.violations, f"make sim SEED={number}"])


@pytest.mark.deep
@pytest.mark.timeout(7200)
def test_no_seed_of_many_breaks_what_must_hold() -> None:
    failed = [verdict for verdict in map(run, map(str, range(SHARE, MANY))) if not verdict.ok]
    assert not failed, "\n".join(f"make sim SEED={verdict.seed}: {verdict.violations}" for verdict in failed)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_fault_is_really_done(kind: str) -> None:
    everything = {"way": "both", "share": 0.3, "latency_s": 0.2, "times": 1, "by_s": 5.0, "step": "device"}
    fault = Fault(kind, Trigger(text="step active"), for_s=1.0, more=everything)
    calm = draw("calm")
    slow = replace(calm, mode="precopy", settings=("max-bandwidth=1000000",), multifd=0, dirty=False, faults=(fault,))
    verdict = run_scenario(slow)
    assert verdict.faults == [str(fault)]
    assert verdict.ok, verdict.violations


@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.proves("S36", "S53", "S66", "S123")
def test_a_destination_that_hangs_for_want_of_a_page_is_joined_again(version: str) -> None:
    """Pair P19; it hangs again each time when the channel breaks."""
    breaks = tuple(Fault("hung-stream", Trigger(text="step pages", host="a", nth=n), host="b") for n in (1, 2))
    slow = ("max-bandwidth=1000000", "max-postcopy-bandwidth=1000000")
    scenario = replace(CALM, profiles={"a": version, "b": version}, mode="postcopy", dirty=True, settings=slow)
    verdict = run_scenario(replace(scenario, faults=breaks))
    assert verdict.faults == [str(each) for each in breaks]
    assert sum("it is recovered out of band" in line for line in verdict.trace) >= len(breaks)
    assert (verdict.outcome, verdict.violations) == ("b", [])


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.proves("S36", "S53", "S121", "S123")
def test_a_postcopy_that_breaks_while_the_agents_cannot_talk_is_joined_again(version: str, hangs: bool) -> None:
    """Twice, and each time within two seconds after the memory's way is free; the link comes back at the end only."""
    alone = tuple(Fault("alone", Trigger(text="step pages", host="a", nth=n), host="b") for n in (1, 2))
    hung = (Fault("hung-stream", Trigger(text="step pages", host="a", nth=2), host="b"),) if hangs else ()
    slow = ("max-bandwidth=1000000", "max-postcopy-bandwidth=1000000")
    scenario = replace(CALM, profiles={"a": version, "b": version}, mode="postcopy", dirty=True, settings=slow)
    verdict = run_scenario(replace(scenario, faults=(*alone, *hung)))
    assert set(verdict.faults) == {str(each) for each in (*alone, *hung)}
    healed = next(n for n, line in enumerate(verdict.trace) if "everything is healed" in line)
    before = verdict.trace[:healed]
    assert sum("the source called" in line for line in before) >= len(alone)
    assert any("fact=all-sent" in line for line in before), "the pages arrived while the agents could not talk"
    assert (verdict.outcome, verdict.violations) == ("b", [])


def traced(seed: str, hash_seed: str) -> bytes:
    command = [sys.executable, "-m", "vmferry.testing.sim", "--seed", seed, "--trace"]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True)
    return done.stdout


@pytest.mark.parametrize("seed", REPRODUCED)
def test_a_seed_gives_the_same_trace_in_every_process(seed: str) -> None:
    first, second = traced(seed, "1"), traced(seed, "2")
    assert len(first.splitlines()) > 50
    assert first == second


def test_one_seed_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"seed", "ok", "faults", "virtual_ms", "outcome", "violations"} <= told.keys()
    assert told["ok"]
    assert told["outcome"] in ("a", "b")
