"""Runs as JSON objects -> numbers, and the page docs/reliability.md. Pure; every number comes from the runs.

Rule 1: a run that was not injected counts for nothing but `not_injected`.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from vmferry.model.pairs import PAIRS

Run = dict[str, Any]
MEASURES = ("to_running_ms", "pause_ms", "heal_ms", "reattach_ms", "resumed_ms")
SHOWN = 3
_KEPT_OUT = "tests/real/test_chaos.py::test_a_destination_that_has_loaded_does_not_run_before_it_is_told_to"
PAIR_TESTS = {
    "P6": (_KEPT_OUT,),
    "P14": (_KEPT_OUT,),
    "P15": ("tests/real/test_rescue_real.py::test_p15_a_source_in_postcopy_active_is_paused_first_and_then_runs",),
    "P19": ("tests/real/test_recovery_agents.py::test_a_destination_that_hangs_for_want_of_a_page_is_joined_again",),
    "P20": ("tests/real/test_rescue_agents.py::test_a_guest_that_left_in_postcopy_and_never_arrived_is_brought_back",),
    "P22": (
        "tests/real/test_rescue_agents.py::test_a_guest_whose_source_died_in_postcopy_is_fed_from_what_it_left_behind",
    ),
    "P24": (
        "tests/real/test_rescue_real.py"
        "::test_x15_a_source_stuck_in_finish_migrate_is_led_out_and_runs_when_its_disk_is_free",
    ),
    "P26": (
        "tests/real/test_rescue_feed_real.py::test_p26_a_source_that_failed_and_sticks_still_feeds_the_guest_that_ran",
    ),
}
"""Pairs that a test of their own leads real QEMUs into, also such as the guards keep everybody out of."""
BAD = ("lost", "double", "stuck", "surprise")


def spread(values: Iterable[float | None]) -> dict[str, float | int] | None:
    """Median, p99 and how many; None without any."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return None
    at = max(0, math.ceil(0.99 * len(found)) - 1)
    return {"median": round(statistics.median(found), 1), "p99": round(found[at], 1), "n": len(found)}


def summary(runs: Sequence[Run], *, seconds: float) -> dict[str, Any]:
    """What `vmferry chaos --json` prints."""
    injected = [run for run in runs if run["injected"]]
    counts = Counter(run["verdict"] for run in injected)
    return {
        "runs": len(runs),
        "injected": len(injected),
        "not_injected": len(runs) - len(injected),
        "good": counts["good"],
        "good_after_action": counts["good-after-action"],
        "lost": counts["lost"],
        "lost_by_physics": counts["lost-by-physics"],
        "double": counts["double"],
        "stuck": counts["stuck"],
        "surprises": counts["surprise"],
        "by_fault": by_fault(injected),
        "goals": goals(injected),
        "seconds": round(seconds, 1),
        "listed": [_listed(run) for run in runs if run["verdict"] != "good"],
    }


def _listed(run: Run) -> Run:
    keys = ("cell", "verdict", "why", "proof", "outcome", "row", "action", "taken", "rows")
    return {key: run[key] for key in keys if run.get(key)}


def by_fault(injected: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Fault -> mode -> counts and times."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in injected:
        groups.setdefault(run["fault"], {}).setdefault(run["mode"], []).append(run)
    return {
        fault: {mode: _group(runs) for mode, runs in sorted(modes.items())} for fault, modes in sorted(groups.items())
    }


def _group(runs: Sequence[Run]) -> dict[str, Any]:
    counts = Counter(run["verdict"] for run in runs)
    return {
        "runs": len(runs),
        "survived": counts["good"] + counts["good-after-action"],
        **{verdict: counts[verdict] for verdict in (*BAD, "lost-by-physics") if counts[verdict]},
        **{name: found for name in MEASURES if (found := spread(run.get(name) for run in runs)) is not None},
    }


def goals(injected: Sequence[Run]) -> dict[str, Any]:
    """The three goals of the issue: what was measured for each."""
    cuts = [r for r in injected if r["fault"] == "reset-stream-1s" and r["phase"] == "postcopy-active"]
    locks = [r for r in injected if r["fault"].startswith("lock-") and r["fault"].endswith("-target")]
    agents = [r for r in injected if r["fault"] in ("kill-source-agent", "kill-target-agent")]
    return {
        "source_again_after_refused_start_ms": spread(r.get("resumed_ms") for r in locks),
        "postcopy_healed_after_cut_ms": spread(r.get("heal_ms") for r in cuts),
        "agent_attached_again_ms": spread(r.get("reattach_ms") for r in agents),
    }


GOALS = {
    "source_again_after_refused_start_ms": ("the source runs again after a refused start of the target", 1000),
    "postcopy_healed_after_cut_ms": ("postcopy goes on after the link is back (stream cut for 1 s)", 2000),
    "agent_attached_again_ms": ("an agent that was killed is started and knows its guests again", 1000),
}


def docs_markdown(result: dict[str, Any]) -> str:
    """The page, from a saved result (`vmferry chaos --save FILE`)."""
    chaos, raw = result["chaos"], result.get("raw")
    lines = [
        "# Reliability: measured",
        "",
        "Generated by `make docs` from `docs/reliability.json`, which `vmferry chaos --save docs/reliability.json`"
        " writes. Do not edit by hand.",
        "",
        "Each run does one fault to one migration of one guest between two real agents with real QEMUs (TCG), in one"
        " phase; judges outside of the product say what became of the guest. A run counts only if the fault was proved"
        " to have been done in the phase. `vmferry chaos --only CELL` repeats a run.",
        "",
        f"Made on {result['machine']}, {result['date']}; QEMU pairs: {', '.join(result['pairs'])};"
        f" {chaos['seconds']:g} s.",
        "",
        "| runs | injected | survived | after a named action | double | lost | stuck | surprises | lost by physics |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| {chaos['runs']} | {chaos['injected']} | {chaos['good']} | {chaos['good_after_action']} | {chaos['double']}"
        f" | {chaos['lost']} | {chaos['stuck']} | {chaos['surprises']} | {chaos['lost_by_physics']} |",
        "",
        "## Goals",
        "",
        "| goal | at most, ms | median, ms | p99, ms | runs |",
        "|---|---|---|---|---|",
        *_goal_lines(chaos["goals"]),
        "",
        "## By fault",
        "",
        "Time from the fault to a running guest: 0 where it ran in that moment. The pause is the longest time"
        " afterwards in which no CPU of it ran, the switchover's own pause among it.",
        "",
        "| fault | mode | runs | survived | to running, ms (median / p99) | longest pause, ms (median / p99) |",
        "|---|---|---|---|---|---|",
        *_fault_lines(chaos["by_fault"]),
        "",
        *_pair_lines(result.get("runs", [])),
        *_raw_lines(raw, result.get("runs", [])),
        "## Everything that is not plainly good",
        "",
        *_listed_lines(chaos["listed"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _goal_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, (words, most) in GOALS.items():
        got = found.get(name)
        told = f"{got['median']:g} | {got['p99']:g} | {got['n']}" if got else "not measured | | 0"
        lines.append(f"| {words} | {most} | {told} |")
    return lines


def _fault_lines(faults: dict[str, Any]) -> list[str]:
    lines = []
    for fault, modes in faults.items():
        for mode, got in modes.items():
            times = [got.get("to_running_ms"), got.get("pause_ms")]
            told = " | ".join(f"{t['median']:g} / {t['p99']:g}" if t else "" for t in times)
            lines.append(f"| {fault} | {mode} | {got['runs']} | {got['survived']} | {told} |")
    return lines


def _pair_lines(runs: Sequence[Run]) -> list[str]:
    """Which of the pairs P1 to P30 real QEMUs were in, and how those runs ended."""
    lines = [
        "## Pairs of states",
        "",
        "Which pairs ([faults.md](faults.md)) the two sides went through, by what the source's table was asked about,"
        " in runs whose fault was injected; a run goes through several. Of the runs the three are named that went"
        " through the fewest pairs besides.",
        "",
        "| pair | source / destination | runs | ended | shown by |",
        "|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        found = [run for run in runs if run["injected"] and pair.name in run.get("through", ())]
        ends = Counter(run["verdict"] for run in found)
        told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(ends.items()))
        if not found:
            told = f"not reached: {pair.unreachable}" if pair.unreachable else "not run"
        shown = "<br>".join(f"`{words}`" for words in [*_purest(found), *PAIR_TESTS.get(pair.name, ())])
        lines.append(f"| {pair.name} | {pair.text} | {len(found)} | {told} | {shown} |")
    return [*lines, ""]


def _purest(found: Sequence[Run]) -> list[str]:
    """The cells of the runs that have the least to do with other pairs."""
    return [run["cell"] for run in sorted(found, key=lambda run: (len(run["through"]), run["cell"]))[:SHOWN]]


def _raw_lines(raw: dict[str, Any] | None, runs: Sequence[Run]) -> list[str]:
    if raw is None:
        return []
    lines = [
        "## The same faults against a bare QMP script",
        "",
        "The script does what a careful person would write: the same settings, the destination paused until the source"
        " is done, on an error the destination is ended and the source continued. It has no journal, nobody who goes on"
        " when it dies, and no rescue.",
        "",
        "| fault | phase | mode | bare script | vmferry |",
        "|---|---|---|---|---|",
    ]
    for row in raw["rows"]:
        lines.append(f"| {row['fault']} | {row['phase']} | {row['mode']} | {row['raw']} | {_ours(row, runs)} |")
    return [*lines, ""]


SAME_FAULT = {
    "kill source-qemu": "kill-source-qemu", "kill target-qemu": "kill-target-qemu", "kill script": "kill-source-agent",
    "cut stream": "reset-stream-", "lock disk": "lock-all-target",
}  # fmt: skip
"""Fault of the comparison -> how vmferry's cells with the same one begin. The script's part is the source agent's."""
SAME_PHASE = {
    "active": ("active",),
    "switchover": ("device", "postcopy-device", "grant"),
    "postcopy-active": ("postcopy-active",),
}


def _ours(row: dict[str, Any], runs: Sequence[Run]) -> str:
    """What vmferry's runs with the same fault in the same phase came to."""
    found = Counter(
        run["verdict"]
        for run in runs
        if run["injected"] and run["mode"] == row["mode"] and run["phase"] in SAME_PHASE[row["phase"]]
        and run["fault"].startswith(SAME_FAULT[row["fault"]])
    )  # fmt: skip
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(found.items())) or "not run"


def _listed_lines(listed: Sequence[Run]) -> list[str]:
    if not listed:
        return ["Nothing."]
    groups: dict[tuple[str, str], list[str]] = {}
    for run in listed:
        groups.setdefault((run["verdict"], str(run.get("why", ""))), []).append(run["cell"])
    lines = ["| verdict | cells | why |", "|---|---|---|"]
    for (verdict, why), cells in sorted(groups.items()):
        lines.append(f"| {verdict} | {'<br>'.join(f'`{cell}`' for cell in cells)} | {why.replace('|', '/')} |")
    return lines
