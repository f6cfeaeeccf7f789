"""The matrix: fault x phase x mode x pair of QEMUs. Pure: which cells there are, and what they are called.

Theory of operation
-------------------
A `Cell` is one run: one fault, done to one migration of one guest in one phase. Its name says all of it and finds it
again (`vmferry chaos --only NAME`). `matrix` lists every cell that means something; `core` is the part of it that
runs for each change: every fault in every phase and mode, the QEMU pairs taken in turn.

Rule 1: a phase is a public status of the source, or a moment within one that a message marks (`grant`, `granted`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

MODES: Final = ("precopy", "postcopy")

PHASES: Final[dict[str, str]] = {
    "setup": "setup",
    "active": "active",
    "pre-switchover": "pre-switchover",
    "device": "device",
    "postcopy-device": "postcopy-device",
    "grant": "",
    "granted": "",
    "postcopy-active": "postcopy-active",
    "postcopy-paused": "postcopy-paused",
    "completed": "completed",
    "cancelling": "cancelling",
    "failing": "failing",
}
"""Phase -> the public status that the source's facts must give when the fault is done; "" for moments within the
commit: the order to start is on its way, or carried out and the answer is on its way."""

PHASES_OF: Final[dict[str, tuple[str, ...]]] = {
    "precopy": ("setup", "active", "pre-switchover", "device", "grant", "granted", "completed", "cancelling",
                "failing"),
    "postcopy": ("setup", "active", "pre-switchover", "postcopy-device", "grant", "granted", "postcopy-active",
                 "postcopy-paused", "completed", "cancelling"),
}  # fmt: skip

ACTORS: Final = ("source-qemu", "target-qemu", "source-agent", "target-agent", "cli")
MESSAGES: Final = ("peer-prepare", "peer-ready", "peer-grant", "peer-target", "peer-release", "peer-reconnect")
MESSAGE_FAULTS: Final = ("drop-request", "drop-answer", "delay-request", "delay-answer", "duplicate")
STRANGE: Final = ("http", "empty", "error", "types")
"""What a peer that is not ours answers: another protocol, nothing, an error, other types than ours."""
WIRES: Final = ("stream", "link", "both")
WAYS: Final = ("both-ways", "to-target", "to-source")
LENGTHS: Final = ("1s", "for-good")

MESSAGE_PHASE: Final = {
    "peer-prepare": "setup",
    "peer-ready": "pre-switchover",
    "peer-grant": "grant",
    "peer-target": "granted",
    "peer-release": "cancelling",
    "peer-reconnect": "postcopy-paused",
}
"""Where each message of the agents' protocol is sent."""


STREAM_BACK_S: Final = 1.0
"""After so long memory can move again where the agents are left without their link."""
FOR_GOOD_S: Final = 6.0
"""Longer than any wait for an answer of the other agent: what is done without it has been done by then."""
LASTS_S: Final = {"kill": 0.3, "stop": 1.0, "cut": 1.0, "reset": 1.0, "lock": 3.0, "full": 2.0}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done. `kind` says who does it; the other words are its own."""

    kind: str
    what: str
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in a cell's name."""
        return "-".join((self.kind, self.what, *self.more))

    @property
    def lasts_s(self) -> float:
        """How long it lasts, in seconds, before it is taken away again."""
        if "for-good" in self.more:
            return FOR_GOOD_S
        return LASTS_S.get(self.kind, 0.0)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    fault: Fault
    phase: str
    mode: str
    pair: tuple[str, str]

    @property
    def name(self) -> str:
        """Unique in the matrix."""
        return f"{self.fault.name}/{self.phase}/{self.mode}/{self.pair[0]}-{self.pair[1]}"

    @property
    def ground(self) -> tuple[tuple[str, str], str]:
        """The kind of two hosts that it needs: QEMUs, and what is special about their storage."""
        storage = "shared"
        if self.fault.kind == "lock" and "target" in self.fault.more:
            storage = "own"
        if self.fault.kind == "full":
            storage = "small"
        return self.pair, storage


ALONE: Final = Fault("reset", "alone", ("for-good",))
"""The agents cannot talk, and the stream breaks for `STREAM_BACK_S`: each side is left to itself."""


def _faults_everywhere() -> Iterator[Fault]:
    for actor in ACTORS:
        yield Fault("kill", actor)
        yield Fault("stop", actor)
    for wire in WIRES:
        for way in WAYS:
            for length in LENGTHS:
                yield Fault("cut", wire, (way, length))
    for length in LENGTHS:
        yield Fault("reset", "stream", (length,))
        yield Fault("reset", "link", (length,))
    yield ALONE


CUT_PHASES: Final = ("active", "pre-switchover", "device", "postcopy-device", "grant", "granted", "postcopy-active",
                     "postcopy-paused")  # fmt: skip
LOCK_PHASE: Final = {"precopy": "device", "postcopy": "postcopy-device"}
"""The source has let its disks go and the destination has not taken them yet: some QEMUs do that while they load."""
FULL_PHASES: Final = ("setup", "pre-switchover", "grant")


def _makes_sense(fault: Fault, phase: str) -> bool:
    """Whether there is something that this fault can be done to in this phase."""
    if fault == ALONE:
        return phase == "postcopy-active"  # before that there is nothing to recover
    if fault.kind in ("cut", "reset"):
        if phase not in CUT_PHASES:
            return False
        # In postcopy-paused there is no stream to cut.
        return not (phase == "postcopy-paused" and fault.what != "link")
    if phase == "setup" and fault.what == "target-qemu":
        return True  # it waits for the stream already: its agent's answer is what is held
    if phase in ("completed", "failing", "cancelling") and fault.kind == "stop":
        return False
    # After the end the source's QEMU has quit, and one whose stream broke before it had loaded is gone by itself.
    gone = "source-qemu" if phase == "completed" else "target-qemu" if phase in ("failing", "cancelling") else ""
    return fault.what != gone


def _cells(pairs: Sequence[tuple[str, str]]) -> Iterator[Cell]:
    for mode in MODES:
        for phase in PHASES_OF[mode]:
            for fault in _faults_everywhere():
                if _makes_sense(fault, phase):
                    yield from (Cell(fault, phase, mode, pair) for pair in pairs)
        for message, phase in MESSAGE_PHASE.items():
            if phase == "postcopy-paused" and mode == "precopy":
                continue
            for how in MESSAGE_FAULTS:
                yield from (Cell(Fault("message", message, (how,)), phase, mode, pair) for pair in pairs)
            for how in STRANGE:
                yield from (Cell(Fault("strange", message, (how,)), phase, mode, pair) for pair in pairs)
        for disks in ("all", "one"):
            for where in ("target", "both"):
                yield from (Cell(Fault("lock", disks, (where,)), LOCK_PHASE[mode], mode, pair) for pair in pairs)
        for side in ("source", "target"):
            for phase in FULL_PHASES:
                yield from (Cell(Fault("full", side), phase, mode, pair) for pair in pairs)


ALWAYS_EVERY_PAIR: Final = ("lock",)
"""Faults whose outcome depends on the QEMUs so much that the core matrix has every pair."""


def matrix(pairs: Sequence[tuple[str, str]], *, core: bool = False) -> list[Cell]:
    """Every cell, or the core: each fault in each phase and mode once, on the pairs in turn; of the cuts of one way,
    and of the strange answers, a part."""
    every = list(_cells(pairs))
    if not core:
        return every
    chosen: list[Cell] = []
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in every:
        groups.setdefault((cell.fault.name, cell.phase, cell.mode), []).append(cell)
    turn = 0
    for group in groups.values():
        fault = group[0].fault
        if fault.kind in ALWAYS_EVERY_PAIR:
            chosen += group
            continue
        if not _in_core(fault, group[0].phase):
            continue
        chosen.append(group[turn % len(group)])
        turn += 1
    return chosen


def _in_core(fault: Fault, phase: str) -> bool:
    if fault.kind == "cut":
        one_way = "both-ways" not in fault.more
        if one_way:
            return fault.what == "link" and "1s" in fault.more and phase in ("grant", "granted")
        return "1s" in fault.more or phase in ("grant", "granted", "postcopy-active")
    if fault.kind == "strange":
        return fault.what in ("peer-ready", "peer-grant")
    if fault.kind == "message":
        # A lost offer is waited for as long as a QEMU may take to start: half a minute a run.
        return fault.what != "peer-prepare" or not fault.more[0].startswith("drop")
    return True


def select(cells: Iterable[Cell], pattern: str) -> list[Cell]:
    """Cells whose name is, contains, or (with `*`) matches the pattern; all for an empty one."""
    if not pattern:
        return list(cells)
    if any(sign in pattern for sign in "*?["):
        return [cell for cell in cells if fnmatch.fnmatch(cell.name, pattern)]
    return [cell for cell in cells if pattern in cell.name]


def by_ground(cells: Iterable[Cell]) -> dict[tuple[tuple[str, str], str], list[Cell]]:
    """Cells that can run on the same two hosts, together."""
    grounds: dict[tuple[tuple[str, str], str], list[Cell]] = {}
    for cell in cells:
        grounds.setdefault(cell.ground, []).append(cell)
    return grounds
