"""What must hold: on every state, on every step, and where every run may end.

The names are those of the requirements (semantics 6.1 and 6.2). I11 and I13 hold by construction here: facts are only
ever added, and no effect tells a destination to migrate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus
from vmferry.core.status import is_over
from vmferry.core.table import Outcome
from vmferry.model import logs
from vmferry.model.rules import Kit, place_at_work, source_at_work
from vmferry.model.world import (
    D_COMMITTED,
    D_RENOUNCED,
    DOWN,
    S_COMMITTED,
    S_FENCED,
    S_LEAVE,
    World,
    destination_alive,
    source_alive,
)

BUSY: Final = ("setup", "active", "pre-switchover", "device", "postcopy-device", "postcopy-active", "failing",
               "cancelling")  # fmt: skip
ENDS: Final = (MigrationStatus.COMPLETED, MigrationStatus.FAILED, MigrationStatus.CANCELLED)
GIVEN: Final = ("completed", "postcopy-active", "postcopy-paused", "postcopy-recover", "dead")


def complete_on_source(w: World) -> bool:
    """The source has the whole guest as it is now."""
    return source_alive(w) and not w.d_ran


def complete_on_destination(w: World) -> bool:
    """The destination has the whole guest as it is now.

    It counts until the order to give it up is sent: whoever sends it has a copy then. Should that die while the order
    is on its way, nobody over there can know."""
    is_told = "release" in (w.request, w.stray) or logs.has(max(w.d_log, 0), Fact.RELEASE)
    if not w.d_ran and (is_told or w.d_journal & D_RENOUNCED):
        return False
    return destination_alive(w) and w.d_word == "completed" and not w.d_stale


def complete_on_both(w: World) -> bool:
    """After it ran with pages missing: the two together are the guest."""
    return w.d_ran and source_alive(w) and destination_alive(w)


def is_whole(w: World) -> bool:
    """Some recoverable copy of the guest as it is now is there."""
    return complete_on_source(w) or complete_on_destination(w) or complete_on_both(w)


def on_state(kit: Kit, w: World) -> Iterator[str]:
    """What is wrong with a state."""
    if w.s_run == "running" and w.d_run == "running" and source_alive(w) and destination_alive(w):
        yield "I1: the guest runs on both sides"
    if w.lock != "off" and w.s_run == "running" and source_alive(w) and w.lock != "src":
        yield "I6: the source runs without its disks"
    if w.lock != "off" and w.d_run == "running" and destination_alive(w) and w.lock != "dst":
        yield "I6: the destination runs without its disks"
    if w.s_log > 0:
        over = logs.has(w.s_log, Fact.CLEANUP)
        if over and w.s_word in BUSY:
            yield f"I8: the attempt counts as over while the source's QEMU is in {w.s_word}"
        if over and kit.rules.source_status(logs.log_of(w.s_log)) not in ENDS:
            yield "L2: the attempt is over and its status is none of those that end one"
        if w.s_heard == "postcopy-active" and not over and not logs.has(w.s_log, Fact.PACKAGE_LOADED):
            yield "I9: postcopy-active without the proof of loading"
        if w.s_heard == "postcopy-active" and not over and not logs.has(w.s_log, Fact.PACKAGE_SENT):
            yield "I9: postcopy-active, and no package was sent"
        if over is not is_over(logs.log_of(w.s_log)):
            yield "I8: a new attempt may begin before this one is cleaned up"
        if logs.has(w.s_log, Fact.TARGET_GONE) and (destination_alive(w) or w.d_ran):
            yield "I5: the source takes a destination for gone that ran or may run"
        if logs.has(w.s_log, Fact.RUN_ACKED) and not w.d_ran:
            yield "the source takes a destination for running that never ran"
    if w.d_journal & D_RENOUNCED and (w.d_ran or (destination_alive(w) and not _keeps_its_promise(w))):
        yield "I2: the destination renounced a guest that ran or may run there"


def _keeps_its_promise(w: World) -> bool:
    """The place that was given up is being ended, or whoever starts next will end it."""
    return w.d_log == DOWN or w.d_stage == "renounced"


def on_step(kit: Kit, name: str, w: World, after: World) -> Iterator[str]:
    """What is wrong with a step."""
    by_fault = name.startswith("fault:")
    if not by_fault and is_whole(w) and not is_whole(after):
        yield "I2: the last complete copy was given up"
    if after.s_run == "running" and w.s_run != "running":
        if w.d_ran:
            yield "I5: the source runs an old copy of a guest that ran on the destination"
        may_start = w.d_journal & D_COMMITTED and not w.d_journal & D_RENOUNCED
        # Behind a fence it may be told to, and is refused the disks that the source has.
        if may_start and w.s_word != "failing" and not (w.s_journal & S_FENCED and w.lock != "off"):
            yield "I5: the source starts while the destination may still start"
    if after.d_ran and not w.d_ran and kit.setting.disks:
        # What a source that went on after the load leaves behind is old in memory, too (`d_stale`).
        if after.s_mirrors != "drained" and not w.d_stale:
            yield "disks: the destination runs, and its disks are not equal to the source's"
        if after.d_served:
            yield "disks: the destination runs, and the network can still write to its disks"
    if after.d_ran and not w.d_ran:
        if w.d_stale:
            yield "I5: the destination runs an old copy of a guest that ran on the source again"
        if not (w.s_journal & S_COMMITTED and w.d_journal & D_COMMITTED):
            yield "I4: the destination starts without a durable grant"
        went_back = w.s_word in ("failing", "failed") and w.s_run != "running" and w.d_word == "completed"
        if w.s_word not in GIVEN and not went_back:
            yield f"I4: the destination starts while the source is in {w.s_word}"
    leave = not kit.setting.holds or w.s_journal & S_LEAVE
    if (w.s_word, after.s_word) == ("pre-switchover", "device") and not leave:
        yield "S97: the switchover goes on without the leave that it was to wait for"
    if after.s_result and not w.s_result:
        yield from _on_end(kit, w, after)
    # Where the source's process died the only copy goes forward, whatever was wanted.
    ends = logs.has(max(after.s_log, 0), Fact.CLEANUP) and not logs.has(w.s_log, Fact.CLEANUP)
    if w.cancel == "accepted" and ends and not logs.has(w.s_log, Fact.SOURCE_GONE):
        status = kit.rules.source_status(logs.log_of(after.s_log))
        if status in (MigrationStatus.COMPLETED, MigrationStatus.FAILED):
            yield f"I10: an accepted cancel ended in {status}"


def _on_end(kit: Kit, w: World, after: World) -> Iterator[str]:
    """The verdict of an ended job is what is so."""
    result = after.s_result
    if w.cancel == "accepted" and result == Outcome.DESTINATION.value and source_alive(w):
        yield "I10: an accepted cancel ended with the guest on the destination"
    dies = logs.has(w.s_log, Fact.SOURCE_GONE)  # whose end it has not heard of yet ends like any guest of this host
    if result == Outcome.SOURCE.value and (dies or after.d_ran):
        yield "verdict: the job ended with the guest on the source, where it is not"
    if result == Outcome.SOURCE.value and source_alive(after) and not _as_owner_wants(kit, after):
        yield "verdict: the job ended on the source, where the guest does not run"
    if result == Outcome.DESTINATION.value and not after.d_ran:
        yield "verdict: the job ended with the guest on the destination, where it never ran"
    if result == Outcome.LOST.value and is_whole(after):
        yield "verdict: the job ended as lost while a complete copy is there"
    if result in (Outcome.HELD.value, Outcome.UNCERTAIN.value, Outcome.PENDING.value, Outcome.DEGRADED.value):
        yield f"verdict: the job ended as {result}"


def _as_owner_wants(kit: Kit, w: World) -> bool:
    return w.s_run == "running" or kit.setting.owner_paused


def is_settled(kit: Kit, w: World) -> bool:
    """Where a run may end: the guest is where the verdict says, or people are told the one thing to do."""
    if w.d_log == DOWN or w.s_log == DOWN:
        return False
    place_over = not place_at_work(w)
    if w.s_result and w.s_stage not in ("journal",):
        if w.s_result == Outcome.DESTINATION.value:
            return place_over
        if w.s_result in (Outcome.SOURCE.value, Outcome.LOST.value):
            return place_over or _tells(kit.destination(w).row)
        return False
    return source_at_work(w) and not w.s_doing and _tells(kit.source(w).row) and _heard(kit, w)


def _tells(row: object) -> bool:
    action = str(getattr(row, "action", ""))
    waits = getattr(row, "do", None) is None and getattr(row, "limit_ms", None) is None
    # A run ends where the link is up again: who is told to bring it back is not told anything then.
    return waits and bool(action) and not action.startswith(("none needed", "bring the link"))


def _heard(kit: Kit, w: World) -> bool:
    """Nothing that the source's agent could still learn would move it on."""
    if not source_alive(w):
        known = logs.has(w.s_log, Fact.SOURCE_GONE)
    else:
        known = w.s_heard == w.s_word and w.s_word not in BUSY
    return known and w.push is None and w.request == "" and not w.s_hung and w.link
