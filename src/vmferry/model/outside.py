"""What comes from outside of agents and QEMUs: the network, people, and everything that goes wrong.

Bounds: `World.faults` counts down with every fault, `World.cancels` with every wish to cancel. The link comes back
whenever it likes, and so does an agent or a QEMU that hangs. At most one call that nobody waits for any more (`stray`)
and one push are on their way; both may arrive at any later time, or be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from vmferry.core.facts import Fact, FactLog, wants_pause
from vmferry.core.table import Remedy
from vmferry.core.view import Source, Target
from vmferry.model import destination, logs, restart, source
from vmferry.model.rules import Kit, source_at_work
from vmferry.model.world import (
    C_NONE,
    C_SENT,
    D_COMMITTED,
    DOWN,
    S_CANCEL,
    S_LEAVE,
    S_NO_CANCEL,
    S_PAUSED,
    World,
    destination_alive,
    source_alive,
)

Step = tuple[str, World]

CAN_HANG: Final = ("active", "pre-switchover", "device", "postcopy-device", "postcopy-active")


def network(kit: Kit, w: World) -> Iterator[Step]:
    """Messages arrive."""
    if w.request and w.link and w.d_log != DOWN:
        arrived = destination.serve(kit, w._replace(request=""), w.request, awaited=True)
        yield f"{w.request} arrives", arrived
    if w.stray:
        yield f"a late {w.stray} is lost", w._replace(stray="")
        if w.link and w.d_log != DOWN:
            yield f"a late {w.stray} arrives", destination.serve(kit, w._replace(stray=""), w.stray, awaited=False)
    if w.push is not None and source_at_work(w):
        yield "a push arrives", source.hear_target(kit, w._replace(push=None), w.push)
    if not w.link:
        yield "the link comes back", w._replace(link=True)
        if w.s_stage in ("sent", "served") or (w.s_stage == "answered" and w.s_answer != "unreachable"):
            yield "the call ends without an answer", source.unreachable(w)


def pushed(kit: Kit, w: World) -> World:
    """Something is new at the destination: its agent pushes it at once (`DestinationAttempt.on_facts`), behind what it
    pushed before. What tells the source nothing is left out."""
    if not w.link or not source_at_work(w):
        return w
    said, problems = destination.told(kit, w), len(kit.problems)
    is_news = w.push is not None or source.hear_target(kit, w, said) != w
    del kit.problems[problems:]
    return w._replace(push=said) if is_news else w


def people(kit: Kit, w: World) -> Iterator[Step]:
    """A cancel is asked for; a rescue tool that a row names is used; the policy switches to postcopy."""
    if not source_at_work(w):
        return
    log = logs.log_of(w.s_log)
    if w.cancels and not w.cancel and Fact.CANCEL not in log:
        asked = w._replace(cancels=w.cancels - 1)
        if _may_cancel(kit, w):
            if kit.breaks("a cancel is written before it counts"):
                yield "person: cancels", kit.note_source(asked, Fact.CANCEL)._replace(cancel="accepted")
            else:
                yield "person: cancels", asked._replace(cancel="written", s_journal=w.s_journal | S_CANCEL)
    if w.cancel == "written":
        if _may_cancel(kit, w) or kit.breaks("a cancel is asked about twice"):
            yield "the cancel is accepted", kit.note_source(w, Fact.CANCEL)._replace(cancel="accepted")
        else:
            journal = w.s_journal & ~S_CANCEL | S_NO_CANCEL
            yield "the cancel is refused: too late", w._replace(cancel="", s_journal=journal)
    if kit.setting.mode == "postcopy" and w.s_source == "BUSY" and Fact.START_POSTCOPY not in log:
        yield "policy: the switch to postcopy", kit.note_source(w, Fact.START_POSTCOPY)
    yield from _jobs(kit, w, log)
    if kit.source(w).row.remedy is Remedy.FEED and not w.s_doing:
        yield from _feed(kit, w)


def _jobs(kit: Kit, w: World, log: FactLog) -> Iterator[Step]:
    """`job-finalize`, `job-pause` and `job-resume`: journalled, then facts."""
    if kit.setting.holds and Fact.FINALIZE not in log and w.s_source == "WAITING":
        given = w._replace(s_journal=w.s_journal | S_LEAVE)
        yield "person: gives leave", kit.note_source(given, Fact.FINALIZE)
    number = log.last_round(Fact.PAUSE)
    if wants_pause(log):
        resumed = w._replace(s_journal=w.s_journal & ~S_PAUSED)
        yield "person: resumes", kit.note_source(resumed, (Fact.PAUSE_OVER, number))
    elif w.pauses and w.s_source in ("POSTCOPY", "BROKEN"):
        paused = w._replace(s_journal=w.s_journal | S_PAUSED, pauses=w.pauses - 1)
        yield "person: pauses", kit.note_source(paused, (Fact.PAUSE, number + 1))


def _may_cancel(kit: Kit, w: World) -> bool:
    """`SourceAttempt.want_cancel`."""
    was_refused = kit.source(w).view.target is Target.REFUSED
    return kit.rules.cancel_refusal(logs.log_of(w.s_log), was_refused=was_refused) is None


def _feed(kit: Kit, w: World) -> Iterator[Step]:
    """`vmferry recover NAME` where the row's remedy is to feed the destination, and its tool would work."""
    view = kit.source(w).view
    waits = (Target.RAN, Target.LOADED, Target.REFUSED) if view.source is Source.GONE else (Target.RAN,)
    unserved = view.source in (Source.BACK, Source.ENDING, Source.BROKEN, Source.SILENT, Source.GONE)
    if view.target in waits and unserved and w.d_word == "postcopy-paused" and w.link and w.d_log > 0:
        yield "person: vmferry recover", source.arrived(kit, w._replace(d_word="completed", channel="cut"))


def faults(kit: Kit, w: World) -> Iterator[Step]:
    """Everything that may go wrong now, one fault each."""
    if w.faults:
        less = w._replace(faults=w.faults - 1)
        for kind, body in KINDS.items():
            if body is not None and kit.setting.allows(kind):
                for name, after in body(less):
                    yield f"fault: {name}", after


def _crashes(w: World) -> Iterator[Step]:
    if w.s_log not in (DOWN, 0) or w.s_stage == "unwritten":
        yield "the source's agent dies", restart.source_dies(w)
    if w.d_log not in (DOWN, 0):
        yield "the destination's agent dies", restart.destination_dies(w)
    if source_alive(w):
        yield "the source's QEMU dies", source.quit_qemu(w)
        if w.s_log != DOWN:
            yield "the source's host fails and starts again", restart.source_dies(source.quit_qemu(w))
    if destination_alive(w):
        yield "the destination's QEMU dies", destination.killed(w)
        if w.d_log != DOWN:
            yield "the destination's host fails and starts again", restart.destination_dies(destination.killed(w))


def _stream(w: World) -> Iterator[Step]:
    if w.s_mirrors in ("copying", "ready"):
        yield "a mirror fails", w._replace(s_mirrors="failed")
    if w.channel == "up":
        yield "the stream is cut", w._replace(channel="cut")
        if w.d_word == "active" and w.s_word in ("active", "device", "postcopy-device"):
            yield "the destination cannot load", w._replace(d_word="failed")


def _hangs(w: World) -> Iterator[Step]:
    if source_alive(w) and w.s_word in CAN_HANG and w.channel == "up" and not w.s_hung:
        yield "the source's QEMU hangs", w._replace(s_hung=True)
    if destination_alive(w) and w.d_log not in (DOWN, 0) and not w.d_hung:
        yield "the destination's QEMU hangs", w._replace(d_hung=True)
    if w.d_stage == "cont" and w.d_cont:
        # A cont that is still to be carried out is carried out later; an answer that comes too late is not read.
        late = w.d_cont if w.d_cont == C_SENT else C_NONE
        unheard = destination.done(w)._replace(d_cont=late, d_machine="silent", d_unanswered=True)
        yield "the answer to cont is not awaited long enough", unheard


def _network(w: World) -> Iterator[Step]:
    if w.link:
        yield "the link of the agents is down", w._replace(link=False, push=None)
    if w.s_stage in ("sent", "served"):
        yield "the call is not answered in time", source.unreachable(w)
    if w.s_stage == "sent" and w.request and w.request not in source.QUESTIONS and not w.stray:
        yield "the call is late", source.unreachable(w)._replace(stray=w.request)
        yield "the call comes twice", w._replace(stray=w.request)


KINDS: Final[dict[str, Callable[[World], Iterator[Step]] | None]] = {
    "crash": _crashes,
    "stream": _stream,
    "hang": _hangs,
    "network": _network,
    "storage": None,
    "journal": None,
    "start": None,
}
"""Kinds of faults. Those without a function happen where a step is taken: a refused `cont`, a full disk, a QEMU that
does not start."""


def stale_grant(kit: Kit, w: World) -> Iterator[Step]:
    """An order of an older attempt arrives: its generation is not this place's, so it is refused."""
    mistaken = kit.breaks("an order carries its generation") and not w.d_journal & D_COMMITTED
    if mistaken and w.faults and w.link and w.d_log > 0:
        accepted = destination.serve(kit, w._replace(faults=w.faults - 1), "grant", awaited=False)
        yield "fault: an old grant arrives", accepted
