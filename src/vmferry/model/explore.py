"""Breadth first through every interleaving: the first schedule that breaks something is the shortest.

Theory of operation
-------------------
`Explorer.run` keeps each state once, with the state and the step that it was first reached by. Safety is asked on
every state and every step. Liveness is asked afterwards on the graph of the steps that need no fault and no new wish
of a person: from each state one of the settled ones must be reachable. Under fair scheduling that is as much as saying
that every run ends there, as a run cannot stay for ever where a way out is open again and again.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from vmferry.core.effects import DestinationEffect, Effect
from vmferry.core.table import Outcome
from vmferry.model import destination, invariants, outside, qemu, restart, source
from vmferry.model.logs import TooManyRounds
from vmferry.model.restart import begins
from vmferry.model.rules import Kit, Rules, place_at_work, source_at_work
from vmferry.model.world import Setting, World

Step = tuple[str, World]


class StateLimit(Exception):
    """More states than were allowed for: the exploration is not complete."""


@dataclass(frozen=True)
class Violation:
    """What broke, and the shortest way there."""

    what: str
    setting: str
    schedule: tuple[str, ...]


@dataclass
class Result:
    """One exploration."""

    setting: str
    states: int = 0
    transitions: int = 0
    depth: int = 0
    settled: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    out_of_rounds: int = 0
    """Steps that were left out as they repeat a fact more often than the model has room for."""
    violations: list[Violation] = field(default_factory=list)


def steps(kit: Kit, w: World) -> Iterator[Step]:
    """Every step that the world may take, without those that change nothing."""
    for part in PARTS:
        for name, after in part(kit, w):
            if after.d_log != w.d_log and w.d_log > 0 and after.d_log >= 0:
                after = outside.pushed(kit, after)
            if after != w or kit.problems:
                yield name, after
                yield from _overtaken(kit, name, w, after)


def _overtaken(kit: Kit, name: str, w: World, after: World) -> Iterator[Step]:
    """The same step, which comes between a decision and its guard.

    Only a step that makes the side decide something else can be told from one before the decision or after the deed;
    if the guard then says no, nothing is done, as if the decision had not been."""
    if not w.s_doing and not after.s_doing and _source_asks(w) != _source_asks(after):
        if not source_at_work(w) or not source_at_work(after):
            return
        left = {effect for effect, _ in source.decisions(kit, after)}
        for effect, decided in source.decisions(kit, w):
            if effect not in left and effect != "ASK_TARGET" and kit.source_may(Effect[effect], after):
                late = after._replace(s_doing=effect, s_stage="due", s_tried=decided.s_tried)
                yield f"{name}, which overtakes {Effect[effect].value}", late
    if not w.d_doing and not after.d_doing and _destination_asks(w) != _destination_asks(after):
        if not place_at_work(w) or not place_at_work(after):
            return
        left = {effect for effect, _ in destination.decisions(kit, after)}
        for effect, _ in destination.decisions(kit, w):
            if effect not in left and kit.destination_may(DestinationEffect[effect], after):
                late = after._replace(d_doing=effect, d_stage="due")
                yield f"{name}, which overtakes {DestinationEffect[effect].value}", late


def _source_asks(w: World) -> tuple[object, ...]:
    """What its decision depends on."""
    return w.s_log, w.s_source, w.s_cpus, w.s_answers


def _destination_asks(w: World) -> tuple[object, ...]:
    return w.d_log, w.d_machine, w.d_sees_running


PARTS = (
    source.steps, destination.steps, qemu.steps, outside.network, restart.steps, outside.people, outside.faults,
    outside.stale_grant,
)  # fmt: skip


def is_wanted_only(name: str) -> bool:
    """A fault, or a wish that nobody need have: liveness must not depend on it."""
    return name.startswith(("fault:", "person: cancels", "person: gives leave", "person: pauses", "person: resumes"))


@dataclass
class Explorer:
    """One setting, explored completely, or until the first violation."""

    rules: Rules
    setting: Setting
    states_max: int = 3_000_000
    first_only: bool = False
    known: frozenset[str] = frozenset()
    """What breaks anyway, and is not reported."""

    def run(self) -> Result:
        """Explores. Raises StateLimit."""
        began_s, cpu_s = time.perf_counter(), time.process_time()
        gc.disable()  # millions of tuples without a cycle: looking for some takes longer than all the rest
        try:
            self._run()
        finally:
            gc.enable()
        self.result.seconds = time.perf_counter() - began_s
        self.result.cpu_seconds = time.process_time() - cpu_s
        self.result.states = len(self.worlds)
        return self.result

    def _run(self) -> None:
        self.kit = Kit(self.rules, self.setting)
        self.result = Result(self.setting.name)
        first = self.setting.first()
        first = self.kit.note_source(first, *begins(self.setting))
        self.number: dict[World, int] = {first: 0}
        self.worlds: list[World] = [first]
        self.before, self.depth = array("l", [-1]), array("l", [0])
        self.edges_from, self.edges_to = array("l"), array("l")
        self.seen: set[str] = set(self.known)
        self._explore()
        if not (self.first_only and self.result.violations):
            self._liveness()

    def _explore(self) -> None:
        index = 0
        while index < len(self.worlds):
            w = self.worlds[index]
            for what in invariants.on_state(self.kit, w):
                self._found(what, index)
            try:
                self._expand(index, w)
            except TooManyRounds:
                self.result.out_of_rounds += 1
            if self.first_only and self.result.violations:
                return
            index += 1

    def _expand(self, index: int, w: World) -> None:
        kit, number, result = self.kit, self.number, self.result
        for name, after in steps(kit, w):
            result.transitions += 1
            problems = [*kit.problems, *invariants.on_step(kit, name, w, after)]
            kit.problems.clear()
            for what in problems:
                self._found(what, index, name)
            to = number.get(after)
            if to is None:
                to = number[after] = len(self.worlds)
                if to >= self.states_max:
                    raise StateLimit(f"{self.setting.name}: more than {self.states_max} states")
                self.worlds.append(after)
                self.before.append(index)
                self.depth.append(self.depth[index] + 1)
                result.depth = self.depth[to]
            if not is_wanted_only(name):
                self.edges_from.append(index)
                self.edges_to.append(to)

    def _found(self, what: str, index: int, *last: str) -> None:
        if what in self.seen:
            return
        self.seen.add(what)
        self.result.violations.append(Violation(what, self.setting.name, (*self.schedule(index), *last)))

    def schedule(self, index: int) -> tuple[str, ...]:
        """The names of the steps that lead to a state."""
        names: list[str] = []
        while index:
            parent = self.before[index]
            world = self.worlds[index]
            names.append(next(name for name, after in steps(self.kit, self.worlds[parent]) if after == world))
            self.kit.problems.clear()
            index = parent
        return tuple(reversed(names))

    def _liveness(self) -> None:
        """Every state from which no settled one is reachable, the nearest of each kind with its schedule."""
        count = len(self.worlds)
        heads, links = array("l", [-1]) * count, array("l", [-1]) * len(self.edges_to)
        for edge, to in enumerate(self.edges_to):
            links[edge], heads[to] = heads[to], edge
        good = bytearray(count)
        queue = deque(n for n, w in enumerate(self.worlds) if invariants.is_settled(self.kit, w))
        for n in queue:
            good[n] = 1
        self.result.settled = len(queue)
        if not any(w.s_result == Outcome.DESTINATION.value for w in self.worlds):
            self._found("L2: the guest never arrives, whatever goes well", 0)
        while queue:
            edge = heads[queue.popleft()]
            while edge >= 0:
                start = self.edges_from[edge]
                if not good[start]:
                    good[start] = 1
                    queue.append(start)
                edge = links[edge]
        for n in range(count):
            if not good[n]:
                self._found(self._stuck(n), n)

    def _stuck(self, n: int) -> str:
        w = self.worlds[n]
        rows = []
        if w.s_log > 0:
            rows.append(f"source {self.kit.source(w).row.label}")
        if w.d_log > 0:
            rows.append(f"destination {self.kit.destination(w).row.label}")
        if w.s_result:
            rows.append(f"ended as {w.s_result}")
        return f"liveness: no way on from here ({', '.join(rows) or 'no attempt'})"


class NotReplayable(Exception):
    """A schedule names a step that is not possible where it should be."""


def replay(rules: Rules, setting: Setting, schedule: tuple[str, ...] | list[str]) -> tuple[World, list[str]]:
    """Follows a schedule. The last state, and what broke on the way. Raises NotReplayable with what was possible.

    Where two steps of one state have the same name the search goes on with each of them."""
    kit = Kit(rules, setting)
    reached = [(kit.note_source(setting.first(), *begins(setting)), tuple[str, ...]())]
    for number, wanted in enumerate(schedule):
        possible, following = set(), []
        for w, broken in reached:
            for name, after in steps(kit, w):
                problems = (*kit.problems, *invariants.on_step(kit, name, w, after))
                kit.problems.clear()
                possible.add(name)
                if name == wanted:
                    following.append((after, (*broken, *problems, *invariants.on_state(kit, after))))
        if not following:
            raise NotReplayable(f"step {number + 1}, {wanted!r}: possible were {sorted(possible)}")
        reached = following
    w, broken = max(reached, key=lambda end: len(end[1]))
    return w, list(dict.fromkeys(broken))
