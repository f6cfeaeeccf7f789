"""The source's agent: when it looks, hears, decides and acts.

Each effect is one branch of one match, as in `agent.source_act`: what it does to the world and which facts it notes,
in which order. An effect that waits for something is taken apart where the real one awaits: decided (`due`), then the
guard again and the first part, then its call or its next part. Anything may happen between two parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, assert_never

from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.view import Cpus, Source, cpus_from, source_word
from vmferry.model import logs
from vmferry.model.qemu import IN_POSTCOPY
from vmferry.model.rules import Kit, source_at_work
from vmferry.model.world import S_COMMITTED, S_FORGOTTEN, Told, World, destination_alive, source_alive

Step = tuple[str, World]

INTERRUPTIBLE: Final = frozenset({"PREPARE", "MAKE_SURE", "ASK_TARGET", "RECONNECT"})
"""Of the effects that wait for a call here: those that end half-way when the table asks for something else."""
QUESTIONS: Final = frozenset({"ready", "target"})
"""Calls that change nothing there and are answered at once: it does not matter when a late one arrives."""
RUN_STATE_MATTERS: Final = frozenset({"BACK", "DONE", "IDLE", "ENDING"})
CANCELLABLE: Final = frozenset({"setup", "active", "pre-switchover", "device", "failing"})
CONT_WORKS: Final = frozenset({"none", "setup", "active", "failed", "cancelled", "completed"})


def steps(kit: Kit, w: World) -> Iterator[Step]:
    """Everything that the source's agent may do next, but for what faults and people make it do."""
    if not source_at_work(w):
        if w.s_stage == "journal":
            yield from _end(kit, w)
        return
    yield from _looks(kit, w)
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
    choice = kit.source(w)
    row = choice.row
    tried = row.label if row.limit_ms is not None and row.do is not None else ""
    for name in choice.due:
        if not _is_premature(w, name):
            decided = w._replace(s_doing=name, s_stage="due", s_tried=tried)
            yield f"source agent decides {Effect[name].value}", decided
    if row.do is None or w.s_tried == row.label:
        for name in choice.late:
            decided = w._replace(s_doing=name, s_stage="due", s_tried="")
            yield f"source agent decides {Effect[name].value}: {row.label} has lasted too long", decided


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
    if cpus_matter(w) and not w.s_cpus_fresh:
        yield f"source agent sees run state {w.s_run}", see_cpus(kit, w)


def hear(kit: Kit, w: World) -> World:
    """`SourceAttempt.hear_word` with what QEMU says now."""
    if not logs.has(w.s_log, Fact.STARTED) or w.s_hung or not source_alive(w):
        return w
    word = w.s_word
    if word == w.s_heard:
        return w._replace(s_source=source_word(word).name)
    if word in ("failed", "cancelled") and w.s_run == "running":
        w = w._replace(s_cpus=Cpus.AS_BEFORE.name)  # RESUME comes before that word
    proof = not (kit.breaks("waits for the proof") and word == "postcopy-device")
    findings = kit.rules.source_findings(word if proof else "postcopy-active", logs.log_of(w.s_log), has_proof=True)
    w = kit.note_source(w, *((fact, number) if number else fact for fact, number, _ in findings))
    return w._replace(s_heard=word, s_source=source_word(word).name, s_cpus_fresh=False)


def cpus_matter(w: World) -> bool:
    """`SourceAttempt._cpus_matter`."""
    source = w.s_source
    if logs.has(w.s_log, Fact.SOURCE_GONE):
        return False
    if logs.has(w.s_log, Fact.ALL_SENT) and source == "BROKEN":
        source = "DONE"
    turned = (Fact.ERROR, Fact.CANCEL, Fact.TARGET_GONE)
    return source in RUN_STATE_MATTERS and any(logs.has(w.s_log, fact) for fact in turned)


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
    if told.died:
        w = kit.note_source(w, Fact.TARGET_DIED)
    if told.gone:
        w = kit.note_source(w, Fact.TARGET_GONE)
    return w


# --- acting -------------------------------------------------------------------------------------------------


def act(kit: Kit, w: World, effect: Effect) -> Iterator[Step]:
    """The first part of an effect whose guard has just said yes."""
    name = effect.value
    match effect:
        case Effect.CHECK_PLAN:
            yield "source agent plans", done(kit.note_source(w, Fact.PLANNED, Fact.PAUSE_CAP))
        case Effect.PREPARE:
            yield "source agent asks for a place", call(kit.note_source(w, Fact.PREPARE), "prepare")
        case Effect.CONFIGURE:
            yield "source agent configures its QEMU", done(kit.note_source(w, Fact.CONFIGURED))
        case Effect.START:
            yield from _start(kit, w)
        case Effect.START_POSTCOPY:
            stops = w.s_run == "running" and not kit.breaks("stopped before postcopy")
            told = w._replace(s_run="paused" if stops else w.s_run, s_stage="stopped")
            yield "source agent stops the guest for postcopy", told
        case Effect.LET_PAGES_GO:
            yield "source agent lets the pages go", done(kit.note_source(w, Fact.PACED))
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
            brought = w._replace(s_word="completed", s_run="postmigrate", channel="cut", s_cpus_fresh=False)
            yield (
                "source agent leads its QEMU out of postcopy",
                hear(kit, done(kit.note_source(brought, Fact.BROUGHT_BACK))),
            )
        case Effect.THROW_AWAY:
            brought = w._replace(s_word="completed", s_run="postmigrate", s_cpus_fresh=False)
            yield (
                "source agent leads its QEMU out of finish-migrate",
                hear(kit, done(kit.note_source(brought, Fact.BROUGHT_BACK))),
            )
        case Effect.FENCE_TARGET:
            yield "source agent asks the silent destination once more", call(w, "target")
        case Effect.STOP_SOURCE:
            stopped = w._replace(s_run="paused" if w.s_run == "running" else w.s_run, s_cpus_fresh=False)
            yield "source agent stops the guest", hear(kit, done(stopped))
        case Effect.RETIRE_SOURCE:
            forgotten = w._replace(s_journal=w.s_journal | S_FORGOTTEN, s_stage="forgotten")
            yield "source agent journals that the guest is given away", forgotten
        case Effect.NOTE_TARGET_LOST | Effect.NOTE_TIMEOUT | Effect.NOTE_QEMU_ERROR:
            yield f"source agent carries out {name}", done(kit.note_source(w, Fact.ERROR))
        case Effect.CLEAN_UP:
            if w.s_word not in ("failing", "cancelling"):
                yield "source agent cleans up", _clean_up(kit, w)
        case _:
            assert_never(effect)


def call(w: World, kind: str) -> World:
    """A call goes out; without a link it fails at once."""
    if not w.link:
        return unreachable(w)
    return w._replace(request=kind, s_stage="sent", s_answer=None)


def unreachable(w: World) -> World:
    """The call ended without an answer: nobody knows whether it was carried out (`on_trouble`)."""
    return w._replace(s_stage="answered", s_answer="unreachable", request="")


def _start(kit: Kit, w: World) -> Iterator[Step]:
    if w.link and w.d_listens and destination_alive(w) and w.s_word == "none" and not w.s_hung:
        w = kit.note_source(w, Fact.STARTED)
        started = w._replace(s_word="setup", d_word="setup", channel="up", d_listens=False)
        yield "source agent tells its QEMU to migrate", hear(kit, done(started))
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
    word = "postcopy-paused" if w.s_word in IN_POSTCOPY else w.s_word
    return w._replace(s_word=word, channel="cut")


def _cancel(kit: Kit, w: World) -> World:
    """`_cancel_source`: politely at first; a QEMU that hangs or refuses, or is still at it, loses its channel."""
    polite = not w.s_cancelled_once
    w = w._replace(s_cancelled_once=True)
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
    possible = w.s_word in CONT_WORKS and w.s_run in ("paused", "postmigrate", "running") and not w.s_hung
    if not possible or w.lock == "dst":
        yield "the source's QEMU refuses cont", hear(kit, done(w))
        return
    runs = w._replace(s_run="running", lock="off" if w.lock == "off" else "src", s_cpus="AS_BEFORE", d_stale=True)
    yield "source agent starts the guest again", hear(kit, done(kit.note_source(runs, Fact.SOURCE_RESUMED)))
    if w.s_run != "running" and w.lock != "src" and kit.may_fail(w, "storage"):
        yield "fault: storage refuses the source's cont", hear(kit, done(w._replace(faults=w.faults - 1)))


def _clean_up(kit: Kit, w: World) -> World:
    outcome = kit.source(w).row.outcome.value
    cut = "cut" if w.channel == "up" else w.channel
    return kit.note_source(w, Fact.CLEANUP)._replace(s_stage="journal", s_result=outcome, channel=cut)


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
    elif w.s_stage == "forgotten":
        yield "source agent ends its QEMU", done(kit.note_source(quit_qemu(w), Fact.SOURCE_RETIRED, Fact.SOURCE_GONE))


def quit_qemu(w: World) -> World:
    """The source's process is gone; what it held is free."""
    return w._replace(
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
        s_heard="", s_source="IDLE", s_cpus="UNKNOWN", s_cpus_fresh=False, s_answers=True, s_cancelled_once=False,
        s_tried="", push=None,
    )  # fmt: skip


def _waits(kit: Kit, w: World) -> Iterator[Step]:
    effect = Effect[w.s_doing]
    if effect.name in INTERRUPTIBLE and kit.source(w).row.do is not effect and w.s_stage != "answered":
        late = w.stray or (w.request if w.request not in QUESTIONS else "")
        yield f"source agent gives {effect.value} up", done(w)._replace(request="", stray=late)
    if w.s_stage == "answered":
        yield f"source agent hears the answer to {effect.value}", _answered(kit, w, effect)


def _answered(kit: Kit, w: World, effect: Effect) -> World:
    answer = w.s_answer
    w = done(w)
    if isinstance(answer, Told):
        w = hear_target(kit, w, answer)
        if effect is Effect.MAKE_SURE:
            w = kit.note_source(w, Fact.TARGET_READY)
        if effect is Effect.SEND_GRANT:
            w = kit.note_source(w, Fact.GRANT_SENT)
        return w
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
