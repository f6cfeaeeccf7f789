"""The source's agent: when it looks, hears, decides and acts.

Each effect is one branch of one match, as in `agent.source_act`: what it does to the world and which facts it notes,
in which order. An effect that waits for something is taken apart where the real one awaits: the guard and the first
part, then its call or its next part. Anything may happen between two parts, and between a decision and its guard
(`explore.steps`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, assert_never

from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.core.view import Cpus, Disks, Source, Target, Want, cpus_from, is_fenced, source_word
from vmferry.model import logs
from vmferry.model.destination import at_door, told
from vmferry.model.qemu import IN_POSTCOPY
from vmferry.model.rules import Kit, source_at_work
from vmferry.model.world import (
    DOWN,
    S_COMMITTED,
    S_FENCED,
    S_FORGOTTEN,
    S_MIRRORS,
    S_TURNED,
    Told,
    World,
    destination_alive,
    source_alive,
)

Step = tuple[str, World]

INTERRUPTIBLE: Final = frozenset({"PREPARE", "MAKE_SURE", "ASK_TARGET", "RELEASE_TARGET", "RECONNECT"})
"""Of the effects that wait for a call here: those that end half-way when the table asks for something else."""
QUESTIONS: Final = frozenset({"ready", "target"})
"""Calls that change nothing there and are answered at once: it does not matter when a late one arrives."""
RUN_STATE_MATTERS: Final = frozenset({"BACK", "DONE", "IDLE", "ENDING"})
CANCELLABLE: Final = frozenset({"setup", "active", "pre-switchover", "device", "failing"})
AT_REST: Final = frozenset({"none", "failed", "cancelled", "completed"})
"""In these words QEMU changes its run state no more by itself."""
BEFORE_PAUSE: Final = ("none", "setup", "active")
CONT_WORKS: Final = frozenset({"none", "setup", "active", "failed", "cancelled", "completed"})


def steps(kit: Kit, w: World) -> Iterator[Step]:
    """Everything that the source's agent may do next, but for what faults and people make it do."""
    if not source_at_work(w):
        if w.s_stage == "journal":
            yield from _end(kit, w)
        return
    yield from _looks(kit, w)
    yield from _looks_at_mirrors(kit, w)
    if not w.s_doing:
        yield from _decides(kit, w)
    elif w.s_stage == "due":
        effect = Effect[w.s_doing]
        if kit.source_may(effect, w):
            yield from act(kit, w, effect)
        else:
            yield f"source agent drops {effect.value}: its guard says no", done(w)
    elif w.s_stage in ("sent", "served", "answered"):
        yield from _waits(kit, w)
    else:
        yield from _goes_on(kit, w)


def _decides(kit: Kit, w: World) -> Iterator[Step]:
    for name, decided in decisions(kit, w):
        effect = Effect[name]
        if kit.source_may(effect, decided):
            yield from act(kit, decided, effect)


def decisions(kit: Kit, w: World) -> Iterator[tuple[str, World]]:
    """The effects that the source's agent may decide on now, and the world in which each is due."""
    choice = kit.source(w)
    row = choice.row
    tried = row.label if row.limit_ms is not None and row.do is not None else ""
    for name in choice.due:
        if not _is_premature(w, name):
            yield name, w._replace(s_doing=name, s_stage="due", s_tried=tried)
    if row.do is None or w.s_tried == row.label:  # it has lasted too long
        for name in choice.late:
            yield name, w._replace(s_doing=name, s_stage="due", s_tried="")


def _is_premature(w: World, name: str) -> bool:
    """What a recovery leads to is heard before the retry's pause is over; only one that hangs is begun again."""
    return name == "RECONNECT" and w.s_word != "postcopy-paused" and w.channel == "up" and not w.s_hung


def done(w: World) -> World:
    """The effect under way is over."""
    return w._replace(s_doing="", s_stage="", s_answer=None)


# --- looking ------------------------------------------------------------------------------------------------


def _looks(kit: Kit, w: World) -> Iterator[Step]:
    if not source_alive(w):
        if not logs.has(w.s_log, Fact.SOURCE_GONE):
            yield "source agent learns that its QEMU is gone", kit.note_source(w, Fact.SOURCE_GONE)
        return
    if not logs.has(w.s_log, Fact.STARTED):
        return
    if w.s_hung:
        if w.s_source != "SILENT":
            yield "source agent gets no answer from its QEMU", w._replace(s_source="SILENT")
        return
    if w.s_heard != w.s_word or w.s_source == "SILENT":
        yield f"source agent hears {w.s_word}", hear(kit, w)
    if cpus_matter(kit, w) and not w.s_cpus_fresh:
        yield f"source agent sees run state {w.s_run}", see_cpus(kit, w)


def _looks_at_mirrors(kit: Kit, w: World) -> Iterator[Step]:
    """`source_disks.look`: what `observe.mirror_findings` makes of QEMU's jobs."""
    stands = kit.source(w).view.disks
    if stands not in (Disks.COPYING, Disks.READY) or w.s_hung or not source_alive(w):
        return
    paused = w.s_word not in BEFORE_PAUSE and w.s_word not in ("failed", "cancelled")
    if w.s_mirrors == "ready" and stands is Disks.COPYING:
        yield "source agent sees that the mirrors are ready", kit.note_source(w, Fact.DISKS_READY)
    elif w.s_mirrors == "drained" and paused:
        yield "source agent sees that the mirrors are drained", kit.note_source(w, Fact.DISKS_READY, Fact.DISKS_DRAINED)
    elif w.s_mirrors in ("", "failed", "stale") or (w.s_mirrors == "drained" and not paused):
        yield "source agent sees that a mirror failed", kit.note_source(w, Fact.DISK_FAILED)


def hear(kit: Kit, w: World) -> World:
    """`SourceAttempt.hear_word` with what QEMU says now."""
    if not logs.has(w.s_log, Fact.STARTED) or w.s_hung or not source_alive(w):
        return w
    word = w.s_word
    if word == w.s_heard:
        return w._replace(s_source=source_word(word).name)
    proof = not (kit.breaks("waits for the proof") and word == "postcopy-device")
    findings = kit.rules.source_findings(word if proof else "postcopy-active", logs.log_of(w.s_log), has_proof=True)
    w = kit.note_source(w, *((fact, number) if number else fact for fact, number, _ in findings))
    w = w._replace(s_heard=word, s_source=source_word(word).name, s_cpus=Cpus.UNKNOWN.name, s_cpus_fresh=False)
    if word not in AT_REST:
        return w
    w = w._replace(s_cancelled_once=False)  # nothing is left to cancel
    return see_cpus(kit, w) if cpus_matter(kit, w) else w


def cpus_matter(kit: Kit, w: World) -> bool:
    """`SourceAttempt._cpus_matter`."""
    view = kit.source(w).view
    if view.source.name not in RUN_STATE_MATTERS:
        return False
    return w.s_restored or view.want is Want.BACK or view.target is Target.GONE


def see_cpus(kit: Kit, w: World) -> World:
    """It asks for the run state."""
    cpus = cpus_from(w.s_run, running_before=not kit.setting.owner_paused, source=Source[w.s_source])
    return w._replace(s_cpus=cpus.name, s_cpus_fresh=True)


def hear_target(kit: Kit, w: World, told: Told) -> World:
    """`SourceAttempt.hear_target`."""
    w = w._replace(s_answers=not told.in_doubt)
    if told.loaded:
        w = kit.note_source(w, Fact.LOADED)
        if logs.has(w.s_log, Fact.PACKAGE_SENT):
            w = kit.note_source(w, Fact.PACKAGE_LOADED)
    if told.refused > logs.last_round(w.s_log, Fact.START_REFUSED):
        w = kit.note_source(w, (Fact.START_REFUSED, told.refused))
    if told.ran:
        w = kit.note_source(w, Fact.RUN_ACKED)
    if told.whole:
        w = kit.note_source(w, Fact.TARGET_WHOLE)
        if told.ran:
            w = arrived(kit, w)
    if told.died:
        w = kit.note_source(w, Fact.TARGET_DIED)
    if told.gone:
        w = kit.note_source(w, Fact.TARGET_GONE)
    return w


def arrived(kit: Kit, w: World) -> World:
    """The guest runs there with every page, whatever QEMU said of it: that proves what its "completed" would."""
    found = kit.rules.arrival(logs.log_of(w.s_log))
    return kit.note_source(w, *((fact, number) if number else fact for fact, number, _ in found))


# --- acting -------------------------------------------------------------------------------------------------


def act(kit: Kit, w: World, effect: Effect) -> Iterator[Step]:
    """The first part of an effect whose guard has just said yes."""
    name = effect.value
    match effect:
        case Effect.CHECK_PLAN:
            yield "source agent plans", done(kit.note_source(w, *_planned(kit)))
        case Effect.PREPARE:
            yield "source agent asks for a place", call(kit.note_source(w, Fact.PREPARE), "prepare")
        case Effect.CONFIGURE:
            yield "source agent configures its QEMU", done(kit.note_source(w, Fact.CONFIGURED))
        case Effect.START_MIRRORS | Effect.DRAIN_MIRRORS | Effect.DROP_MIRRORS:
            yield from _mirror(kit, w, effect)
        case Effect.START:
            yield from _start(kit, w)
        case Effect.START_POSTCOPY:
            stops = w.s_run == "running" and not kit.breaks("stopped before postcopy")
            told = w._replace(s_run="paused" if stops else w.s_run, s_stage="stopped")
            yield "source agent stops the guest for postcopy", told
        case Effect.LET_PAGES_GO:
            yield "source agent lets the pages go", done(kit.note_source(w, Fact.PACED))
        case Effect.PAUSE_PAGES:
            paused = _pause_postcopy(w) if w.s_word in IN_POSTCOPY and not w.s_hung else w
            yield "source agent pauses the pages", hear(kit, done(paused))
        case Effect.MAKE_SURE:
            yield "source agent asks whether the destination is ready", call(w, "ready")
        case Effect.CONTINUE:
            yield "source agent lets the switchover go on", _continue(kit, w)
        case Effect.COMMIT:
            yield from _commit(kit, w)
        case Effect.SEND_GRANT:
            if not kit.breaks("a grant counts before it is sent"):
                w = kit.note_source(w, Fact.GRANT_SENT)
            if not kit.breaks("nobody knows until a grant is answered"):
                w = w._replace(s_answers=False)
            yield "source agent sends the grant", call(w, "grant")
        case Effect.ASK_TARGET:
            yield "source agent asks the destination", call(w, "target")
        case Effect.RELEASE_TARGET:
            gone = not source_alive(w) and not kit.breaks("says that its QEMU is gone")
            yield "source agent releases the destination", call(w, "release-gone" if gone else "release")
        case Effect.RECONNECT:
            yield "source agent wants to connect again", call(_pause_postcopy(w), "reconnect")
        case Effect.CANCEL_SOURCE:
            yield "source agent cancels in its QEMU", _cancel(kit, w)
        case Effect.RESUME_SOURCE:
            yield from _resume(kit, w)
        case Effect.BRING_BACK:
            yield "source agent pauses the postcopy of its QEMU", _pause_postcopy(w)._replace(s_stage="paused")
        case Effect.THROW_AWAY:
            yield "source agent leads its QEMU out of finish-migrate", _throw_away(kit, w)
        case Effect.FENCE_TARGET:
            yield "source agent asks the silent destination once more", call(w, "target")
        case Effect.STOP_SOURCE:
            stopped = w._replace(s_run="paused" if w.s_run == "running" else w.s_run, s_cpus_fresh=False)
            yield "source agent stops the guest", hear(kit, done(stopped))
        case Effect.RETIRE_SOURCE:
            forgotten = w._replace(s_journal=w.s_journal | S_FORGOTTEN, s_stage="forgotten")
            yield "source agent journals that the guest is given away", forgotten
        case Effect.NOTE_TARGET_LOST | Effect.NOTE_TIMEOUT | Effect.NOTE_QEMU_ERROR | Effect.NOTE_DISK_ERROR:
            yield f"source agent carries out {name}", done(kit.note_source(w, Fact.ERROR))
        case Effect.CLEAN_UP:
            if not source_alive(w) and not logs.has(w.s_log, Fact.SOURCE_GONE):
                yield "source agent finds its QEMU dead", done(kit.note_source(w, Fact.SOURCE_GONE))
            elif w.s_word not in ("failing", "cancelling"):
                yield "source agent cleans up", _clean_up(kit, w)
        case _:
            assert_never(effect)


def _mirror(kit: Kit, w: World, effect: Effect) -> Iterator[Step]:
    """What is done to the mirrors, all of them together."""
    if effect is Effect.START_MIRRORS:
        yield from _start_mirrors(kit, w)
    elif effect is Effect.DRAIN_MIRRORS:
        yield from _drain(kit, w)
    else:
        yield "source agent drops the mirrors", _drop(kit, w)


def call(w: World, kind: str) -> World:
    """A call goes out; without a link it fails at once."""
    if not w.link:
        return unreachable(w)
    return w._replace(request=kind, s_stage="sent", s_answer=None)


def unreachable(w: World) -> World:
    """The call ended without an answer: nobody knows whether it was carried out (`on_trouble`)."""
    return w._replace(s_stage="answered", s_answer="unreachable", request="")


def _planned(kit: Kit) -> tuple[Fact, ...]:
    return (*((Fact.DISKS_WANTED,) if kit.setting.disks else ()), Fact.PLANNED, Fact.PAUSE_CAP)


def _start_mirrors(kit: Kit, w: World) -> Iterator[Step]:
    w = w._replace(s_journal=w.s_journal | S_MIRRORS)
    begun = kit.note_source(w, Fact.DISKS_STARTED)
    if destination_alive(w) and w.d_served and source_alive(w) and not w.s_hung:
        yield "source agent starts the mirrors", done(begun._replace(s_mirrors="copying"))
    else:
        yield "source agent cannot start the mirrors", done(kit.note_source(begun, Fact.ERROR))


def _drain(kit: Kit, w: World) -> Iterator[Step]:
    """All of them, in one step: what may come between two of them is a fault before it or behind it."""
    if not source_alive(w) or w.s_hung:
        yield "the source's QEMU does not drain the mirrors", done(w)
    elif w.s_mirrors == "ready" and destination_alive(w) and w.d_served:
        drained = w._replace(s_mirrors="stale" if w.s_run == "running" else "drained")
        yield "source agent drains the mirrors", done(kit.note_source(drained, Fact.DISKS_DRAINED))
    else:
        failed = w._replace(s_mirrors="failed")
        yield "source agent cannot drain the mirrors", done(kit.note_source(failed, Fact.DISK_FAILED))


def _drop(kit: Kit, w: World) -> World:
    if not source_alive(w) or w.s_hung:
        return done(w)
    return done(kit.note_source(w, Fact.DISKS_DROPPED)._replace(s_mirrors=""))


def _start(kit: Kit, w: World) -> Iterator[Step]:
    opens = w.d_listens or (kit.setting.disks and w.d_log > 0 and w.d_word == "setup")
    if w.link and opens and destination_alive(w) and w.s_word == "none" and not w.s_hung:
        w = kit.note_source(w, Fact.STARTED)
        started = w._replace(s_word="setup", d_word="setup", channel="up", d_listens=False)
        yield "source agent tells its QEMU to migrate", hear(kit, done(started))
    elif kit.setting.disks and (not w.link or w.d_log == DOWN):
        yield "source agent cannot ask for the door", done(w._replace(s_answers=False))
    else:
        yield "source agent cannot connect the channel", done(kit.note_source(w, Fact.ERROR))


def _continue(kit: Kit, w: World) -> World:
    if w.s_word != "pre-switchover" or w.s_hung:
        return hear(kit, done(w))
    released = w._replace(s_word="device", lock="off" if w.lock == "off" else "none")
    return done(kit.note_source(released, Fact.CONTINUE)._replace(s_source=Source.SWITCHING.name))


def _commit(kit: Kit, w: World) -> Iterator[Step]:
    journal = w.s_journal if kit.breaks("committed before it is said") else w.s_journal | S_COMMITTED
    yield "source agent commits", done(kit.note_source(w._replace(s_journal=journal), Fact.COMMITTED))
    if kit.may_fail(w, "journal"):
        failed = kit.note_source(w._replace(faults=w.faults - 1), Fact.ERROR)
        yield "fault: the source's journal cannot be written", done(failed)


def _pause_postcopy(w: World) -> World:
    word = "postcopy-paused" if w.s_word in IN_POSTCOPY and not w.s_hung else w.s_word
    return w._replace(s_word=word, channel="cut")


def _bring_back(kit: Kit, w: World) -> World:
    """`rescue.bring_back` after its pause: the proof again, then the stand-in."""
    if w.s_word != "postcopy-paused" or w.s_hung or not kit.source_may(Effect.BRING_BACK, w):
        return hear(kit, done(w))
    brought = kit.note_source(w, Fact.STAND_IN)._replace(
        s_word="completed", s_run="postmigrate", channel="cut", s_cpus_fresh=False
    )
    return hear(kit, done(kit.note_source(brought, Fact.BROUGHT_BACK)))


def _throw_away(kit: Kit, w: World) -> World:
    if w.s_word not in ("failed", "cancelled") or w.s_run != "finish-migrate" or w.s_hung:
        return hear(kit, done(w))
    thrown = kit.note_source(w, Fact.STAND_IN)._replace(s_word="completed", s_run="postmigrate", s_cpus_fresh=False)
    return hear(kit, done(kit.note_source(thrown, Fact.BROUGHT_BACK)))


def _fence(kit: Kit, w: World) -> Iterator[Step]:
    """`way_back.fence`, its question not answered: the locks, if they are free and nothing was written since.

    A guest that ran has written: what did not is a guest of which nothing reached a disk."""
    silent = hear(kit, done(w)._replace(s_answers=False))
    if not source_alive(w) or w.lock not in ("none", "fence") or w.d_ran or kit.setting.owner_paused:
        yield "source agent cannot fence the destination off", silent
        return
    journal = w.s_journal if kit.breaks("a fence is durable before it is used") else w.s_journal | S_FENCED
    held = silent._replace(lock="fence", s_journal=journal)
    number = logs.last_round(w.s_log, Fact.FENCED) + 1
    yield "source agent fences the destination off by its locks", kit.note_source(held, (Fact.FENCED, number))
    if kit.may_fail(w, "journal"):
        yield "fault: the source's journal cannot be written, no fence", silent._replace(faults=w.faults - 1)


def _turn_back(kit: Kit, w: World) -> World:
    """`_turn_back`: durable, and then a fact."""
    if not logs.has(w.s_log, Fact.CONTINUE):
        return w
    if not kit.breaks("turned back before the guest runs"):
        w = w._replace(s_journal=w.s_journal | S_TURNED)
    return kit.note_source(w, Fact.SOURCE_RESUMED)


def _cancel(kit: Kit, w: World) -> World:
    """`_cancel_source`: politely at first; a QEMU that hangs or refuses, or is still at it, loses its channel."""
    polite = not w.s_cancelled_once
    w = _turn_back(kit, w)._replace(s_cancelled_once=True)
    if w.s_hung or not source_alive(w):
        polite = False
    elif w.s_word in CANCELLABLE:
        w = w._replace(s_word="cancelling")
    elif w.s_word == "postcopy-device" or w.s_word in IN_POSTCOPY or w.s_word == "postcopy-paused":
        polite = False
        w = hear(kit, w)
    allowed = kit.breaks("asks again before it cuts") or kit.source_may(Effect.CANCEL_SOURCE, w)
    if not polite and allowed and w.channel == "up":
        w = w._replace(channel="cut", s_hung=False)
    return hear(kit, done(w))


def _resume(kit: Kit, w: World) -> Iterator[Step]:
    """`_resume`: the turning back is durable, a fence is given back, `cont`."""
    if logs.has(w.s_log, Fact.COMMITTED) and not w.s_journal & S_TURNED and kit.may_fail(w, "journal"):
        failed = done(w)._replace(faults=w.faults - 1)
        yield "fault: the source's journal cannot be written, no start", hear(kit, failed)
    turned = _turn_back(kit, w)
    if w.lock == "fence":
        given = turned._replace(lock="none", s_stage="unfenced")
        yield "source agent gives the fence's locks back", given
    else:
        yield from _cont(kit, turned)


def _fence_again(kit: Kit, w: World) -> World:
    """`way_back.fence_again`: `cont` was refused."""
    if w.lock == "none" and not w.d_ran:
        return hear(kit, done(w._replace(lock="fence")))
    return hear(kit, done(kit.note_source(w, (Fact.FENCE_BROKEN, logs.last_round(w.s_log, Fact.FENCED)))))


def _cont(kit: Kit, w: World) -> Iterator[Step]:
    possible = w.s_word in CONT_WORKS and w.s_run in ("paused", "postmigrate", "running") and not w.s_hung
    refused = _fence_again(kit, w) if w.s_stage == "unfenced" else hear(kit, done(w))
    if not possible or w.lock == "dst":
        yield "the source's QEMU refuses cont", refused
        return
    runs = _writes(w)._replace(
        s_run="running", lock="off" if w.lock == "off" else "src", s_cpus="AS_BEFORE", d_stale=True
    )
    yield "source agent starts the guest again", hear(kit, done(runs))
    if w.s_run != "running" and w.lock != "src" and kit.may_fail(w, "storage"):
        yield "fault: storage refuses the source's cont", refused._replace(faults=w.faults - 1)


def _clean_up(kit: Kit, w: World) -> World:
    outcome = kit.source(w).row.outcome
    cut = "cut" if w.channel == "up" else w.channel
    if outcome is Outcome.DESTINATION:
        w = w._replace(s_journal=w.s_journal | S_FORGOTTEN)
    if is_fenced(logs.log_of(w.s_log)):
        w = kit.note_source(w, Fact.ERROR)
    return kit.note_source(w, Fact.CLEANUP)._replace(s_stage="journal", s_result=outcome.value, channel=cut)


# --- what takes longer --------------------------------------------------------------------------------------


def _goes_on(kit: Kit, w: World) -> Iterator[Step]:
    if w.s_stage == "stopped":
        if w.s_word == "active" and not w.s_hung:
            told = kit.note_source(w._replace(s_told_postcopy=True), Fact.POSTCOPY_TOLD)
            yield "source agent tells its QEMU to switch to postcopy", done(told)
        elif w.s_word in ("failed", "cancelled", "active") and w.s_run == "paused" and not kit.setting.owner_paused:
            runs = w._replace(s_run="running", s_cpus=Cpus.AS_BEFORE.name)
            yield "the switch to postcopy is refused, the guest runs on", hear(kit, done(runs))
        else:
            yield "the switch to postcopy is refused", hear(kit, done(w))
    elif w.s_stage == "paused":
        yield "source agent leads its QEMU out of postcopy", _bring_back(kit, w)
    elif w.s_stage == "unfenced":
        yield from _cont(kit, w)
    elif w.s_stage == "forgotten":
        yield "source agent ends its QEMU", done(kit.note_source(quit_qemu(w), Fact.SOURCE_RETIRED, Fact.SOURCE_GONE))


def _writes(w: World) -> World:
    """The source's guest runs: what was equal is not any more."""
    return w._replace(s_mirrors="stale") if w.s_mirrors == "drained" else w


def quit_qemu(w: World) -> World:
    """The source's process is gone; what it held is free."""
    return w._replace(
        s_mirrors=w.s_mirrors if w.s_mirrors in ("drained", "stale") else "",
        s_word="dead", s_run="", s_hung=False, channel="cut" if w.channel == "up" else w.channel,
        lock="none" if w.lock == "src" else w.lock,
    )  # fmt: skip


def _end(kit: Kit, w: World) -> Iterator[Step]:
    yield "source agent journals the end", rests(done(w))
    if kit.may_fail(w, "journal"):
        kept = done(w)._replace(faults=w.faults - 1)
        yield "fault: the source's journal cannot be written at the end", kept._replace(s_stage="unwritten")


def rests(w: World) -> World:
    """What the attempt has read counts no more: it is over, and its result is in the journal."""
    return w._replace(
        s_log=0, s_restored=False,
        s_heard="", s_source="IDLE", s_cpus="UNKNOWN", s_cpus_fresh=False, s_answers=True, s_cancelled_once=False,
        s_tried="", push=None,
    )  # fmt: skip


def _waits(kit: Kit, w: World) -> Iterator[Step]:
    effect = Effect[w.s_doing]
    if effect.name in INTERRUPTIBLE and kit.source(w).row.do is not effect and w.s_stage != "answered":
        late = w.stray or (w.request if w.request not in QUESTIONS else "")
        yield f"source agent gives {effect.value} up", done(w)._replace(request="", stray=late)
    if w.s_stage == "answered" and w.s_answer == "unreachable":
        yield from _calls(kit, w, effect)
    if w.s_stage == "answered" and effect is Effect.FENCE_TARGET and w.s_answer == "unreachable":
        yield from _fence(kit, w)
    elif w.s_stage == "answered":
        yield f"source agent hears the answer to {effect.value}", _answered(kit, w, effect)


def _calls(kit: Kit, w: World, effect: Effect) -> Iterator[Step]:
    """`reconnect.call`: no answer over the link, and the way of the memory may be open all the same. At most one of the
    two QEMUs is given a connection on which the other one is not: its end is seen, and it is tried again."""
    reaches = effect in (Effect.RECONNECT, Effect.FENCE_TARGET) and at_door(w)
    if not reaches or w.s_hung or w.s_word != "postcopy-paused" or kit.source(w).view.source is not Source.BROKEN:
        return
    paused = w._replace(d_word="postcopy-paused", channel="cut" if w.channel == "up" else w.channel)
    heard = hear_target(kit, done(paused), told(kit, w))
    joined = heard._replace(s_word="postcopy-recover", d_word="postcopy-recover", channel="up")
    yield "source agent connects the two beside the agents' link", hear(kit, joined)
    yield "the word that the connection is taken is lost", hear(kit, done(paused)._replace(s_answers=False))


def _answered(kit: Kit, w: World, effect: Effect) -> World:
    answer = w.s_answer
    w = done(w)
    if isinstance(answer, Told):
        w = hear_target(kit, w, answer)
        if effect is Effect.MAKE_SURE:
            w = kit.note_source(w, Fact.TARGET_READY)
        if effect is Effect.SEND_GRANT:
            w = kit.note_source(w, Fact.GRANT_SENT)
        return hear(kit, w) if effect is Effect.RECONNECT else w
    if answer == "offer" and effect is Effect.PREPARE:
        return kit.note_source(w, Fact.PREPARED)
    if answer == "offer" and effect is Effect.RECONNECT:
        return hear(kit, _connect_again(w._replace(s_answers=True)))
    if effect is Effect.PREPARE:
        refused = (Fact.ERROR, Fact.TARGET_GONE) if answer == "refused" else (Fact.ERROR,)
        return kit.note_source(w, *refused)
    if answer == "unreachable" and not kit.breaks("who does not answer may have run it"):
        return hear(kit, w._replace(s_answers=False))
    return hear(kit, w)


def _connect_again(w: World) -> World:
    if w.s_word != "postcopy-paused" or w.d_word != "postcopy-paused" or not w.link or w.s_hung:
        return w
    return w._replace(s_word="postcopy-recover", d_word="postcopy-recover", channel="up")
