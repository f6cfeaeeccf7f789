"""The oracle sees what must never be, and the simulator shows it when a product does it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmferry.agent import source as source_attempt
from vmferry.agent import source_act
from vmferry.agent.source import SourceAttempt
from vmferry.core.effects import Effect
from vmferry.core.facts import FactLog
from vmferry.testing import contract_pairs
from vmferry.testing.sim.run import run_scenario
from vmferry.testing.sim.scenario import CALM, Fault, Trigger
from vmferry.testing.sim.site import Site


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="vf") as directory:
        made = Site.make(Path(directory), "oracle", {"a": "11.1", "b": "11.1"}, 0.001)
        yield made
        made.kernel.end()
        made.loop.close()


def pair(site: Site) -> tuple[Site, list[int]]:
    """A source that ran the guest and a destination that has loaded it; their process ids."""

    async def start() -> list[int]:
        pids = []
        for host, incoming in (("a", False), ("b", True)):
            argv = contract_pairs.argv(Path("qemu"), site.directory / host, incoming=incoming)
            pids.append(site._start_qemu(host, argv).process.pid)
        return pids

    return site, site.loop.run_until_complete(start())


def hears(site: Site, pid: int, **message: object) -> None:
    copy = site.oracle.copies[pid]
    if "running" in message:
        copy.qemu.state.run_state = "running" if message["running"] else "paused"
    site.oracle.told(copy.qemu, dict(message))


def test_a_guest_that_runs_twice_is_seen_at_that_instant(site: Site) -> None:
    site, (source, destination) = pair(site)
    hears(site, source, running=True)
    hears(site, destination, step="in-loaded", word="active")
    assert site.trace.violations == []
    hears(site, destination, running=True)
    assert "runs twice" in site.trace.violations[0]


def test_a_frozen_guest_runs_twice_when_it_thaws(site: Site) -> None:
    site, (source, destination) = pair(site)
    hears(site, source, running=True)
    site.oracle.copies[source].qemu.process.freeze()
    hears(site, destination, step="in-loaded", word="active")
    hears(site, destination, running=True)
    assert site.trace.violations == []
    site.oracle.copies[source].qemu.process.thaw()
    site.oracle.thawed()
    assert "runs twice" in site.trace.violations[0]


def test_an_old_copy_that_is_started_is_seen(site: Site) -> None:
    site, (source, destination) = pair(site)
    hears(site, source, running=True)
    hears(site, source, running=False)
    hears(site, destination, step="in-loaded", word="active")
    hears(site, destination, running=True)
    hears(site, destination, running=False)
    assert site.trace.violations == []
    hears(site, source, running=True)
    assert "an old copy was started on a" in site.trace.violations[0]


@pytest.mark.parametrize(("word", "may_go"), [("active", True), ("postcopy-active", False)])
def test_the_last_complete_copy_may_be_ended_by_a_fault_and_by_no_agent(site: Site, word: str, may_go: bool) -> None:
    """A destination in postcopy needs its source; one that has every page does not."""
    site, (source, destination) = pair(site)
    hears(site, source, running=True)
    hears(site, source, running=False)
    hears(site, destination, step="in-loaded", word=word)
    hears(site, destination, running=True)
    assert site.oracle.is_recoverable()
    site.oracle.ends(site.oracle.copies[source].qemu.process)
    assert (site.trace.violations == []) is may_go
    site.oracle.copies[destination].qemu.process.die()
    assert not site.oracle.is_recoverable()


def test_a_status_that_takes_no_edge_is_seen(site: Site) -> None:
    agent = site.kernel.start("a", "agent")
    for status in ("setup", "active", "setup"):
        site.oracle.published(agent, "MIGRATION", {"job": "job1", "status": status})
    assert site.trace.violations == ["source status went from active to setup"]


# --- products that are broken on purpose ---


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    verdict = run_scenario(CALM)
    assert (verdict.ok, verdict.outcome, verdict.faults) == (True, "b", [])


def test_a_cancel_that_is_accepted_too_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_refuses(log: FactLog, *, was_refused: bool = False) -> None:
        return None

    late = Fault("cancel", Trigger(text="fact=grant-sent"), more={"times": 1})
    assert run_scenario(replace(CALM, faults=(late,))).ok
    monkeypatch.setattr(source_attempt, "cancel_refusal", nobody_refuses)
    verdict = run_scenario(replace(CALM, faults=(late,)))
    assert not verdict.ok


def test_a_source_that_takes_its_guest_back_without_proof_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. the grant is sent and its answer is lost  2. the source starts its guest again."""
    deaf = (
        Fault("cut-agents", Trigger(text="journal committed", host="b"), more={"way": "both"}),
        Fault("slow", Trigger(text="fact=planned"), more={"latency_s": 0.001}),
    )
    assert run_scenario(replace(CALM, faults=deaf)).ok
    act = source_act.act

    async def impatient(attempt: SourceAttempt, effect: Effect) -> None:
        if effect is Effect.ASK_TARGET:
            await attempt.machine.execute("cont")
        await act(attempt, effect)

    monkeypatch.setattr(source_act, "act", impatient)
    verdict = run_scenario(replace(CALM, faults=deaf))
    assert any("runs twice" in violation or "old copy" in violation for violation in verdict.violations)


def test_an_agent_that_ends_the_only_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. the destination runs the guest in postcopy  2. the source is retired although pages are missing there."""
    late = replace(
        CALM, mode="postcopy", dirty=True, settings=("max-bandwidth=2000000", "max-postcopy-bandwidth=1000000")
    )
    assert run_scenario(late).ok
    hear = SourceAttempt.hear_target

    def hasty(self: SourceAttempt, facts: dict[str, object]) -> None:
        hear(self, facts)
        if facts.get("ran"):
            retiring = asyncio.create_task(source_act.act(self, Effect.RETIRE_SOURCE), name="hasty")
            self.context.keep_task(retiring)

    monkeypatch.setattr(SourceAttempt, "hear_target", hasty)
    verdict = run_scenario(late)
    assert any("last complete copy" in violation for violation in verdict.violations)
