"""The matrix: fault x phase x mode x pair of QEMUs x guest. Pure: which cells there are, and what they are called.

Theory of operation
-------------------
A `Cell` is one run: one fault, done to one migration of one guest in one phase. Its name says all of it and finds it
again (`vmferry chaos --only NAME`). `matrix` lists every cell that means something; `core` is the part of it that
runs for each change: every fault in every phase and mode, the QEMU pairs taken in turn.

Rule 1: a phase is a public status of the source, or a moment within one that something else marks: a message on its
        way (`grant`, `granted`), what the destination has done and nobody has heard of (`loaded`, `starting`,
        `started`, `last`).

Three of QEMU's words are no phase here. postcopy-recover-setup: with a channel that is connected before QEMU hears of
it, it is over in the millisecond in which it begins. wait-unplug: the guest's driver ends it, within milliseconds too
(tests/real/test_options_real.py goes through it). colo: vmferry refuses it.
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
    "loaded": "",
    "grant": "",
    "starting": "",
    "started": "",
    "granted": "",
    "postcopy-active": "postcopy-active",
    "last": "",
    "postcopy-paused": "postcopy-paused",
    "postcopy-recover": "postcopy-recover",
    "completed": "completed",
    "cancelling": "cancelling",
    "cancelled": "cancelled",
    "failing": "failing",
    "failed": "failed",
}
"""Phase -> the public status that the source's facts must give when the fault is done; "" for moments within one:

loaded     the destination's QEMU has loaded everything that it needs to start, and its word of that does not get back
grant      the order to start is on its way to the other agent
starting   it is on its way from that agent to its QEMU
started    the guest runs there, and not even that agent has heard of it
granted    it runs there, and the answer is on its way
last       postcopy: every page is there, and nobody here has heard of it"""

PHASES_OF: Final[dict[str, tuple[str, ...]]] = {
    "precopy": ("setup", "active", "pre-switchover", "device", "loaded", "grant", "starting", "started", "granted",
                "completed", "cancelling", "cancelled", "failing", "failed"),
    "postcopy": ("setup", "active", "pre-switchover", "postcopy-device", "loaded", "grant", "starting", "started",
                 "granted", "postcopy-active", "last", "postcopy-paused", "postcopy-recover", "completed",
                 "cancelling", "cancelled"),
}  # fmt: skip
ENDS: Final = ("completed", "cancelled", "failed")

ACTORS: Final = ("source-qemu", "target-qemu", "source-agent", "target-agent", "cli")
MESSAGES: Final = ("peer-report", "peer-prepare", "peer-ready", "peer-grant", "news", "peer-target", "peer-release",
                   "peer-reconnect", "peer-recovering")  # fmt: skip
"""Every message that is part of a migration's way. `news` is what the destination's agent tells by itself, here that
the guest runs. The others of the protocol are questions of people, and greetings."""
MESSAGE_FAULTS: Final = ("drop-request", "drop-answer", "delay-request", "delay-answer", "duplicate")
STRANGE: Final = ("http", "empty", "error", "types")
"""What a peer that is not ours answers: another protocol, nothing, an error, other types than ours."""
WIRES: Final = ("stream", "link", "both")
WAYS: Final = ("both-ways", "to-target", "to-source")
LENGTHS: Final = ("1s", "for-good")

MESSAGE_PHASE: Final = {
    "peer-report": "setup",
    "peer-prepare": "setup",
    "peer-ready": "pre-switchover",
    "peer-grant": "grant",
    "news": "grant",
    "peer-target": "granted",
    "peer-release": "cancelling",
    "peer-reconnect": "postcopy-paused",
    "peer-recovering": "postcopy-paused",
}
"""Where each message of the agents' protocol is sent."""


STREAM_BACK_S: Final = 1.0
"""After so long memory can move again where the agents are left without their link."""
FOR_GOOD_S: Final = 6.0
"""Longer than any wait for an answer of the other agent: what is done without it has been done by then."""
LASTS_S: Final = {"kill": 0.3, "stop": 1.0, "cut": 1.0, "reset": 1.0, "lock": 3.0, "full": 2.0}
TAKES_LATE_SINCE: Final = (8, 0)
CANCELS: Final = ("once", "twice", "then-reset", "after-reset")
"""A cancel by itself, and together with a stream that breaks, in both orders."""
PROOF_SINCE: Final = (10, 2)
"""Sources before it have no word of postcopy's proof, so nothing of theirs waits for it (`agent.observe`)."""


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
    guest: str = "boot"
    """boot: the boot sector, whose every page can be checked from outside. linux: it checks itself, memory and disk."""

    @property
    def name(self) -> str:
        """Unique in the matrix."""
        name = f"{self.fault.name}/{self.phase}/{self.mode}/{self.pair[0]}-{self.pair[1]}"
        return name if self.guest == "boot" else f"{name}/{self.guest}"

    @property
    def versions(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the source's and the destination's QEMU."""
        source, target = (tuple(int(part) for part in version.split(".")) for version in self.pair)
        return source, target

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
        for wire in WIRES:
            yield Fault("reset", wire, (length,))
    yield ALONE


CUT_PHASES: Final = ("active", "pre-switchover", "device", "postcopy-device", "loaded", "grant", "starting", "started",
                     "granted", "postcopy-active", "last", "postcopy-paused", "postcopy-recover")  # fmt: skip
LINK_PHASES: Final = ("setup", *CUT_PHASES, "cancelling", "failing")
"""There is no stream yet, or no more."""
LOCK_PHASE: Final = {"precopy": "device", "postcopy": "postcopy-device"}
"""The source has let its disks go and the destination has not taken them yet: some QEMUs do that while they load."""
FULL_PHASES: Final = {
    "source": ("setup", "pre-switchover", "grant", "granted", "cancelling"),
    "target": ("setup", "pre-switchover", "grant", "starting", "cancelling"),
}
"""Those after which the next step is a line in this side's journal."""
LINUX: Final[dict[str, dict[str, tuple[Fault, ...]]]] = {
    "precopy": {
        "active": (Fault("kill", "source-agent"), Fault("reset", "stream", ("1s",))),
        "device": (Fault("kill", "target-qemu"), Fault("kill", "cli"), Fault("reset", "stream", ("1s",)),
                   Fault("lock", "all", ("target",)), Fault("lock", "all", ("source",))),
        "loaded": (Fault("kill", "source-qemu"), Fault("kill", "target-agent"), Fault("reset", "stream", ("1s",))),
        "grant": (Fault("kill", "target-qemu"), Fault("kill", "source-agent")),
        "started": (Fault("kill", "target-agent"),),
    },
    "postcopy": {
        "postcopy-device": (Fault("kill", "target-qemu"), Fault("reset", "stream", ("1s",)),
                            Fault("lock", "all", ("target",))),
        "grant": (Fault("kill", "target-qemu"), Fault("kill", "target-agent")),
        "started": (Fault("kill", "source-agent"),),
        "postcopy-active": (Fault("kill", "source-qemu"), Fault("kill", "source-agent"), Fault("kill", "target-agent"),
                            Fault("reset", "stream", ("1s",))),
        "last": (Fault("kill", "source-qemu"), Fault("reset", "stream", ("1s",))),
    },
}  # fmt: skip
"""Where the guest that checks itself is put through it: each party killed, the stream broken and a disk refused, at the
moments in which memory or disk could be wrong afterwards."""


def _makes_sense(fault: Fault, phase: str) -> bool:
    """Whether there is something that this fault can be done to in this phase."""
    if fault == ALONE:
        return phase == "postcopy-active"  # before that there is nothing to recover
    if fault.kind in ("cut", "reset"):
        # In postcopy-paused there is no stream to cut.
        return phase in (LINK_PHASES if fault.what == "link" else CUT_PHASES) and not (
            phase == "postcopy-paused" and fault.what != "link"
        )
    if phase == "setup" and fault.what == "target-qemu":
        return True  # it waits for the stream already: its agent's answer is what is held
    if phase in ENDS and fault.kind == "stop":
        return False
    if fault.kind == "stop" and (phase, fault.what) in (("starting", "target-qemu"), ("started", "target-agent")):
        return False  # it is: that is how the phase lasts
    if phase in ("cancelled", "failed") and fault.what == "cli":
        return False  # it has ended
    # After the end the source's QEMU has quit, and one whose stream broke before it had loaded is gone by itself.
    gone = "source-qemu" if phase == "completed" else ""
    if phase in ("failing", "failed", "cancelling", "cancelled"):
        gone = "target-qemu"
    return fault.what != gone


def can_be(cell: Cell) -> bool:
    """Whether the QEMUs of the pair can be held in the phase, and the fault can be done to them there."""
    source, target = cell.versions
    if (cell.phase, cell.mode) == ("loaded", "postcopy"):
        return source >= PROOF_SINCE
    if (cell.fault.kind, cell.fault.more, cell.guest) == ("lock", ("source",), "linux"):
        return source >= PROOF_SINCE  # an older one lets its disks go behind its last page, and this guest has many
    # An older destination has its disks when it has loaded in postcopy: nobody can take them from it then.
    return "and-reset" not in cell.fault.more or target >= TAKES_LATE_SINCE


def _cells(pairs: Sequence[tuple[str, str]]) -> Iterator[Cell]:
    for fault, phase, mode, guest in _kinds():
        for pair in pairs:
            cell = Cell(fault, phase, mode, pair, guest)
            if can_be(cell):
                yield cell


def _kinds() -> Iterator[tuple[Fault, str, str, str]]:
    """Fault, phase, mode and guest of every cell."""
    for mode in MODES:
        for phase in PHASES_OF[mode]:
            yield from ((f, phase, mode, "boot") for f in _faults_everywhere() if _makes_sense(f, phase))
        for phase in PHASES_OF[mode]:
            if phase not in ENDS:
                yield from ((f, phase, mode, "boot") for f in _cancels(phase))
        for message, phase in MESSAGE_PHASE.items():
            if phase not in PHASES_OF[mode]:
                continue
            hows = MESSAGE_FAULTS if message != "news" else ("drop-answer", "delay-answer", "duplicate-answer")
            yield from ((Fault("message", message, (how,)), phase, mode, "boot") for how in hows)
            if message != "news":
                yield from ((Fault("strange", message, (how,)), phase, mode, "boot") for how in STRANGE)
        yield from ((f, phase, mode, "boot") for f, phase in _of_disks(mode))
        for phase, faults in LINUX[mode].items():
            yield from ((fault, phase, mode, "linux") for fault in faults)


def _cancels(phase: str) -> Iterator[Fault]:
    has_stream = phase in CUT_PHASES and phase != "postcopy-paused"
    for how in CANCELS:
        if has_stream or not how.endswith("reset"):
            yield Fault("cancel", how)


def _of_disks(mode: str) -> Iterator[tuple[Fault, str]]:
    """What happens to the guest's disks, and to those under the journals."""
    for disks in ("all", "one"):
        for where in ("target", "both", "source"):
            yield Fault("lock", disks, (where,)), LOCK_PHASE[mode]
        if mode == "postcopy":
            yield Fault("lock", disks, ("target", "and-reset")), "grant"
    for side, phases in FULL_PHASES.items():
        yield from ((Fault("full", side), phase) for phase in phases)


def _depends_on_qemus(cell: Cell) -> bool:
    """Whether the outcome depends on the QEMUs so much that the core has every pair: who takes a lock when; a recovery
    that breaks off (`core.hazards`); what a source says when it loses its stream behind the last page (P26)."""
    fault = cell.fault
    is_lock = fault.kind == "lock" and cell.guest == "boot"
    is_recovery = (fault.kind, fault.what) == ("message", "peer-recovering") and fault.more[0].startswith("drop")
    return is_lock or is_recovery or (fault.kind, fault.what, cell.phase) == ("reset", "both", "last")


def matrix(pairs: Sequence[tuple[str, str]], *, core: bool = False) -> list[Cell]:
    """Every cell, or the core: each fault in each phase and mode once, on the pairs in turn; of the cuts of one way,
    and of the strange answers, a part."""
    every = list(_cells(pairs))
    if not core:
        return every
    chosen: list[Cell] = []
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in every:
        groups.setdefault((cell.fault.name, cell.phase, cell.mode, cell.guest), []).append(cell)
    turn = 0
    for group in groups.values():
        first = group[0]
        if not _in_core(first.fault, first.phase):
            continue
        if _depends_on_qemus(first):
            chosen += group
            continue
        chosen.append(group[turn % len(group)])
        turn += 1
    return chosen


MOMENTS: Final = ("loaded", "starting", "started", "last", "postcopy-recover")
"""Within a status that has the whole series of faults already: of these the core has those that say something new."""


def _in_core(fault: Fault, phase: str) -> bool:
    match fault.kind:
        case "cut":
            one_way = "both-ways" not in fault.more
            if one_way:
                return fault.what == "link" and "1s" in fault.more and phase in ("grant", "granted")
            if phase in MOMENTS or phase not in CUT_PHASES:
                return "1s" in fault.more and fault.what != "stream"
            return "1s" in fault.more or phase in ("grant", "granted", "postcopy-active")
        case "reset" if fault.what == "both":
            return "1s" in fault.more and phase in ("device", "postcopy-device", "postcopy-active", *MOMENTS)
        case "reset":
            return "1s" in fault.more or (phase in CUT_PHASES and phase not in MOMENTS)
        case "stop":
            return fault.what != "cli" or phase not in MOMENTS
        case "strange":
            return fault.what in ("peer-ready", "peer-grant") or fault.more[0] == "types"
        case "cancel":
            return fault.what == "once" or phase in ("active", "device", "postcopy-device", "loaded", "grant")
        case _:
            return True


def select(cells: Iterable[Cell], pattern: str) -> list[Cell]:
    """Cells whose name is, contains, or (with `*`) matches one of the patterns, between which are commas; all for an
    empty one."""
    patterns = [each for each in pattern.split(",") if each]
    return [cell for cell in cells if not patterns or any(_fits(cell.name, each) for each in patterns)]


def _fits(name: str, pattern: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatch(name, pattern)
    return pattern in name


def by_ground(cells: Iterable[Cell]) -> dict[tuple[tuple[str, str], str], list[Cell]]:
    """Cells that can run on the same two hosts, together."""
    grounds: dict[tuple[tuple[str, str], str], list[Cell]] = {}
    for cell in cells:
        grounds.setdefault(cell.ground, []).append(cell)
    return grounds
