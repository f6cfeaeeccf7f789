"""The two QEMUs and the stream between them: what they do by themselves, as QEMU 11.1 was seen to do.

Abstractions: memory is one step each for "all passes" and "all pages"; device state is one step; the destination's own
`postcopy-device` is left out; `failing` and `cancelling` last as long as they like; a hung QEMU neither answers nor
goes on. A source that loses its channel after the last page and before the result goes back to the run state that it
had before the switchover. QEMUs before 10.2, which wait for no proof and stay in postcopy-paused there, are not
modelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vmferry.model import destination
from vmferry.model.rules import Kit
from vmferry.model.world import C_DONE, C_NONE, C_REFUSED, C_SENT, World, destination_alive, source_alive

Step = tuple[str, World]

BEFORE_PROOF: Final = ("setup", "active", "pre-switchover", "device", "postcopy-device")
IN_POSTCOPY: Final = ("postcopy-active", "postcopy-recover")
STARTABLE: Final = ("completed", "postcopy-active", "postcopy-paused", "postcopy-recover")


def steps(kit: Kit, w: World) -> Iterator[Step]:
    """Everything that the QEMUs may do next."""
    if w.s_hung or w.d_hung:
        if w.s_hung:
            yield "the source's QEMU answers again", w._replace(s_hung=False)
        if w.d_hung:
            yield "the destination's QEMU answers again", w._replace(d_hung=False)
    yield from _mirrors(kit, w)
    together = w.channel == "up" and not w.s_hung and not w.d_hung and destination_alive(w) and source_alive(w)
    if together:
        yield from _forward(kit, w)
    else:
        yield from _apart(w)
    if not w.s_hung:
        yield from _endings(kit, w)
    if w.d_cont == C_SENT and destination_alive(w) and not w.d_hung:
        yield from _cont(kit, w)


def _mirrors(kit: Kit, w: World) -> Iterator[Step]:
    """The disks are copied, and kept equal, as long as both QEMUs are there."""
    if w.s_mirrors not in ("copying", "ready") or w.s_hung or not source_alive(w):
        return
    if not destination_alive(w) or not w.d_served:
        yield "a mirror loses its destination", w._replace(s_mirrors="failed")
    elif w.s_mirrors == "copying" and not w.d_hung:
        yield "the mirrors are ready", w._replace(s_mirrors="ready")


def _forward(kit: Kit, w: World) -> Iterator[Step]:
    s, d = w.s_word, w.d_word
    if s == "setup" and d == "setup":
        # Nothing follows from seeing it there, so it is seen at once.
        yield "the QEMUs shake hands", destination.look_now(kit, w._replace(s_word="active", d_word="active"))
    elif s == "active" and d == "active" and (kit.setting.mode == "precopy" or w.s_told_postcopy):
        yield (
            "the source stops for the switchover",
            w._replace(s_word="pre-switchover", s_before=w.s_run, s_run="finish-migrate"),
        )
    elif s == "device" and d == "active":
        if w.s_told_postcopy:
            yield "the package leaves the source", w._replace(s_word="postcopy-device")
        else:
            yield "the destination has loaded", _loaded(kit, w, "completed")
    elif s == "postcopy-device" and d == "active":
        yield "the destination has loaded the package", _loaded(kit, w, "postcopy-active")
    elif s == "postcopy-device" and d in ("postcopy-active", "completed"):
        yield "the proof arrives", w._replace(s_word="postcopy-active")
    if s in ("postcopy-device", "postcopy-active") and d == "postcopy-active":
        yield "the last page arrives", w._replace(d_word="completed")
    if s in ("device", "postcopy-active") and d == "completed":
        yield "the result arrives", w._replace(s_word="completed", s_run="postmigrate")
    if s == "postcopy-recover" and d == "postcopy-recover":
        yield "the QEMUs agree on what is missing", w._replace(s_word="postcopy-active", d_word="postcopy-active")


def _loaded(kit: Kit, w: World, word: str) -> World:
    if kit.breaks("started paused"):
        return w._replace(d_word=word, d_run="running", d_ran=True, lock="off" if w.lock == "off" else "dst")
    return w._replace(d_word=word, d_run="paused")


def _apart(w: World) -> Iterator[Step]:
    """The channel is cut, or the other side is dead."""
    lost = w.channel == "cut" or (w.channel == "up" and not (destination_alive(w) and source_alive(w)))
    if not lost:
        return
    if source_alive(w) and not w.s_hung:
        if w.s_word in BEFORE_PROOF:
            yield "the source's QEMU gives up", w._replace(s_word="failing")
        elif w.s_word == "postcopy-active" and w.d_word == "completed":
            yield "the source's QEMU goes back after its last page", w._replace(s_word="failing")
        elif w.s_word in IN_POSTCOPY:
            yield "the source's QEMU pauses", w._replace(s_word="postcopy-paused")
    if destination_alive(w) and not w.d_hung:
        if w.d_word in ("setup", "active") and w.s_word != "none":
            yield "the destination's QEMU gives up", w._replace(d_word="failed")
        elif w.d_word in IN_POSTCOPY:
            yield "the destination's QEMU pauses", w._replace(d_word="postcopy-paused")


def _endings(kit: Kit, w: World) -> Iterator[Step]:
    for going, over in (("failing", "failed"), ("cancelling", "cancelled")):
        if w.s_word != going:
            continue
        cut = w._replace(s_word=over, channel="cut")
        if w.s_run != "finish-migrate":
            yield f"the source's QEMU has {over}", cut
        elif w.lock in ("dst", "fence"):
            yield f"the source's QEMU has {over} and sticks: its disks are locked", cut
        else:
            yield f"the source's QEMU has {over} and goes back", back(cut)
            if w.lock == "none" and kit.may_fail(w, "storage"):
                yield f"fault: the source's QEMU has {over} and its storage refuses", cut._replace(faults=w.faults - 1)


def back(w: World) -> World:
    """The source's guest is put back into the run state that it had."""
    stale = w.d_stale or w.s_before == "running"
    mirrors = "stale" if w.s_mirrors == "drained" and w.s_before == "running" else w.s_mirrors
    return w._replace(s_run=w.s_before, lock="off" if w.lock == "off" else "src", d_stale=stale, s_mirrors=mirrors)


def _cont(kit: Kit, w: World) -> Iterator[Step]:
    """QEMU carries `cont` out; an answer that nobody waits for is not kept."""
    for name, after in _carried_out(kit, w):
        yield name, after if w.d_stage == "cont" else after._replace(d_cont=C_NONE)


def _carried_out(kit: Kit, w: World) -> Iterator[Step]:
    if w.d_word not in STARTABLE or w.d_run == "inmigrate":
        yield "the destination's QEMU refuses cont", w._replace(d_cont=C_REFUSED)
        return
    if w.lock in ("src", "fence"):
        yield "the destination's QEMU refuses cont: the source has the disks", w._replace(d_cont=C_REFUSED)
    else:
        yield (
            "the destination's guest runs",
            w._replace(d_cont=C_DONE, d_run="running", d_ran=True, lock="off" if w.lock == "off" else "dst"),
        )
    if kit.may_fail(w, "storage"):
        less = w._replace(d_cont=C_REFUSED, faults=w.faults - 1)
        yield "fault: storage refuses the destination's cont", less
        if w.lock == "none":
            yield (
                "fault: storage refuses the destination's cont, which keeps a part of the locks",
                less._replace(lock="dst"),
            )
