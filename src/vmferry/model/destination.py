"""The destination's agent: its place, the commands of the source's agent, what it pushes.

As in `agent.destination`, `agent.destination_act` and `agent.peer_commands`: each effect is one branch of one match,
each command one branch of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from vmferry.core.effects import DestinationEffect
from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.core.view import Incoming, Ran
from vmferry.model import logs
from vmferry.model.rules import Kit, incoming_of, place_at_work
from vmferry.model.world import (
    C_DONE,
    C_NONE,
    C_REFUSED,
    C_SENT,
    D_COMMITTED,
    D_DIED,
    D_ENDED,
    D_KEPT,
    D_PLACE,
    D_RAN,
    D_RENOUNCED,
    DOWN,
    Told,
    World,
    destination_alive,
)

Step = tuple[str, World]


def steps(kit: Kit, w: World) -> Iterator[Step]:
    """Everything that the destination's agent may do next, but for what faults make it do."""
    if w.d_log == DOWN:
        return
    if place_at_work(w):
        yield from _looks(kit, w)
        if not w.d_doing:
            for name, decided in decisions(kit, w):
                effect = DestinationEffect[name]
                if kit.destination_may(effect, decided):
                    yield from act(kit, decided, effect)
        elif w.d_stage == "due":
            effect = DestinationEffect[w.d_doing]
            if kit.destination_may(effect, w):
                yield from act(kit, w, effect)
            else:
                yield f"destination agent drops {effect.value}: its guard says no", done(w)
        else:
            yield from _goes_on(kit, w)
        yield from _asks_source(kit, w)
    yield from _answers(kit, w)


def done(w: World) -> World:
    """The effect under way is over."""
    return w._replace(d_doing="", d_stage="")


def decisions(kit: Kit, w: World) -> Iterator[tuple[str, World]]:
    """The effects that the destination's agent may decide on now, and the world in which each is due."""
    for name in kit.destination(w).due:
        if name == "REPORT_RAN" and logs.has(w.d_log, Fact.RUN_ACKED) and not logs.has(w.d_log, Fact.ALL_SENT):
            continue  # said already, and pages are still missing: the real one does nothing either
        yield name, w._replace(d_doing=name, d_stage="due")


def over(w: World) -> World:
    """The place has ended: what it says from now on is in its journal."""
    return done(w)._replace(
        d_log=0, d_machine="", d_sees_running=False, d_listens=False, d_unanswered=False, d_cont=C_NONE
    )


# --- looking ------------------------------------------------------------------------------------------------


def _looks(kit: Kit, w: World) -> Iterator[Step]:
    if not w.d_machine:
        return
    if not destination_alive(w):
        if w.d_machine != "gone":
            yield "destination agent learns that its QEMU is gone", _see_exit(kit, w)
        return
    if w.d_hung:
        if w.d_machine != "silent":
            yield "destination agent gets no answer from its QEMU", w._replace(d_machine="silent")
        return
    if w.d_listens and logs.has(w.d_log, Fact.LISTENING):
        missed = kit.note_destination(w._replace(d_listens=False), Fact.ERROR)
        yield "nobody connects to the destination in time", missed
    if w.d_cont == C_SENT:
        return  # QEMU answers one after another: what was written before is carried out first
    seen = look(kit, w)
    if seen != w:
        yield f"destination agent sees {w.d_word}, {w.d_run}", seen


def _see_exit(kit: Kit, w: World) -> World:
    if not logs.has(w.d_log, Fact.TARGET_RAN):
        w = kit.note_destination(w, Fact.ERROR)
    return w._replace(d_machine="gone", d_cont=C_NONE)


def look(kit: Kit, w: World) -> World:
    """`DestinationAttempt._ask`: the word, the run state, and what both prove."""
    findings = kit.rules.destination_findings(w.d_word, w.d_run, logs.log_of(w.d_log))
    w = kit.note_destination(w, *((fact, number) if number else fact for fact, number, _ in findings))
    if w.d_unanswered and w.d_run == "paused":
        # `_note_late_answer`: what was written before this question has been carried out.
        w = kit.note_destination(w, (Fact.START_REFUSED, max(1, logs.last_round(w.d_log, Fact.START_SENT))))
    if w.d_word == "failed":
        w = kit.note_destination(w, Fact.ERROR)
    unanswered = w.d_unanswered and w.d_run != "paused"
    return w._replace(d_machine="ok", d_sees_running=w.d_run == "running", d_unanswered=unanswered)


def look_now(kit: Kit, w: World) -> World:
    """The same, where an agent is there to look and nothing hinders it."""
    return look(kit, w) if place_at_work(w) and w.d_machine == "ok" and not w.d_hung else w


# --- acting -------------------------------------------------------------------------------------------------


def act(kit: Kit, w: World, effect: DestinationEffect) -> Iterator[Step]:
    """The first part of an effect whose guard has just said yes."""
    match effect:
        case DestinationEffect.SPAWN:
            disks = kit.setting.disks
            there = w._replace(d_word="setup", d_machine="ok", d_listens=not disks, d_served=disks)
            noted = kit.note_destination(there, *((Fact.DISKS_SERVED,) if disks else ()), Fact.LISTENING)
            yield "destination agent starts a paused QEMU", done(noted)
            if kit.may_fail(w, "start"):
                failed = kit.note_destination(w._replace(faults=w.faults - 1), Fact.ERROR)
                yield "fault: the destination's QEMU cannot be started", done(failed)
        case DestinationEffect.CLOSE_EXPORTS:
            if destination_alive(w) and not w.d_hung:
                closed = kit.note_destination(w._replace(d_served=False), Fact.DISKS_CLOSED)
                yield "destination agent closes the exports", done(closed)
            else:
                yield "the destination's QEMU does not close its exports", done(w)
        case DestinationEffect.START_CPUS:
            if kit.setting.owner_paused:
                # Taken over as it is: its owner starts it. From here on it counts as having run here.
                if not destination_alive(w) or w.d_hung:
                    yield "destination agent cannot take the paused guest over", done(w)
                    return
                taken = kit.note_destination(w._replace(d_ran=True), Fact.TARGET_RAN)
                yield "destination agent takes the paused guest over", done(taken)
                return
            tries = logs.last_round(w.d_log, Fact.START_SENT) + 1
            if not kit.breaks("cont counts before it is written"):
                w = kit.note_destination(w, (Fact.START_SENT, tries))
            yield "destination agent writes cont", w._replace(d_cont=C_SENT, d_stage="cont")
        case DestinationEffect.REPORT_RAN:
            yield from _report_ran(kit, w)
        case DestinationEffect.RENOUNCE:
            said = not kit.breaks("renounced before it is killed")
            journal = w.d_journal | (D_RENOUNCED if said else 0)
            yield "destination agent journals that it renounces", w._replace(d_stage="renounced", d_journal=journal)
        case DestinationEffect.FREEZE | DestinationEffect.THAW:
            # The policy of these explorations is to run; a guest that is frozen runs, as far as the tables can tell.
            yield f"destination agent carries out {effect.value}", done(w)
        case DestinationEffect.REPORT_DIED:
            died = kit.note_destination(w, Fact.TARGET_DIED, Fact.CLEANUP)
            ended = died._replace(d_journal=died.d_journal | D_ENDED | D_DIED)
            yield "destination agent writes down that the guest died here", over(ended)
        case _:
            assert_never(effect)


def killed(w: World) -> World:
    """The destination's process is gone; what it held is free."""
    word = w.d_word if w.d_word == "absent" else "dead"
    return w._replace(
        d_word=word, d_run="inmigrate", d_hung=False, channel="cut" if w.channel == "up" else w.channel,
        lock="none" if w.lock == "dst" else w.lock, d_cont=C_NONE, d_served=False,
    )  # fmt: skip


def _report_ran(kit: Kit, w: World) -> Iterator[Step]:
    journal = w.d_journal
    if not logs.has(w.d_log, Fact.RUN_ACKED):
        journal |= 0 if kit.breaks("kept before it is said") else D_KEPT
        w = kit.note_destination(w, Fact.RUN_ACKED)
    if logs.has(w.d_log, Fact.ALL_SENT):
        w = kit.note_destination(w, Fact.CLEANUP)
        journal |= D_ENDED | D_RAN
        yield "destination agent keeps the guest, which is whole", over(w._replace(d_journal=journal))
    else:
        yield "destination agent keeps the guest", done(w._replace(d_journal=journal))


def _goes_on(kit: Kit, w: World) -> Iterator[Step]:
    tries = max(1, logs.last_round(w.d_log, Fact.START_SENT))
    if w.d_stage == "cont" and w.d_cont == C_DONE:
        yield (
            "destination agent sees that cont worked",
            done(kit.note_destination(w, Fact.TARGET_RAN)._replace(d_cont=C_NONE)),
        )
    elif w.d_stage == "cont" and w.d_cont == C_REFUSED:
        refused = kit.note_destination(w, (Fact.START_REFUSED, tries))
        yield "destination agent sees that cont was refused", done(refused._replace(d_cont=C_NONE))
    elif w.d_stage == "cont" and not destination_alive(w):
        yield "destination agent's cont ends with its QEMU", done(w._replace(d_cont=C_NONE))
    elif w.d_stage == "renounced":
        yield "destination agent kills its QEMU", killed(w)._replace(d_stage="killed")
    elif w.d_stage == "killed":
        gone = kit.note_destination(w, Fact.TARGET_GONE, Fact.CLEANUP)
        journal = w.d_journal | D_ENDED | (0 if kit.breaks("renounced before it is said") else D_RENOUNCED)
        yield "destination agent renounces for good", over(gone._replace(d_journal=journal))


def _asks_source(kit: Kit, w: World) -> Iterator[Step]:
    """A place that waits in vain asks whether it is wanted; only a clear no ends it, and none once it may have run."""
    if not w.link or w.s_log == DOWN or logs.has(w.d_log, Fact.RELEASE) or kit.destination(w).view.ran is not Ran.NO:
        return
    # What knows that nothing ever came to it gives way to a job that is over in any way (`_nothing_came`).
    nothing_came = w.d_word == "setup" and w.channel == "none" and w.d_machine == "ok" and not w.d_hung
    is_over = w.s_result == Outcome.SOURCE.value or (w.s_result == Outcome.LOST.value and nothing_came)
    if is_over and not w.request:
        yield "the destination's place is not wanted any more", kit.note_destination(w, Fact.RELEASE)


# --- what it says -------------------------------------------------------------------------------------------


def told(kit: Kit, w: World) -> Told:
    """`facts_wire`, or what the journal says of a place that is over."""
    if w.d_log == 0:
        ran = bool(w.d_journal & D_RAN)
        return Told(ran, ran, ran, False, 0, bool(w.d_journal & D_RENOUNCED), bool(w.d_journal & D_DIED))
    log = w.d_log
    acked, ran = logs.has(log, Fact.RUN_ACKED), kit.destination(w).view.ran
    if kit.breaks("kept before it is said") and logs.has(log, Fact.TARGET_RAN):
        acked = True
    return Told(
        loaded=logs.has(log, Fact.LOADED),
        whole=logs.has(log, Fact.ALL_SENT) and logs.has(log, Fact.LOADED),
        ran=acked,
        in_doubt=(ran is Ran.UNKNOWN or (ran is Ran.YES and not acked)) and not kit.breaks("says that it is in doubt"),
        refused=logs.last_round(log, Fact.START_REFUSED),
        gone=logs.has(log, Fact.TARGET_GONE),
        died=logs.has(log, Fact.TARGET_DIED),
    )


def _answers(kit: Kit, w: World) -> Iterator[Step]:
    """The command of the source's agent that it is at is answered; how long it waits before that is open."""
    if w.s_stage != "served" or not w.link:
        return
    log = w.d_log
    if w.s_doing == "PREPARE":
        if log == 0 or logs.has(log, Fact.TARGET_GONE):
            yield "destination agent refuses the place", w._replace(s_stage="answered", s_answer="refused")
        elif logs.has(log, Fact.LISTENING):
            yield "destination agent offers the place", w._replace(s_stage="answered", s_answer="offer")
        return
    yield "destination agent answers", answer(w, told(kit, w))


def answer(w: World, said: Told | str) -> World:
    """An answer goes out; what was pushed before it has arrived before it, and says nothing more than it."""
    return w._replace(s_stage="answered", s_answer=said, push=None if isinstance(said, Told) else w.push)


def serve(kit: Kit, w: World, kind: str, *, awaited: bool) -> World:
    """A command has arrived. `awaited`: somebody waits for the answer."""
    after = w._replace(s_stage="served") if awaited else w
    if not w.d_journal & D_PLACE:
        return _without_place(kit, after, kind, awaited=awaited)
    if kind == "reconnect":
        return _reconnect(kit, after, awaited=awaited)
    if w.d_log == 0 or kind in ("prepare", "ready", "target"):
        if kind == "prepare" and awaited and w.d_log == 0:
            return after._replace(s_stage="answered", s_answer="refused")
        asked = awaited and kind in ("ready", "target")
        # A question is answered at once: until then nothing of it is to be seen.
        return answer(after, told(kit, w)) if asked or (awaited and w.d_log == 0) else after
    if kind == "grant":
        return _grant(kit, after)
    if kind == "release-gone" and not w.d_hung and destination_alive(w) and w.d_cont == C_NONE:
        after = look(kit, after)  # it is given the time to say that it has loaded
    unsure = logs.has(after.d_log, Fact.LOADED) or incoming_of(after) is Incoming.UNKNOWN
    if kind == "release-gone" and unsure:
        return after
    if not logs.has(w.d_log, Fact.TARGET_RAN):
        return kit.note_destination(after, Fact.RELEASE)
    return after


def _without_place(kit: Kit, w: World, kind: str, *, awaited: bool) -> World:
    if kind == "prepare":
        return kit.note_destination(w._replace(d_journal=D_PLACE), Fact.PREPARE)
    if kind == "reconnect":
        return w._replace(s_stage="answered", s_answer="error") if awaited else w
    if awaited and logs.has(w.s_log, Fact.GRANT_SENT):
        return w._replace(s_stage="answered", s_answer="unreachable")
    return w._replace(d_journal=D_PLACE | D_RENOUNCED)  # nothing of it ever was here, and nothing ever will


def _reconnect(kit: Kit, w: World, *, awaited: bool) -> World:
    """`destination_act.reconnect`. Who is refused asks at once what is so (`peer-target`)."""
    ready = w.d_log > 0 and destination_alive(w) and not w.d_hung and not logs.has(w.d_log, Fact.CLEANUP)
    if not ready or w.d_word not in ("postcopy-active", "postcopy-recover", "postcopy-paused"):
        return answer(w, told(kit, w)) if awaited else w
    paused = w._replace(d_word="postcopy-paused", channel="cut" if w.channel == "up" else w.channel)
    return paused._replace(s_stage="answered", s_answer="offer") if awaited else paused


def at_door(w: World) -> bool:
    """`standing._needs_door`, and the QEMU behind it answers."""
    if w.d_log <= 0 or not destination_alive(w) or w.d_hung:
        return False
    over = (Fact.RELEASE, Fact.TARGET_GONE, Fact.ALL_SENT, Fact.CLEANUP)
    is_open = logs.has(w.d_log, Fact.PACKAGE_LOADED) and logs.has(w.d_log, Fact.LOADED)
    is_there = is_open and not any(logs.has(w.d_log, fact) for fact in over)
    return is_there and w.d_word in ("postcopy-active", "postcopy-recover", "postcopy-paused")


def _grant(kit: Kit, w: World) -> World:
    """`DestinationAttempt.grant`: durable before anything follows from it."""
    refuses = logs.has(w.d_log, Fact.RELEASE) or logs.has(w.d_log, Fact.TARGET_GONE)
    if refuses and not kit.breaks("no order after a release"):
        return w
    journal = w.d_journal if kit.breaks("a grant is durable before it is used") else w.d_journal | D_COMMITTED
    w = kit.note_destination(w._replace(d_journal=journal), Fact.COMMITTED)
    orders = logs.last_round(w.d_log, Fact.GRANTED)
    if orders <= logs.last_round(w.d_log, Fact.START_REFUSED) or kit.breaks("the same order twice is one order"):
        w = kit.note_destination(w, (Fact.GRANTED, orders + 1))
    return w
