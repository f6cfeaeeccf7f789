"""What real QEMUs do to guests while they migrate, and how vmferry keeps the guests whole. Pure.

Writes that are lost, under TCG only
------------------------------------
Under KVM the kernel logs every write. Under TCG, QEMU's own translated code has to report the first write to each
page after the page was sent, and QEMU forgets that in two cases; a write that is not reported is lost, and the
guest goes on with an older content of that page.

1. Before 9.0: after a step over the dirty bitmap of an aligned block. Seen as 1 of 15 precopies from 7.2 with a
   damaged Linux guest; none of 660 when the memory is no multiple of 256 KiB, which makes QEMU go page by page.
   Mended upstream by "physmem: Fix migration dirty bitmap coherency with TCG memory access".
2. Since then: in a pass over the bitmap that finds nothing new. With postcopy-ram on, QEMU makes such passes all the
   time before the switch: 16 to 38 % of postcopies from 11.1 arrived with 1 to 11 pages of older content (pages
   compared on both sides, the destination never started). None of 160 precopies without postcopy-ram, and none of
   205 postcopies whose guest was stopped before the first page left: then there is no write to lose.

So a TCG guest on QEMU 9.0 or newer moves in precopy without postcopy-ram, or, when postcopy was asked for by name,
is stopped first and switched over at once. No version is known that mends the second case.

A guest that runs twice, since 10.2
-----------------------------------
A source that loses its channel after its last page of a postcopy and before the destination's result calls that a
failure since 10.2, and puts its guest back into the run state that it had before the switchover. The destination runs
the guest by then. A guest that was running would run twice, unless a lock on its disks is refused. So it is stopped by
us in the moment of the switch, before QEMU does it: what QEMU goes back to is then a paused guest. Until 10.1 the
source stays in postcopy-paused.

A source that waits for ever, before 8.2
----------------------------------------
A source that loses its channel after its last page of a postcopy and before the destination's result stays in
postcopy-active for good: the thread that listens waits for a recovery, the one that sends for the thread that listens,
and migrate-pause, cancel and yank reach neither. Seen with 7.2 as 3 of 8 destinations that were ended in that moment.
So no destination of such a source is ended by us before it is sure that pages are left: the source is made slow first.

A recovery that breaks off, before 8.2
--------------------------------------
A destination whose channel breaks while it is in postcopy-recover takes that for a pause that is over, reads from a
connection that it has closed, and dies (SIGSEGV; seen with 7.2 each time) with the guest, which ran there. A source in
the same place waits for ever (7.2; since 8.0 it pauses again). So a destination gets no connection before the source's
QEMU speaks on it; what is left is a break within the handshake of the two, which takes milliseconds.

A destination that refuses to run, all versions
-----------------------------------------------
A destination that goes from POSTCOPY_ADVISE to POSTCOPY_LISTEN without a discard in between prepares for discards when
it listens, which takes it out of the state that POSTCOPY_RUN needs: it fails, and the guest stays at the source. That
happens when nothing is dirty at the switch, so with guests that stand still (1 of 20 with 11.1 on a busy host, when the
switch was asked for some milliseconds after the start; 1 of 5 small ones when in the same breath). It is asked for
together with the start, and until it is heard the memory goes slowly.

A guest that hangs after its background snapshot broke, before 11.1
-------------------------------------------------------------------
A QEMU that saves its guest in the background protects its memory from writes, and lifts that page by page. When the
channel breaks, 7.2 says `failed` and `running`, and the guest stands for ever at its next write to a page that is still
protected (at the first try; a next background snapshot is refused, as the memory is not let go of). 11.1 lifts it all
(none of 6). What is in between was not tried. 7.2 also starts a guest that was paused, as soon as its devices are
saved. So a background snapshot is taken only from 11.1 on, and only of a guest that runs.
"""

from __future__ import annotations

from typing import Final

from vmferry.core.options import Mode

TCG_COHERENT_SINCE: Final = (9, 0)
"""Before it case 1, from it on case 2."""
TCG_STEP_BYTES: Final = 256 * 1024
"""Case 1 needs memory that is a multiple of this."""

GOES_BACK_SINCE: Final = (10, 2)

LEAVES_LAST_PAGE_SINCE: Final = (8, 2)

RECOVERS_TWICE_SINCE: Final = (8, 2)

BACKGROUND_BREAKS_WELL_SINCE: Final = (11, 1)

WHY_PRECOPY: Final = (
    "the guest runs under TCG, where this QEMU loses writes of a guest that runs while postcopy stands by"
)
WHY_STOPPED: Final = (
    "the guest is stopped before its memory moves: under TCG this QEMU loses writes of a guest that runs until the"
    " switch to postcopy"
)


def precopy_loses_writes(accelerator: str | None, version: tuple[int, ...] | None, memory_bytes: int | None) -> bool:
    """Case 1: this guest may not leave this QEMU at all unless somebody takes that upon himself."""
    if accelerator != "tcg" or version is None or memory_bytes is None:
        return False
    return version[:2] < TCG_COHERENT_SINCE and memory_bytes % TCG_STEP_BYTES == 0


def standby_loses_writes(accelerator: str | None, version: tuple[int, ...] | None) -> bool:
    """Case 2: with postcopy-ram on, this guest must not run while its memory moves."""
    return accelerator == "tcg" and (version is None or version[:2] >= TCG_COHERENT_SINCE)


def goes_back_after_grant(version: tuple[int, ...] | None) -> bool:
    """This source's QEMU may set its guest running again although the destination runs it: it must have been paused
    before the switch to postcopy."""
    return version is None or version[:2] >= GOES_BACK_SINCE


def waits_for_ever_after_last_page(version: tuple[int, ...] | None) -> bool:
    """This source must not lose its destination between its last page and the destination's result."""
    return version is None or version[:2] < LEAVES_LAST_PAGE_SINCE


def dies_of_broken_recovery(version: tuple[int, ...] | None) -> bool:
    """This destination does not live through a channel that breaks while it is in postcopy-recover."""
    return version is None or version[:2] < RECOVERS_TWICE_SINCE


def hangs_after_broken_background(version: tuple[int, ...] | None) -> bool:
    """This guest may not be saved in the background: it would not live through a channel that breaks."""
    return version is None or version[:2] < BACKGROUND_BREAKS_WELL_SINCE


def stops_first(mode: Mode, accelerator: str | None, version: tuple[int, ...] | None) -> bool:
    """True if the guest has to be stopped before the first page leaves."""
    return mode is Mode.POSTCOPY and standby_loses_writes(accelerator, version)
