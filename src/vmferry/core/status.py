"""The public migration status, one of QEMU's 17 values, computed from facts. The only such function.

Theory of operation
-------------------
The status is never stored. `source_status` and `destination_status` look through ordered rules and give the
first that matches, with the facts that made it match (`because`). Agents publish an event where the computed
status of the log with one more fact differs from that without it (`transitions`).

Rule 1: nobody compares the result to decide what to do; `core.decide` reads facts. (`tools/tidy.py` checks.)
Rule 2: a win is final: a cancel, an error or a lost link that comes after it cannot undo it.
Rule 3: an accepted cancel ends in `cancelled`; the error that came before it stays visible beside it.

Sources: qapi/migration.json of QEMU 11.1 for the values; docs/decisions/0003 for the order of the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmferry.core.facts import Fact, FactLog, error_stamp, first_error
from vmferry.core.migration_status import MigrationStatus as S


@dataclass(frozen=True, slots=True)
class Derived:
    """A status and the facts used by the rule that gave it."""

    status: S
    because: tuple[Fact, ...]


_NEVER = 1 << 60


def _won_at(log: FactLog) -> int | None:
    """The stamp at which the move was won, or None: all sent, the destination's result, the proof that the
    destination runs the guest, and in postcopy the proof of loading, told to the outside before.

    QEMU calls a source completed as soon as the destination has loaded; here the destination must also run,
    because until then the guest may still have to go back (docs/decisions/0003)."""
    needed = [Fact.ALL_SENT, Fact.PEER_ACK, Fact.RUN_ACKED]
    if Fact.PACKAGE_SENT in log:
        needed += [Fact.PACKAGE_LOADED, Fact.POSTCOPY_ANNOUNCED]
    stamps = [log.stamp(fact) for fact in needed]
    return None if None in stamps else max(s for s in stamps if s is not None)


def _round_status(log: FactLog) -> Derived:
    """Rule 6: postcopy that runs, is broken, or is on its way back, by the newest lost round."""
    lost = log.last_round(Fact.LINK_LOST)
    if lost == 0:
        return Derived(S.POSTCOPY_ACTIVE, (Fact.PACKAGE_LOADED,))
    if log.stamp(Fact.RESUME_ACK, lost) is not None:
        return Derived(S.POSTCOPY_ACTIVE, (Fact.RESUME_ACK,))
    if log.stamp(Fact.RECONNECT_FAILED, lost) is not None:
        return Derived(S.POSTCOPY_PAUSED, (Fact.RECONNECT_FAILED,))
    if log.stamp(Fact.RECONNECTED, lost) is not None:
        return Derived(S.POSTCOPY_RECOVER, (Fact.RECONNECTED,))
    if log.stamp(Fact.RESUME_WANTED, lost) is not None:
        return Derived(S.POSTCOPY_RECOVER_SETUP, (Fact.RESUME_WANTED,))
    return Derived(S.POSTCOPY_PAUSED, (Fact.LINK_LOST,))


def _cancelled_at(log: FactLog) -> int | None:
    """The stamp of the cancel, or None; one that came after the end changes nothing any more."""
    cancel, cleanup = log.stamp(Fact.CANCEL), log.stamp(Fact.CLEANUP)
    return None if cancel is None or (cleanup is not None and cleanup < cancel) else cancel


def _ended(log: FactLog) -> Derived | None:
    """Rules 2 to 4: success, cancel, failure; each only with the stamp order that makes it final."""
    won = _won_at(log)
    cancel = _cancelled_at(log)
    error = error_stamp(log)
    if (
        won is not None
        and won < (cancel if cancel is not None else _NEVER)
        and won < (error if error is not None else _NEVER)
    ):
        if Fact.COLO in log:
            return Derived(S.COLO, (Fact.COLO,))
        return Derived(S.COMPLETED, (Fact.ALL_SENT, Fact.PEER_ACK, Fact.RUN_ACKED))
    cleanup = Fact.CLEANUP in log
    if cancel is not None:
        because = (Fact.CANCEL, Fact.CLEANUP) if cleanup else (Fact.CANCEL,)
        return Derived(S.CANCELLED if cleanup else S.CANCELLING, because)
    if error is not None:
        cause = first_error(log)
        assert cause is not None
        because = (cause.fact, Fact.CLEANUP) if cleanup else (cause.fact,)
        return Derived(S.FAILED if cleanup else S.FAILING, because)
    return None


def derive_source(log: FactLog) -> Derived:
    """The source's status and why: the first rule that matches."""
    if Fact.MIGRATE not in log:
        return Derived(S.NONE, ())
    ended = _ended(log)
    if ended is not None:
        return ended
    if Fact.PACKAGE_SENT in log:
        if Fact.PACKAGE_LOADED not in log:
            return Derived(S.POSTCOPY_DEVICE, (Fact.PACKAGE_SENT,))
        return _round_status(log)
    if Fact.SWITCHOVER in log:
        if Fact.PAUSE_CAP in log and Fact.CONTINUE not in log:
            return Derived(S.PRE_SWITCHOVER, (Fact.SWITCHOVER, Fact.PAUSE_CAP))
        return Derived(S.DEVICE, (Fact.SWITCHOVER,))
    if Fact.UNPLUG_WAIT in log and Fact.UNPLUG_DONE not in log:
        return Derived(S.WAIT_UNPLUG, (Fact.UNPLUG_WAIT,))
    for evidence in (Fact.SETUP_DONE, Fact.UNPLUG_DONE):
        if evidence in log:
            return Derived(S.ACTIVE, (evidence,))
    return Derived(S.SETUP, (Fact.MIGRATE,))


def derive_destination(log: FactLog) -> Derived:
    """The destination's status and why."""
    if Fact.PREPARE not in log:
        return Derived(S.NONE, ())
    if Fact.ALL_SENT in log:
        return Derived(S.COMPLETED, (Fact.ALL_SENT,))
    if Fact.ERROR in log or Fact.TARGET_GONE in log:
        return Derived(S.FAILED, (Fact.ERROR if Fact.ERROR in log else Fact.TARGET_GONE,))
    if Fact.PACKAGE_LOADED in log:
        return _round_status(log)
    if Fact.PACKAGE_SENT in log:
        return Derived(S.POSTCOPY_DEVICE, (Fact.PACKAGE_SENT,))
    if Fact.HEADER_SEEN in log:
        return Derived(S.ACTIVE, (Fact.HEADER_SEEN,))
    if Fact.LISTENING in log:
        return Derived(S.SETUP, (Fact.LISTENING,))
    return Derived(S.NONE, (Fact.PREPARE,))


def source_status(log: FactLog) -> S:
    """The source's public status."""
    return derive_source(log).status


def destination_status(log: FactLog) -> S:
    """The destination's public status."""
    return derive_destination(log).status


def cancel_refusal(log: FactLog, *, was_refused: bool = False) -> str | None:
    """None if a cancel may be accepted now (or changes nothing because the attempt is over), else why not.

    The last moment is the grant: once the destination may run the guest, going back would run it twice. A
    guest that somebody started there by hand is the same case. `was_refused`: the destination has used its order up,
    QEMU refused to start, and no other order is on its way: then it has not run and waits for us.
    """
    if was_refused or is_over(log) or Fact.TARGET_GONE in log:
        return None
    if Fact.GRANT_SENT in log:
        return "the destination was told to start the guest; the migration goes forward"
    if Fact.RUN_ACKED in log:
        return "the destination runs the guest although it was never told to; the source must not run it too"
    return None


def is_over(log: FactLog) -> bool:
    """True when the attempt has ended and everything that belonged to it is cleaned up: a new one may start
    and every option may change. False in `failing` and `cancelling`."""
    return Fact.MIGRATE not in log or Fact.CLEANUP in log
