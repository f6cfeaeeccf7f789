"""One state of the model: everything that is so at one moment, as a flat tuple of small values.

Theory of operation
-------------------
A `World` is a value; a step makes another one with `_replace`. Words of QEMU are QEMU's own, so that the production
functions that translate them can be used as they are. Nothing in it is an enum member (their hash is slow) and
nothing is bigger than an integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from vmferry.model.logs import Mask

DOWN: Final = -1
"""In place of a log: the agent's process is not there."""

# What the source's journal says (WANTED is always there).
S_COMMITTED, S_CANCEL, S_FORGOTTEN, S_TURNED, S_NO_CANCEL, S_FENCED, S_LEAVE, S_PAUSED = 1, 2, 4, 8, 16, 32, 64, 128
S_MIRRORS = 256
# What the destination's journal says.
D_PLACE, D_COMMITTED, D_KEPT, D_RENOUNCED, D_ENDED, D_RAN, D_DIED = 1, 2, 4, 8, 16, 32, 64
# `cont` on the destination: written, carried out, refused; the last two are answers nobody has read yet.
C_NONE, C_SENT, C_DONE, C_REFUSED = 0, 1, 2, 3


class Told(NamedTuple):
    """What the destination's agent says of its place (`DestinationAttempt.facts_wire`), as it was at one moment."""

    loaded: bool = False
    whole: bool = False
    ran: bool = False
    in_doubt: bool = False
    refused: int = 0
    gone: bool = False
    died: bool = False


class World(NamedTuple):
    """Everything that is so."""

    # The source's QEMU.
    s_word: str = "none"
    """Its status word, or "dead"."""
    s_run: str = "running"
    """Its run state."""
    s_before: str = "running"
    """The run state that it goes back to when a switchover fails."""
    s_told_postcopy: bool = False
    s_hung: bool = False
    """It does not answer QMP."""
    s_mirrors: str = ""
    """How its mirrors of local disks stand, all of them together: "" for none; copying, ready, failed; drained, as long
    as its guest has not run since; stale, when it has."""
    # The destination's QEMU.
    d_word: str = "absent"
    """Its status word, or "absent", or "dead"."""
    d_run: str = "inmigrate"
    d_ran: bool = False
    """Its CPUs have run, once at least: the truth, which nobody need know."""
    d_stale: bool = False
    """The source's guest went on after this side had loaded: this copy is old."""
    d_cont: int = C_NONE
    d_hung: bool = False
    d_served: bool = False
    """The network can write to its disks."""
    # What lies between them.
    channel: str = "none"
    """none, up, cut."""
    lock: str = "src"
    """Who holds the images' locks: src, dst, fence (the source's agent), none; "off" where there are none."""
    link: bool = True
    """The agents reach each other."""
    # The source's agent.
    s_log: Mask = 0
    s_heard: str = ""
    """The newest word of its QEMU that it heard; "" for none."""
    s_source: str = "IDLE"
    """Its reading: the name of a `Source`."""
    s_cpus: str = "UNKNOWN"
    s_cpus_fresh: bool = False
    """It need not ask for the run state."""
    s_answers: bool = True
    s_doing: str = ""
    """The effect that is under way, by name; "" for none."""
    s_stage: str = ""
    """due: decided, not begun; sent: its call is on its way; other words as the effect says."""
    s_answer: Told | str | None = None
    """The answer to its call, on its way back; a string: an error or an offer."""
    s_cancelled_once: bool = False
    s_tried: str = ""
    """The row whose first effect was begun: only after that can it have lasted too long."""
    s_restored: bool = False
    """An earlier agent began this attempt."""
    s_journal: int = 0
    s_result: str = ""
    """The outcome that its ENDED entry tells."""
    # The destination's agent.
    d_log: Mask = 0
    d_machine: str = ""
    """"": no QEMU of its own; ok, gone, silent: what it saw last."""
    d_sees_running: bool = False
    d_doing: str = ""
    d_stage: str = ""
    d_listens: bool = False
    d_unanswered: bool = False
    """`cont` was written, and its answer came too late to be read."""
    d_journal: int = 0
    # Messages.
    request: str = ""
    """The call of the source's agent that has not arrived yet."""
    stray: str = ""
    """A call that nobody waits for any more and that may still arrive."""
    push: Told | None = None
    """Facts that the destination's agent pushed, on their way: the newest, which says all that older ones said."""
    # People, and what may still go wrong.
    cancel: str = ""
    """"": nobody asked; written: in the journal, not acted on yet; accepted: the person was told so."""
    cancels: int = 0
    """How often it may still be asked for."""
    pauses: int = 0
    """How often the pages of a postcopy may still be paused."""
    faults: int = 0
    """How many faults may still happen."""


_PLACE: Final = {name: n for n, name in enumerate(World._fields)}


def _replace(w: World, /, **changes: Any) -> World:
    """What NamedTuple has, in a quarter of the time: half of an exploration is spent in it."""
    values = list(w)
    for name, value in changes.items():
        values[_PLACE[name]] = value
    return tuple.__new__(World, values)


World._replace = _replace  # type: ignore[method-assign, assignment]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen before a run: one exploration covers one setting."""

    mode: str = "precopy"
    """precopy or postcopy."""
    locks: bool = True
    """The disks are shared and locked. Without, only the agents' agreement keeps the guest from running twice."""
    owner_paused: bool = False
    """The guest was paused by its owner before the migration."""
    disks: bool = False
    """Local disks go with the guest; each side has images of its own, so no lock says anything of the other."""
    faults: int = 2
    cancels: int = 1
    holds: bool = False
    """The switchover waits for a person's leave."""
    pauses: int = 0
    """How often a person may pause the pages of a postcopy."""
    kinds: frozenset[str] = frozenset()
    """Only these kinds of faults, of `outside.KINDS`; empty: all."""

    @property
    def name(self) -> str:
        parts = [self.mode, "locks" if self.locks else "no locks"]
        if self.owner_paused:
            parts.append("paused by its owner")
        parts += ["with disks"] if self.disks else []
        parts += ["waits for leave"] if self.holds else []
        parts += [f"{self.pauses} pauses"] if self.pauses else []
        only = f" of {' and '.join(sorted(self.kinds))}" if self.kinds else ""
        return f"{', '.join(parts)}, {self.faults} faults{only}, {self.cancels} cancels"

    def allows(self, kind: str) -> bool:
        """True if faults of this kind happen here."""
        return not self.kinds or kind in self.kinds

    def first(self) -> World:
        """The state in which the migration was asked for and journalled."""
        return World(
            s_run="paused" if self.owner_paused else "running",
            s_before="paused" if self.owner_paused else "running",
            lock="src" if self.locks else "off",
            cancels=self.cancels,
            pauses=self.pauses,
            faults=self.faults,
        )


def source_alive(w: World) -> bool:
    """The source's QEMU process is there."""
    return w.s_word != "dead"


def destination_alive(w: World) -> bool:
    """The destination's QEMU process is there."""
    return w.d_word not in ("absent", "dead")
