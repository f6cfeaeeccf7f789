"""A handful of cells of the chaos matrix on every run, and that the harness itself can be trusted: it says so when a
fault was not done, and it finds what is wrong when something is. The whole core: `make chaos-core`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmferry.chaos import cells, report, verdict
from vmferry.chaos.campaign import Campaign, pairs
from vmferry.chaos.cells import Cell
from vmferry.chaos.ground import Ground
from vmferry.chaos.run import EOF_S, Run
from vmferry.chaos.told import now_s
from vmferry.chaos.verdict import Verdict
from vmferry.chaos.witness import overlap_s
from vmferry.core.facts import Fact
from vmferry.testing.hosts import NEWEST, OLDEST, processes_of, wait_true
from vmferry.testing.netns import namespaces_possible

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not namespaces_possible(), reason="chaos needs network namespaces (root)"),
]
SAME = f"{NEWEST}-{NEWEST}"
MIXED = f"{OLDEST}-{NEWEST}"

SURVIVED = [
    f"kill-target-qemu/device/precopy/{SAME}",
    f"kill-source-agent/granted/precopy/{MIXED}",
    f"kill-target-agent/grant/postcopy/{SAME}",
    f"stop-source-qemu/active/precopy/{SAME}",
    f"reset-stream-1s/postcopy-active/postcopy/{SAME}",
    f"cut-link-both-ways-1s/grant/precopy/{SAME}",
    f"message-peer-grant-duplicate/grant/precopy/{SAME}",
    f"message-peer-ready-drop-answer/pre-switchover/precopy/{SAME}",
    f"lock-one-target/device/precopy/{SAME}",
    f"full-target/grant/precopy/{SAME}",
]
SURVIVED_TWO = [
    f"lock-all-target-and-reset/grant/postcopy/{SAME}",
    f"cancel-then-reset/loaded/precopy/{SAME}",
    f"reset-both-1s/last/postcopy/{SAME}",
    f"message-peer-recovering-drop-answer/postcopy-paused/postcopy/{OLDEST}-{OLDEST}",
    f"reset-stream-1s/postcopy-active/postcopy/{SAME}/linux",
]
"""Two troubles at once, in moments of which nobody has heard."""
ONLY_THERE = {"P18", "P20", "P26", "P27"}
"""Pairs into which only those lead."""


def the_cell(name: str) -> Cell:
    (found,) = [cell for cell in cells.matrix(pairs()) if cell.name == name]
    return found


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    made = Ground((NEWEST, NEWEST), "shared", tmp_path, 1)
    try:
        yield made
    finally:
        assert made.close() == []


@pytest.mark.proves("S17", "S53", "S119", "S121")
@pytest.mark.parametrize(("names", "pairs_seen"), [(SURVIVED, set()), (SURVIVED_TWO, ONLY_THERE)])
def test_no_fault_loses_or_doubles_a_guest(names: list[str], pairs_seen: set[str]) -> None:
    said: list[str] = []
    chosen = [the_cell(name) for name in names]
    work = Campaign(chosen, say=said.append)
    found = work.go(workers=1)  # other tests run beside it
    lines = "\n".join(said)
    assert (found["runs"], found["not_injected"]) == (len(chosen), 0), lines
    assert [found[key] for key in ("lost", "double", "stuck", "surprises")] == [0, 0, 0, 0], lines
    assert found["good"] + found["good_after_action"] == len(chosen), lines
    assert work.left == []
    assert all(run["lock_samples"] > 20 for run in work.runs), work.runs
    assert {pair for run in work.runs for pair in run["through"]} >= pairs_seen, lines
    assert report.docs_markdown({"machine": "", "date": "", "pairs": [], "chaos": found})


def test_the_only_copy_dies_and_it_is_said_so(ground: Ground) -> None:
    cell = the_cell(f"kill-source-qemu/active/precopy/{SAME}")
    seen = Run(ground, cell, "g1", threading.Event()).go()
    assert verdict.judge(cell, seen)[0] is Verdict.PHYSICS
    assert seen.outcome == "lost"


def test_a_guest_that_runs_twice_is_seen(tmp_path: Path) -> None:
    """Somebody starts the source by hand, on disks that are not the destination's: no lock is in the way."""
    cell = the_cell(f"kill-cli/granted/precopy/{SAME}")
    ground = Ground((NEWEST, NEWEST), "own", tmp_path, 1)
    run = Run(ground, cell, "g1", threading.Event())
    try:
        run._boot()
        run.doing.prepare()
        run.stage.reach(run.doing.begin)
        (source,) = [life for life in run.witness.of_vm("g1") if run._host_of(life) == "host-a"]
        (there,) = [life for life in run.witness.of_vm("g1") if run._host_of(life) == "host-b"]
        assert ground.a.process is not None
        run.stage._stop(ground.a.process.pid)  # or it ends the source's QEMU before anybody can see both
        run.witness.ask(source, "cont")
        wait_true(lambda: overlap_s(source, there, until_s=now_s()) > 2 * EOF_S, why="both run")
        run._inject()
        run._measure()
        assert run.seen.injected
        assert verdict.judge(cell, run.seen)[0] is Verdict.DOUBLE
        assert run.seen.overlap_ms > 0
    finally:
        run.doing.close()
        run.stage.let_go()
        ground.link.clear()
        assert ground.close() == []


@pytest.mark.parametrize(("phase", "mode"), [("loaded", "precopy"), ("loaded", "postcopy"), ("grant", "precopy")])
@pytest.mark.proves("S17", "S52")
def test_a_destination_that_has_loaded_does_not_run_before_it_is_told_to(
    phase: str, mode: str, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs P6 and P14: without the order nothing makes it run, however long the source's word is on its way, and with
    it the order was first."""
    cell = the_cell(f"kill-cli/{phase}/{mode}/{SAME}")
    run = Run(ground, cell, "g1", threading.Event())
    inject = run._inject

    def look_first() -> None:
        (there,) = [life for life in run.witness.of_vm("g1") if run._host_of(life) == "host-b"]
        state = run.witness.ask(there, "query-status")
        assert (state["status"], state["running"]) == ("paused", False)
        assert there.ran == []
        inject()

    monkeypatch.setattr(run, "_inject", look_first)
    seen = run.go()
    assert verdict.judge(cell, seen)[0] is Verdict.GOOD, seen
    assert not {"P6", "P14"} & set(seen.through)
    granted = run.stage.target.has("g1", Fact.GRANTED)
    (there,) = [life for life in run.witness.of_vm("g1") if run._host_of(life) == "host-b"]
    assert granted is not None
    assert there.ran[0][0] >= granted.at_s - 0.001  # the log has whole milliseconds


def test_a_fault_in_the_wrong_phase_does_not_count(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = the_cell(f"kill-cli/pre-switchover/precopy/{SAME}")
    run = Run(ground, cell, "g1", threading.Event())
    reach = run.stage.reach

    def too_far(begin: Any) -> None:
        reach(begin)
        run.stage.let_go()
        run.stage.wait(lambda: run.stage.status() == "completed", why="it goes on")

    monkeypatch.setattr(run.stage, "reach", too_far)
    seen = run.go()
    assert verdict.judge(cell, seen)[0] is Verdict.NOT_INJECTED
    assert "the phase was over" in seen.why_not


def test_ctrl_c_leaves_nothing_behind() -> None:
    words = [sys.executable, "-m", "vmferry.cli.main", "chaos", "--only", f"stop-*/*/precopy/{SAME}", "--json"]

    def heeded() -> None:  # a shell's background job ignores it, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    work = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeded)
    assert work.stderr is not None
    assert "[1/" in work.stderr.readline()
    (folder,) = Path("/tmp").glob(f"vfc-{work.pid}-*")
    assert processes_of(folder), "agents and QEMUs have its folder on their command lines"
    work.send_signal(signal.SIGINT)
    out, err = work.communicate(timeout=60)
    assert work.returncode == 130, err
    assert out == '{"result": "interrupted"}\n'
    assert processes_of(folder) == {}
    assert not folder.exists()
    assert [entry.name for entry in os.scandir("/run/netns") if f"-{work.pid}-" in entry.name] == []
