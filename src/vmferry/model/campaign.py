"""All settings and all mutants, spread over processes: what `vmferry model` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

from vmferry.model.explore import Explorer, Result, Violation
from vmferry.model.mutants import MUTANTS, Mutant
from vmferry.model.rules import Rules
from vmferry.model.world import Setting

SETTINGS: Final = (
    Setting("postcopy", locks=False, faults=1, cancels=1),
    Setting("postcopy", locks=True, faults=1, cancels=1),
    Setting("precopy", locks=False, faults=1, cancels=1),
    Setting("precopy", locks=True, faults=1, cancels=1),
    Setting("precopy", locks=True, owner_paused=True, faults=1, cancels=1),
    Setting("precopy", locks=False, disks=True, faults=1, cancels=1),
    Setting("precopy", locks=False, faults=1, cancels=0, holds=True),
    Setting("postcopy", locks=False, faults=1, cancels=0, pauses=1, kinds=frozenset({"crash", "stream"})),
)
"""What is explored completely, the largest first."""


@dataclass(frozen=True)
class Caught:
    """What became of a mutant: the first violation that shows it, or None."""

    mutant: str
    violation: Violation | None
    states: int
    seconds: float


@dataclass
class Report:
    """A whole run."""

    results: list[Result] = field(default_factory=list)
    caught: list[Caught] = field(default_factory=list)
    seconds: float = 0.0

    def to_wire(self) -> dict[str, Any]:
        """For --json."""
        missed = [c.mutant for c in self.caught if c.violation is None]
        return {
            "states": sum(r.states for r in self.results),
            "transitions": sum(r.transitions for r in self.results),
            "depth": max((r.depth for r in self.results), default=0),
            "violations": sum(len(r.violations) for r in self.results),
            "mutants": len(self.caught),
            "mutants_caught": len(self.caught) - len(missed),
            "mutants_missed": missed,
            "seconds": round(self.seconds, 1),
            "settings": [result_wire(r) for r in self.results],
            "schedules": [violation_wire(v) for r in self.results for v in r.violations],
            "mutant_schedules": {c.mutant: violation_wire(c.violation) for c in self.caught if c.violation},
        }  # fmt: skip


def result_wire(result: Result) -> dict[str, Any]:
    """One exploration in numbers; `cpu_seconds` is what it would take on an idle machine."""
    return {
        "setting": result.setting,
        "states": result.states,
        "transitions": result.transitions,
        "depth": result.depth,
        "settled": result.settled,
        "out_of_rounds": result.out_of_rounds,
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(result.cpu_seconds, 1),
    }


def violation_wire(violation: Violation) -> dict[str, Any]:
    """What broke, in which setting, and the shortest schedule: what `explore.replay` takes."""
    return {"what": violation.what, "setting": violation.setting, "schedule": list(violation.schedule)}


def run_setting(rules: Rules, setting: Setting) -> Result:
    """One complete exploration."""
    return Explorer(rules, setting).run()


@cache
def _known(rules: Rules, setting: Setting) -> frozenset[str]:
    """What breaks without any mutant: it shows nothing about one."""
    return frozenset(v.what for v in run_setting(rules, setting).violations)


def run_mutant(rules: Rules, mutant: Mutant) -> Caught:
    """Explores with the mutant until something breaks that does not break without it."""
    began_s, states = time.perf_counter(), 0
    for setting in mutant.settings:
        result = Explorer(mutant.of(rules), setting, first_only=True, known=_known(rules, setting)).run()
        states += result.states
        if result.violations:
            return Caught(mutant.name, result.violations[0], states, time.perf_counter() - began_s)
    return Caught(mutant.name, None, states, time.perf_counter() - began_s)


def run(
    rules: Rules,
    *,
    settings: Sequence[Setting] = SETTINGS,
    mutants: Iterable[Mutant] = MUTANTS,
    processes: int = 2,
    faults: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Everything, side by side. `tell` hears a line when a part is over."""
    began_s, report = time.perf_counter(), Report()
    chosen = [s if faults is None else replace(s, faults=faults) for s in settings]
    with ProcessPoolExecutor(max_workers=max(1, processes)) as pool:
        explored = [pool.submit(run_setting, rules, setting) for setting in chosen]
        tried = [pool.submit(run_mutant, rules, mutant) for mutant in mutants]
        for exploration in as_completed(explored):
            result = exploration.result()
            tell(
                f"{result.setting}: {result.states} states, {len(result.violations)} violations, {result.seconds:.0f} s"
            )
        for trial in as_completed(tried):
            caught = trial.result()
            what = caught.violation.what if caught.violation else "NOT CAUGHT"
            tell(f"mutant {caught.mutant}: {what} ({caught.seconds:.1f} s)")
    report.results = [exploration.result() for exploration in explored]
    report.caught = [trial.result() for trial in tried]
    report.seconds = time.perf_counter() - began_s
    return report
