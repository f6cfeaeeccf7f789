"""Effects: the closed set of things that an agent may do to a guest, each with the guard it is done under.

Theory of operation
-------------------
A row of a table names effects; `agent.act` carries each out in one `match` that ends in `assert_never`. An
effect is an imperative without parameters: whatever it needs (paths, sockets, options) belongs to the
attempt. Before it acts, the hand takes a fresh view and asks `Guard.allows`; if that says no, the effect is
dropped and the loop decides anew. A decision may have waited while the world went on; the guard is what makes
a stale decision harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from vmferry.core.view import (
    Change,
    Cpus,
    DestinationView,
    Disks,
    Grant,
    Halt,
    Held,
    Incoming,
    Leave,
    Ran,
    Served,
    Source,
    SourceView,
    Step,
    Target,
    Want,
    Wish,
)


class Effect(Enum):
    """What the source's agent can do."""

    CHECK_PLAN = "check-plan"
    """Ask both hosts whether the guest can go there; changes nothing."""
    PREPARE = "prepare"
    """Have the destination start a paused QEMU and wait for the stream."""
    CONFIGURE = "configure"
    """Set every option on the source's QEMU, read back, compare."""
    START_MIRRORS = "start-mirrors"
    """Tell the source's QEMU to copy the local disks to the destination's, and to keep them equal."""
    DRAIN_MIRRORS = "drain-mirrors"
    """The guest is paused: let the mirrors write what is left and end, all of them or none."""
    DROP_MIRRORS = "drop-mirrors"
    """Give the mirrors up: nothing of them is left in the source's QEMU, and the guest does not notice."""
    START = "start"
    """Connect the channel, hand it to QEMU and tell it to migrate."""
    START_POSTCOPY = "start-postcopy"
    """Tell the source's QEMU to switch to postcopy."""
    LET_PAGES_GO = "let-pages-go"
    """Let the source's QEMU send pages as fast as it may: until the guest ran there it was held back."""
    PAUSE_PAGES = "pause-pages"
    """Break the channel of a postcopy on purpose: no page moves until it is joined again."""
    MAKE_SURE = "make-sure"
    """During the pause before the switchover: ask the destination whether it is there and loading."""
    CONTINUE = "continue"
    """Let the source leave its pause before the switchover."""
    COMMIT = "commit"
    """Make the newer generation durable in this journal."""
    SEND_GRANT = "send-grant"
    """Tell the destination that it may run the guest; repeating it is harmless."""
    ASK_TARGET = "ask-target"
    """Ask the destination what it knows; changes nothing."""
    RELEASE_TARGET = "release-target"
    """Ask the destination to renounce: kill its QEMU if that never ran the guest, and remember it."""
    RECONNECT = "reconnect"
    """Postcopy lost its channel: put both QEMUs into postcopy-paused, connect them again, resume."""
    CANCEL_SOURCE = "cancel-source"
    """End the attempt inside the source's QEMU: cancel, then yank and cut when it does not obey."""
    RESUME_SOURCE = "resume-source"
    """Start the source's CPUs again (only if the owner had them running)."""
    BRING_BACK = "bring-back"
    """Lead the source's QEMU out of postcopy with a stand-in for a destination that never ran the guest."""
    THROW_AWAY = "throw-away"
    """Lead the source's QEMU out of finish-migrate with a migration to nobody."""
    FENCE_TARGET = "fence-target"
    """The destination is silent: ask once more, and where the disks' locks can prove it, make sure that it does not
    run the guest and never will."""
    STOP_SOURCE = "stop-source"
    """Stop the source's CPUs because the destination runs the guest."""
    RETIRE_SOURCE = "retire-source"
    """Quit the source's QEMU: the destination runs the guest and has every page."""
    NOTE_TARGET_LOST = "note-target-lost"
    """Record that the destination is gone as the error that ends the attempt."""
    NOTE_TIMEOUT = "note-timeout"
    """Record that a wait lasted longer than its limit as the error that ends the attempt."""
    NOTE_DISK_ERROR = "note-disk-error"
    """Record what became of a disk's mirror as the error that ends the attempt."""
    NOTE_QEMU_ERROR = "note-qemu-error"
    """Record the source QEMU's own error as the error that ends the attempt."""
    CLEAN_UP = "clean-up"
    """Give back everything that belonged to the attempt and journal its end."""


class DestinationEffect(Enum):
    """What the destination's agent can do."""

    SPAWN = "spawn"
    """Start the QEMU, paused, set the options, read back, listen."""
    CLOSE_EXPORTS = "close-exports"
    """End what the network could write to the guest's disks: from here on they are its own."""
    START_CPUS = "start-cpus"
    """`cont`: take the disks and run."""
    REPORT_RAN = "report-ran"
    """Keep the guest as this host's own and tell the source that it runs."""
    RENOUNCE = "renounce"
    """Kill the QEMU, which never ran, and make durable that it never will."""
    FREEZE = "freeze"
    """Stop the guest's CPUs from outside of QEMU: pages are missing, and the policy is to pause."""
    THAW = "thaw"
    """Let them go on."""
    REPORT_DIED = "report-died"
    """Tell the source that the guest ran here and its QEMU is gone."""


Answers = frozenset[Enum]


@dataclass(frozen=True, slots=True)
class Guard:
    """For some questions of a view, the answers under which an effect is allowed."""

    allowed: Mapping[str, Answers]

    def allows(self, view: SourceView | DestinationView) -> bool:
        """True if every guarded question is answered within bounds."""
        return all(getattr(view, name) in answers for name, answers in self.allowed.items())


def _guard(**allowed: Enum | tuple[Enum, ...]) -> Guard:
    return Guard({k: frozenset(v if isinstance(v, tuple) else (v,)) for k, v in allowed.items()})


_RUNNING = (Cpus.AS_BEFORE, Cpus.UNLOCKED)
_NOT_RUNNING = tuple(c for c in Cpus if c not in _RUNNING)
_SETTLED = (Cpus.AS_BEFORE, Cpus.RESTING)
_DEAD = (Source.GONE, Source.RETIRED)
_OURS_AGAIN = (Source.IDLE, Source.BACK, Source.DONE)
_EARLY = tuple(s for s in Step if s is not Step.STARTED)
_UNSENT = (Grant.NONE, Grant.HELD)
_IN_POSTCOPY = (Source.POSTCOPY, Source.BROKEN)
_CANCELLED = (
    Source.CONNECTING,
    Source.UNPLUGGING,
    Source.BUSY,
    Source.WAITING,
    Source.SWITCHING,
    Source.SILENT,
    Source.UNKNOWN,
    Source.ENDING,
)
"""Not in postcopy: there QEMU refuses it, and a cut would do harm."""
_LIVE_MIRRORS = (Disks.COPYING, Disks.READY, Disks.FAILED)
_UNSETTLED = tuple(d for d in Disks if d is not Disks.SETTLED)
_NEVER_TOLD = tuple(t for t in Target if t not in (Target.RAN, Target.DIED))

SOURCE_GUARDS: dict[Effect, tuple[Guard, ...]] = {
    Effect.CHECK_PLAN: (_guard(want=Want.GO, step=Step.NEW, grant=Grant.NONE),),
    Effect.PREPARE: (_guard(want=Want.GO, step=Step.PLANNED, grant=Grant.NONE),),
    Effect.CONFIGURE: (_guard(want=Want.GO, step=Step.PREPARED, grant=Grant.NONE),),
    Effect.START_MIRRORS: (_guard(want=Want.GO, step=Step.CONFIGURED, grant=Grant.NONE, disks=Disks.TODO),),
    Effect.DRAIN_MIRRORS: (
        # Before the pause the guest would write on behind the mirrors' backs, and one that waits for a person's leave
        # keeps its mirrors: whoever says no has lost nothing.
        _guard(
            want=Want.GO,
            source=Source.WAITING,
            target=Target.READY,
            grant=_UNSENT,
            leave=Leave.GIVEN,
            disks=Disks.READY,
        ),
    ),
    Effect.DROP_MIRRORS: (_guard(want=Want.BACK, grant=_UNSENT, disks=_LIVE_MIRRORS),),
    Effect.START: (_guard(want=Want.GO, step=Step.CONFIGURED, grant=Grant.NONE, disks=(Disks.SETTLED, Disks.READY)),),
    Effect.START_POSTCOPY: (_guard(want=Want.GO, step=Step.STARTED, source=Source.BUSY, change=Change.POSTCOPY),),
    Effect.LET_PAGES_GO: (_guard(step=Step.STARTED, target=Target.RAN, change=Change.PACE),),
    Effect.PAUSE_PAGES: (
        _guard(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, source=Source.POSTCOPY, change=Change.PAUSE),
    ),
    Effect.MAKE_SURE: (_guard(want=Want.GO, source=Source.WAITING),),
    Effect.CONTINUE: (
        _guard(want=Want.GO, source=Source.WAITING, target=Target.READY, leave=Leave.GIVEN, disks=Disks.SETTLED),
    ),
    Effect.COMMIT: (
        _guard(
            want=Want.GO,
            source=(Source.SWITCHING, Source.POSTCOPY, Source.DONE),
            grant=Grant.NONE,
            disks=Disks.SETTLED,
        ),
        # The only copy is there, and its process here is gone: forward is the only way, whatever was wanted.
        _guard(source=Source.RETIRED, target=Target.LOADED, grant=Grant.NONE, disks=Disks.SETTLED),
    ),
    Effect.SEND_GRANT: (
        _guard(
            want=Want.GO,
            source=(Source.POSTCOPY, Source.DONE),
            target=(Target.LOADED, Target.REFUSED),
            grant=(Grant.HELD, Grant.SENT),
            cpus=_NOT_RUNNING,
        ),
        _guard(source=Source.RETIRED, target=(Target.LOADED, Target.REFUSED), grant=(Grant.HELD, Grant.SENT)),
    ),
    Effect.ASK_TARGET: (_guard(),),
    Effect.RELEASE_TARGET: (_guard(),),  # the destination itself refuses when it ran
    Effect.RECONNECT: (_guard(step=Step.STARTED, source=Source.BROKEN),),
    Effect.CANCEL_SOURCE: (
        _guard(want=Want.BACK, grant=_UNSENT, source=_CANCELLED),
        _guard(want=Want.BACK, grant=Grant.SENT, target=Target.GONE, source=_CANCELLED),
    ),
    Effect.RESUME_SOURCE: (
        # Nobody was ever told to start: the destination is fenced by the missing grant.
        _guard(want=Want.BACK, grant=_UNSENT, target=_NEVER_TOLD, cpus=Cpus.STOPPED),
        # Somebody may have been told: only the proof that it never ran and never will leads back.
        _guard(grant=Grant.SENT, target=Target.GONE, cpus=Cpus.STOPPED),
    ),
    Effect.BRING_BACK: (
        _guard(want=Want.BACK, grant=_UNSENT, target=_NEVER_TOLD, source=_IN_POSTCOPY),
        _guard(want=Want.BACK, grant=Grant.SENT, target=Target.GONE, source=_IN_POSTCOPY),
    ),
    Effect.THROW_AWAY: (
        _guard(want=Want.BACK, grant=_UNSENT, target=_NEVER_TOLD, cpus=Cpus.STUCK),
        _guard(want=Want.BACK, grant=Grant.SENT, target=Target.GONE, cpus=Cpus.STUCK),
    ),
    Effect.FENCE_TARGET: (_guard(grant=Grant.SENT, target=Target.UNKNOWN),),
    Effect.STOP_SOURCE: (_guard(target=Target.RAN, cpus=_RUNNING), _guard(want=Want.BACK, cpus=Cpus.UNLOCKED)),
    Effect.RETIRE_SOURCE: (_guard(target=Target.RAN, source=Source.DONE, grant=Grant.SENT, cpus=_NOT_RUNNING),),
    Effect.NOTE_TARGET_LOST: (_guard(),),
    Effect.NOTE_TIMEOUT: (_guard(want=Want.GO, grant=(Grant.NONE, Grant.HELD)),),
    Effect.NOTE_DISK_ERROR: (_guard(want=Want.GO, grant=_UNSENT, disks=_UNSETTLED),),
    Effect.NOTE_QEMU_ERROR: (_guard(),),
    Effect.CLEAN_UP: (
        # Nothing was sent; the guest is here, or its process died as it may at any time.
        _guard(want=Want.BACK, step=_EARLY, grant=Grant.NONE, target=_NEVER_TOLD),
        # It is here again, and settled.
        _guard(want=Want.BACK, step=Step.STARTED, grant=_UNSENT, target=_NEVER_TOLD, source=_OURS_AGAIN, cpus=_SETTLED),
        _guard(want=Want.BACK, step=Step.STARTED, target=Target.GONE, source=_OURS_AGAIN, cpus=_SETTLED),
        # It is there, and nothing of it is needed here.
        _guard(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, source=Source.RETIRED),
        # Nobody has it whole.
        _guard(want=Want.BACK, step=Step.STARTED, grant=_UNSENT, source=_DEAD, target=(Target.ABSENT, Target.GONE)),
        _guard(want=Want.BACK, step=Step.STARTED, source=_DEAD, target=Target.GONE),
    ),
}
"""For each effect the guards of which one must allow it."""

DESTINATION_GUARDS: dict[DestinationEffect, tuple[Guard, ...]] = {
    DestinationEffect.SPAWN: (_guard(wish=Wish.KEEP, incoming=Incoming.NONE, held=Held.NO),),
    DestinationEffect.CLOSE_EXPORTS: (_guard(wish=Wish.KEEP, incoming=Incoming.LOADED, ran=Ran.NO, served=Served.YES),),
    DestinationEffect.START_CPUS: (
        _guard(wish=Wish.KEEP, held=Held.YES, incoming=Incoming.LOADED, ran=Ran.NO, served=Served.NO),
    ),
    DestinationEffect.REPORT_RAN: (
        _guard(ran=Ran.YES),
        _guard(ran=Ran.UNKNOWN, incoming=Incoming.RUNNING),
    ),
    DestinationEffect.RENOUNCE: (_guard(ran=Ran.NO, incoming=tuple(i for i in Incoming if i is not Incoming.RUNNING)),),
    DestinationEffect.FREEZE: (_guard(ran=(Ran.YES, Ran.UNKNOWN), halt=Halt.WANTED),),
    DestinationEffect.THAW: (_guard(halt=Halt.OVER),),
    DestinationEffect.REPORT_DIED: (_guard(ran=(Ran.YES, Ran.UNKNOWN), incoming=Incoming.GONE),),
}
