"""The death of an agent, and what its successor makes of the journal and of the QEMU (`agent.restore`)."""

from __future__ import annotations

from collections.abc import Iterator

from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.model.destination import killed
from vmferry.model.rules import Kit
from vmferry.model.source import QUESTIONS, hear, quit_qemu
from vmferry.model.world import (
    C_NONE,
    C_SENT,
    D_COMMITTED,
    D_ENDED,
    D_KEPT,
    D_PLACE,
    D_RENOUNCED,
    DOWN,
    S_CANCEL,
    S_COMMITTED,
    S_FENCED,
    S_FORGOTTEN,
    S_LEAVE,
    S_MIRRORS,
    S_PAUSED,
    S_TURNED,
    Setting,
    World,
    destination_alive,
    source_alive,
)

Step = tuple[str, World]

NOT_BEGUN = ("none", "failed", "cancelled", "dead")
GIVEN_AWAY = ("postmigrate", "finish-migrate")


def begins(setting: Setting) -> tuple[Fact, ...]:
    """What an attempt knows at its begin (`SourceAttempt.__init__`)."""
    return (Fact.MIGRATE, Fact.HOLD) if setting.holds else (Fact.MIGRATE,)


def source_dies(w: World) -> World:
    """What only the source's agent knew is gone; its journal and its QEMU stay. An end that was not written is none."""
    result = "" if w.s_stage in ("journal", "unwritten") else w.s_result
    return w._replace(
        s_log=DOWN, s_heard="", s_source="IDLE", s_cpus="UNKNOWN", s_cpus_fresh=False, s_answers=True, s_doing="",
        s_stage="", s_answer=None, s_cancelled_once=False, s_tried="", s_result=result, push=None, request="",
        stray=w.stray or (w.request if w.request not in QUESTIONS else ""), s_restored=False,
        lock="none" if w.lock == "fence" else w.lock,
        cancel="" if w.cancel == "written" else w.cancel,
    )  # fmt: skip


def destination_dies(w: World) -> World:
    """The same for the destination's agent. A `cont` that it wrote is still carried out."""
    waiting = w.s_stage == "served" or (w.s_stage == "answered" and w.s_answer != "unreachable")
    return w._replace(
        d_log=DOWN, d_machine="", d_sees_running=False, d_doing="", d_stage="", d_listens=False, d_unanswered=False,
        push=None, d_cont=w.d_cont if w.d_cont == C_SENT else C_NONE, request="", stray="",
        s_stage="answered" if waiting or w.request else w.s_stage,
        s_answer="unreachable" if waiting or w.request else w.s_answer,
    )  # fmt: skip


def steps(kit: Kit, w: World) -> Iterator[Step]:
    """The agents that are down may come back at any time."""
    if w.s_log == DOWN:
        yield "source agent starts again", _source(kit, w)
    if w.d_log == DOWN and w.d_cont != C_SENT:
        yield "destination agent starts again", _destination(kit, w)


def _source(kit: Kit, w: World) -> World:
    if w.s_result:
        return w._replace(s_log=0)
    if w.s_journal & S_FORGOTTEN:
        # It was retired after the destination ran the guest and had every page: restore ends that very process.
        return quit_qemu(w)._replace(s_log=0, s_result=Outcome.DESTINATION.value)
    alive = source_alive(w)
    w = kit.note_source(w._replace(s_log=0, s_restored=True), *begins(kit.setting))
    if w.s_journal & S_CANCEL:
        w = kit.note_source(w, Fact.CANCEL)
    if w.s_journal & S_LEAVE:
        w = kit.note_source(w, Fact.FINALIZE)
    if w.s_journal & S_PAUSED:
        w = kit.note_source(w, (Fact.PAUSE, 1))
    word = "" if w.s_hung or not alive or w.s_word == "none" else w.s_word
    if word == "completed" and w.s_run not in GIVEN_AWAY:
        word = ""
    known = (Fact.PREPARE, Fact.PAUSE_CAP, Fact.PLANNED, Fact.PREPARED, Fact.CONFIGURED)
    w = kit.note_source(w, *known)
    still_copies = False
    if w.s_journal & S_MIRRORS:
        w = kit.note_source(w, Fact.DISKS_WANTED, Fact.DISKS_STARTED)
        still_copies = alive and word in ("", *NOT_BEGUN) and not w.s_journal & S_COMMITTED
    if not still_copies:
        w = kit.note_source(w, Fact.STARTED)
    if w.s_journal & S_COMMITTED:
        w = kit.note_source(w, Fact.COMMITTED)
        if not kit.breaks("a commit counts as sent after a restart"):
            w = kit.note_source(w, Fact.GRANT_SENT)
        if w.s_journal & S_FENCED:
            w = kit.note_source(w, (Fact.FENCED, 1), Fact.STAND_IN)
    elif alive and word in ("", *NOT_BEGUN) and not w.s_journal & S_TURNED and not still_copies:
        w = kit.note_source(w, Fact.ERROR)
    if w.s_journal & S_TURNED:
        w = kit.note_source(w, Fact.ERROR, Fact.SOURCE_RESUMED)
    if not alive:
        return kit.note_source(w, Fact.SOURCE_GONE)._replace(s_answers=False)
    return hear(kit, w) if word else w._replace(s_heard="", s_source="IDLE")


def _destination(kit: Kit, w: World) -> World:
    journal = w.d_journal
    if not journal & D_PLACE or journal & (D_RENOUNCED | D_ENDED):
        # One that died between the promise and its keeping left a QEMU, which is ended now.
        left = journal & D_RENOUNCED and not journal & D_ENDED and destination_alive(w)
        return (killed(w) if left else w)._replace(d_log=0)
    w = kit.note_destination(w._replace(d_log=0), Fact.PREPARE)
    if kit.setting.disks:
        w = kit.note_destination(w, Fact.DISKS_SERVED)
    alive, kept = destination_alive(w), bool(journal & D_KEPT)
    if kept:
        w = kit.note_destination(w, Fact.COMMITTED, Fact.LOADED, Fact.TARGET_RAN, Fact.RUN_ACKED)
    if alive or kept:
        w = w._replace(d_machine="ok" if alive else "gone")
    if journal & D_COMMITTED:
        w = kit.note_destination(w, Fact.COMMITTED, (Fact.GRANTED, 1))
        if not kept and _may_have_run(kit, w):
            w = kit.note_destination(w, (Fact.START_SENT, 1))
    if not w.d_machine:
        w = kit.note_destination(w, Fact.ERROR)
    return w


def _may_have_run(kit: Kit, w: World) -> bool:
    """`restore._may_have_run`: only a QEMU that lives, answers and has not begun to run says no."""
    if kit.breaks("cont may have been written before a restart"):
        return False
    return not destination_alive(w) or w.d_hung or w.d_run not in ("inmigrate", "paused")
