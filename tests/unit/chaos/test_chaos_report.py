"""Numbers and the page from runs."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.chaos import report
from vmferry.testing.host_tools import project_root


def run(verdict: str = "good", **more: Any) -> dict[str, Any]:
    return {
        "cell": "kill-cli/active/precopy/7.2-7.2", "fault": "kill-cli", "phase": "active", "mode": "precopy",
        "verdict": verdict, "injected": verdict != "not-injected", "why": "", **more,
    }  # fmt: skip


def test_spread() -> None:
    assert report.spread([]) is None
    assert report.spread([None, 4.0]) == {"median": 4.0, "p99": 4.0, "n": 1}
    assert report.spread(float(n) for n in range(1, 101)) == {"median": 50.5, "p99": 99.0, "n": 100}


def test_summary_counts_each_verdict_once() -> None:
    verdicts = ["good", "good-after-action", "lost", "double", "stuck", "surprise", "lost-by-physics", "not-injected"]
    found = report.summary([run(v, to_running_ms=5.0) for v in verdicts], seconds=3.21)
    assert (found["runs"], found["injected"], found["not_injected"]) == (8, 7, 1)
    counted = ("good", "good_after_action", "lost", "double", "stuck", "surprises", "lost_by_physics")
    assert [found[key] for key in counted] == [1] * 7
    assert len(found["listed"]) == 7
    group = found["by_fault"]["kill-cli"]["precopy"]
    assert (group["runs"], group["survived"], group["to_running_ms"]["n"]) == (7, 2, 7)


def test_goals_take_only_their_own_runs() -> None:
    runs = [
        run(fault="lock-all-target", resumed_ms=100.0),
        run(fault="lock-all-both", resumed_ms=9000.0),
        run(fault="reset-stream-1s", phase="postcopy-active", heal_ms=300.0),
        run(fault="reset-stream-1s", phase="active", heal_ms=9000.0),
        run(fault="kill-source-agent", reattach_ms=700.0),
    ]
    found = report.goals(runs)
    assert [found[name]["median"] for name in report.GOALS] == [100.0, 300.0, 700.0]


def test_the_page_has_every_number_and_every_bad_run() -> None:
    chaos = report.summary([run(), run("stuck", why="row | B-stuck")], seconds=9.0)
    page = report.docs_markdown(
        {"machine": "2 CPUs", "date": "2026-01-02", "pairs": ["7.2 -> 7.2"], "chaos": chaos,
         "raw": {"rows": [{"fault": "kill script", "phase": "active", "mode": "precopy", "raw": "7.2: stuck"}]},
         "runs": [run(fault="kill-source-agent"), run(fault="kill-source-agent", phase="setup")]}
    )  # fmt: skip
    assert "| 2 | 2 | 1 | 0 | 0 | 0 | 1 | 0 | 0 |" in page
    assert "not measured" in page
    assert "| stuck | `kill-cli/active/precopy/7.2-7.2` | row / B-stuck |" in page
    assert "| kill script | active | precopy | 7.2: stuck | 1 good |" in page


def test_a_page_without_bad_runs_says_so() -> None:
    chaos = report.summary([run()], seconds=1.0)
    page = report.docs_markdown({"machine": "", "date": "", "pairs": [], "chaos": chaos})
    assert page.endswith("Nothing.\n")


def test_the_page_says_which_pairs_were_gone_through() -> None:
    runs = [run(through=["P1", "P2"]), run("lost-by-physics", through=["P2"]), run("not-injected", through=["P2"])]
    page = report.docs_markdown(
        {"machine": "", "date": "", "pairs": [], "chaos": report.summary(runs, seconds=1.0), "runs": runs}
    )
    cell = "`kill-cli/active/precopy/7.2-7.2`"
    assert f"| P1 | none, setup / none, setup | 1 | 1 good | {cell} |" in page
    assert f"| P2 | active / active | 2 | 1 good, 1 lost-by-physics | {cell}<br>{cell} |" in page
    assert "| P3 | pre-switchover / active | 0 | not run |  |" in page
    assert "| P6 | device / completed, runs | 0 | not reached: the destination starts with -S" in page
    (p20,) = [line for line in page.splitlines() if line.startswith("| P20 |")]
    assert "tests/real/test_rescue_agents.py::" in p20


@pytest.mark.parametrize("name", [name for names in report.PAIR_TESTS.values() for name in names])
def test_a_test_that_the_page_names_is_there(name: str) -> None:
    path, _, function = name.partition("::")
    text = (project_root() / path).read_text()
    assert f"def {function}(" in text
