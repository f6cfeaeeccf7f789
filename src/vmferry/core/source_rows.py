"""THE table of the source's agent: what is done next for every combination of what is known.

Theory of operation
-------------------
Labels: P set-up, M memory on its way, C commit, G granted, B going back, F the source's process is gone,
X never reached while the rules hold (kept as rows so that the answer to the impossible is written down: do
nothing, keep both sides, call a person).

The three outcomes of a switchover are the three ways out of the G rows: the destination ran (`G-ran-*`), it
provably never will (`G-gone-*`), or nobody knows (`G-uncertain`).
"""

from __future__ import annotations

from vmferry.core.effects import Effect as E  # noqa: N817 - one letter keeps the table readable
from vmferry.core.table import Outcome, Remedy, Row, pattern
from vmferry.core.view import Change, Cpus, Disks, Grant, Leave, Retry, Source, Step, Target, Want

EARLY = (Step.NEW, Step.PLANNED, Step.PREPARED, Step.CONFIGURED)
UNSENT = (Grant.NONE, Grant.HELD)
ALIVE = tuple(s for s in Source if s not in (Source.GONE, Source.RETIRED))
DEAD = (Source.GONE, Source.RETIRED)
USABLE = (Target.PREPARED, Target.READY, Target.LOADED, Target.UNKNOWN)
LOST = (Target.ABSENT, Target.REFUSED, Target.GONE)
TO_RELEASE = (Target.PREPARED, Target.READY, Target.LOADED, Target.REFUSED, Target.UNKNOWN)
NOTHING_THERE = (Target.ABSENT, Target.GONE)
BEGINNING = (Source.CONNECTING, Source.UNPLUGGING)
UNDER_WAY = (*BEGINNING, Source.BUSY, Source.WAITING, Source.SWITCHING, Source.SILENT, Source.UNKNOWN)
OURS_AGAIN = (Source.IDLE, Source.BACK, Source.DONE)
"""The attempt is not going on inside QEMU: never begun, given up, or over with nobody told to run."""

NO_MIRRORS = (Disks.SETTLED, Disks.TODO)
MIRRORS = (Disks.COPYING, Disks.READY, Disks.FAILED)
IN_SYNC = (Disks.SETTLED, Disks.READY)
UNDRAINED = (Disks.TODO, *MIRRORS)
LOST_DISK = (Disks.TODO, Disks.FAILED)
"""Behind the start of the memory none can be left to do."""
UNBROKEN = (Disks.SETTLED, Disks.COPYING, Disks.READY)

RUNNING = (Cpus.AS_BEFORE, Cpus.UNLOCKED)
NOT_RUNNING = (Cpus.RESTING, Cpus.STOPPED, Cpus.STUCK, Cpus.UNKNOWN)
SETTLED = (Cpus.AS_BEFORE, Cpus.RESTING)

ASK = "free the disk, then: vmferry recover NAME; or back to the source: vmferry cancel NAME"
FREE = "none needed: the start is tried again; if a disk is locked elsewhere, free it"
FEED = "keep the destination's QEMU, and if the source's memory was kept: vmferry recover NAME"

MAY_HOLD = "bring the link to the destination back: it may hold the only copy"

REACH = (
    "bring the link to the destination back, and the agents agree by themselves; or, when its host is known to be "
    "dead: vmferry resolve NAME --other-side-is-dead"
)

SETUP_MS = 10_000
UNPLUG_MS = 60_000
SWITCHOVER_MS = 3_000
DRAIN_MS = 10_000
"""What a mirror may have left to write when the guest stops is bounded; the network's slowness is not."""
DROP_MS = 5_000
"""Mirrors are given up within milliseconds; a QEMU that hangs in one is cut from it meanwhile."""
DEVICE_MS = 30_000
SILENT_MS = 10_000
ENDING_MS = 1_000
RELEASE_MS = 1_000
BROKEN_MS = 5_000
"""A guest that stands still on both sides for a channel that is broken could run on the source meanwhile."""
STUCK_MS = 500
"""Until finish-migrate after the end of an attempt is not taken for a step on the way any more."""
PAGES_MS = 2_000
"""1. the last page arrives  2. stream and link break before anybody here has heard so  3. the link is there again, and
nobody tells what was told before: it has to be asked for. An older QEMU says postcopy-active for ever."""
HOLD_MS = 60_000
"""A guest that stands still for a person's leave. Within a minute a person or a tool that asked for a say answers, and
its users' connections live; who has not answered then is not there, and the guest runs on where it is."""
UNCERTAIN_MS = 10_000
"""How long a silent destination is waited for before its locks are asked."""

SET_UP: tuple[Row[E], ...] = (
    Row("P-plan", pattern(want=Want.GO, step=Step.NEW, grant=Grant.NONE, source=ALIVE,
                          target=(Target.ABSENT, *USABLE)),
        E.CHECK_PLAN, "Nothing is touched before both hosts said that the move can work."),
    Row("P-prepare", pattern(want=Want.GO, step=Step.PLANNED, grant=Grant.NONE, source=ALIVE,
                             target=(Target.ABSENT, *USABLE)),
        E.PREPARE, "The destination's QEMU is started paused, so that it cannot run before it is told to."),
    Row("P-configure", pattern(want=Want.GO, step=Step.PREPARED, grant=Grant.NONE, source=ALIVE,
                               target=(Target.ABSENT, *USABLE)),
        E.CONFIGURE, "Options are applied whole and read back before anything starts."),
    Row("P-mirror", pattern(want=Want.GO, step=Step.CONFIGURED, grant=Grant.NONE, source=ALIVE,
                            target=(Target.ABSENT, *USABLE), disks=Disks.TODO),
        E.START_MIRRORS, "Disks first: they take longest, and their mirrors keep what memory's last round would miss."),
    Row("P-copying", pattern(want=Want.GO, step=Step.CONFIGURED, grant=Grant.NONE, source=ALIVE,
                             target=(Target.ABSENT, *USABLE), disks=Disks.COPYING),
        None, "The disks are on their way, and the guest runs. The QEMUs need nobody for this."),
    Row("P-disk-failed", pattern(want=Want.GO, step=Step.CONFIGURED, grant=Grant.NONE, source=ALIVE,
                                 target=(Target.ABSENT, *USABLE), disks=Disks.FAILED),
        E.NOTE_DISK_ERROR, "One disk cannot be copied, so none is: all go together or not at all."),
    Row("P-start", pattern(want=Want.GO, step=Step.CONFIGURED, grant=Grant.NONE, source=ALIVE,
                           target=(Target.ABSENT, *USABLE), disks=IN_SYNC),
        E.START, "The channel is ours and connected before QEMU hears of it, so it can always be cut."),
    Row("P-target-lost", pattern(want=Want.GO, step=EARLY, grant=Grant.NONE, source=ALIVE,
                                 target=(Target.REFUSED, Target.GONE)),
        E.NOTE_TARGET_LOST, "Without a destination there is nothing to move to."),
    Row("P-source-gone", pattern(want=Want.GO, step=EARLY, grant=Grant.NONE, source=DEAD,
                                 target=(Target.ABSENT, *USABLE, Target.REFUSED, Target.GONE)),
        E.NOTE_QEMU_ERROR, "The guest's process died before anything was moved: an ordinary crash."),
    Row("P-back-drop", pattern(want=Want.BACK, step=EARLY, grant=Grant.NONE, source=ALIVE, disks=MIRRORS,
                               target=(*TO_RELEASE, *NOTHING_THERE)),
        E.DROP_MIRRORS, "The mirrors end before what they write to does; the guest runs on and does not notice.",
        Outcome.SOURCE, DROP_MS, E.CLEAN_UP),
    Row("P-back-release", pattern(want=Want.BACK, step=EARLY, grant=Grant.NONE, target=TO_RELEASE, source=ALIVE,
                                  disks=NO_MIRRORS),
        E.RELEASE_TARGET, "Nothing was sent; the destination gives its place up.",
        Outcome.SOURCE, RELEASE_MS, E.CLEAN_UP),
    Row("P-back-clean", pattern(want=Want.BACK, step=EARLY, grant=Grant.NONE, target=NOTHING_THERE, source=ALIVE,
                                disks=NO_MIRRORS),
        E.CLEAN_UP, "Nothing was sent and nothing is left on the destination.", Outcome.SOURCE),
    Row("F-early-release", pattern(want=Want.BACK, step=EARLY, grant=Grant.NONE, target=TO_RELEASE, source=DEAD),
        E.RELEASE_TARGET, "The guest's process died before anything of it was sent, as in any crash of it.",
        Outcome.LOST, RELEASE_MS, E.CLEAN_UP),
    Row("F-early-clean", pattern(want=Want.BACK, step=EARLY, grant=Grant.NONE, target=NOTHING_THERE, source=DEAD),
        E.CLEAN_UP, "The guest's process died before anything of it was sent, as in any crash of it.", Outcome.LOST),
    Row("X-early-ran", pattern(step=EARLY, grant=Grant.NONE, target=(Target.RAN, Target.DIED)),
        None, "The destination runs a guest that was never sent to it.", Outcome.UNCERTAIN,
        action="stop the VM of this name on the destination by hand"),
    Row("X-early-grant", pattern(step=EARLY, grant=(Grant.HELD, Grant.SENT)),
        None, "A commit without a started migration cannot be.", Outcome.UNCERTAIN,
        action="vmferry status NAME on both hosts"),
)  # fmt: skip

MOVING: tuple[Row[E], ...] = (
    Row("M-disk-failed", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, target=USABLE, disks=LOST_DISK,
                                 source=(Source.IDLE, *BEGINNING, Source.BUSY, Source.WAITING)),
        E.NOTE_DISK_ERROR, "One disk is not kept equal any more, so the guest stays where all of them are."),
    Row("M-connect", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, target=USABLE,
                             source=(Source.IDLE, Source.CONNECTING), disks=UNBROKEN),
        None, "The QEMUs shake hands, which takes a round trip or two.", limit_ms=SETUP_MS, then=E.NOTE_TIMEOUT),
    Row("M-unplug", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.UNPLUGGING,
                            target=USABLE, disks=UNBROKEN),
        None, "The guest gives its failover devices back in its own time.", limit_ms=UNPLUG_MS, then=E.NOTE_TIMEOUT),
    Row("M-postcopy", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.BUSY,
                              target=USABLE, change=Change.POSTCOPY, disks=UNBROKEN),
        E.START_POSTCOPY, "The switch to postcopy was asked for, by a person or by the policy."),
    Row("M-memory", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.BUSY,
                            target=USABLE, change=(Change.NONE, Change.PACE, Change.PAUSE), disks=UNBROKEN),
        None, "Memory is on its way. A silent agent there is no failure: the QEMUs need nobody for this."),
    Row("M-hold", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.WAITING, target=USABLE,
                          leave=Leave.AWAITED, disks=UNBROKEN),
        None, "The guest is paused, and a person wanted to give the leave to hand it over.", Outcome.HELD,
        HOLD_MS, E.NOTE_TIMEOUT, "vmferry job finalize NAME; or back to the source: vmferry cancel NAME"),
    Row("M-sure", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.WAITING,
                          target=(Target.PREPARED, Target.LOADED, Target.UNKNOWN), leave=Leave.GIVEN, disks=UNBROKEN),
        E.MAKE_SURE, "Paused and still whole: the last place where both sides can say no at no cost.",
        limit_ms=SWITCHOVER_MS, then=E.NOTE_TIMEOUT),
    Row("M-drain", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.WAITING,
                           target=Target.READY, leave=Leave.GIVEN, disks=Disks.READY),
        E.DRAIN_MIRRORS, "The guest is paused: what the mirrors have left to write is all there will be.",
        limit_ms=DRAIN_MS, then=E.NOTE_TIMEOUT),
    Row("M-drain-wait", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.WAITING,
                                target=Target.READY, leave=Leave.GIVEN, disks=Disks.COPYING),
        None, "Whether the mirrors are ready is not known yet: QEMU is asked.",
        limit_ms=SWITCHOVER_MS, then=E.NOTE_TIMEOUT),
    Row("M-continue", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.WAITING,
                              target=Target.READY, leave=Leave.GIVEN, disks=Disks.SETTLED),
        E.CONTINUE, "Both sides are there, and their disks are equal.", limit_ms=SWITCHOVER_MS, then=E.NOTE_TIMEOUT),
    Row("M-target-lost", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT,
                                 source=(Source.IDLE, *BEGINNING, Source.BUSY, Source.WAITING, Source.SWITCHING,
                                         Source.POSTCOPY, Source.DONE, Source.BROKEN), target=LOST),
        E.NOTE_TARGET_LOST, "The destination never ran and is of no use any more."),
    Row("M-silent", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.SILENT,
                            target=(*USABLE, *LOST)),
        None, "QEMU does not answer; at the switchover a hung peer does that.",
        limit_ms=SILENT_MS, then=E.NOTE_TIMEOUT),
    Row("M-unknown-word", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.UNKNOWN,
                                  target=(*USABLE, *LOST)),
        None, "A word nobody has heard of is no error: wait for one that is known."),
    Row("M-qemu-ends", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT,
                               source=(Source.ENDING, Source.BACK), target=(*USABLE, *LOST)),
        E.NOTE_QEMU_ERROR, "The source's QEMU gave the attempt up."),
    Row("F-gone", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=DEAD, target=LOST),
        E.NOTE_QEMU_ERROR, "Both processes are gone, or the destination is of no use."),
    Row("F-gone-ask", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.GONE,
                              target=(Target.PREPARED, Target.READY)),
        E.ASK_TARGET, "The source's process died; what it had sent may be all that the destination needs.",
        Outcome.UNCERTAIN, SILENT_MS, E.NOTE_QEMU_ERROR, "none needed: the destination is asked"),
    Row("F-gone-loaded", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.GONE,
                                 target=Target.LOADED),
        E.ASK_TARGET, "The source's process died; its last pages may be there, or on their way to be read.",
        Outcome.UNCERTAIN, PAGES_MS, E.NOTE_QEMU_ERROR, "none needed: the destination is asked"),
    Row("F-gone-silent", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=DEAD, target=Target.UNKNOWN),
        E.ASK_TARGET, "The source's process died; whether the destination had loaded everything is not known.",
        Outcome.UNCERTAIN, action=MAY_HOLD),
    Row("F-arrived-ask", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.RETIRED,
                                 target=(Target.PREPARED, Target.READY)),
        E.ASK_TARGET, "The only copy is there, and it has not said that it loaded.",
        Outcome.UNCERTAIN, action="none needed: the destination is asked again"),
    Row("M-broken", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.BROKEN,
                            target=(Target.PREPARED, Target.READY, Target.LOADED)),
        E.RECONNECT, "Postcopy lost its channel before anybody was told to run: the source is whole.", Outcome.HELD,
        BROKEN_MS, E.NOTE_TIMEOUT, "none needed: the agents connect the two QEMUs again, or the guest goes back"),
    Row("M-broken-silent", pattern(want=Want.GO, step=Step.STARTED, grant=UNSENT, source=Source.BROKEN,
                                   target=Target.UNKNOWN),
        E.ASK_TARGET, "Nobody is connected to a destination that is not known to live.", Outcome.HELD,
        BROKEN_MS, E.NOTE_TIMEOUT, "none needed: the destination is asked again, or the guest goes back"),
)  # fmt: skip

COMMIT: tuple[Row[E], ...] = (
    Row("C-commit", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.NONE,
                            source=(Source.SWITCHING, Source.POSTCOPY, Source.DONE), target=USABLE,
                            disks=Disks.SETTLED),
        E.COMMIT, "Durable before the destination may be told; beside QEMU's own work it costs no pause."),
    Row("C-undrained", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.NONE, target=USABLE, disks=UNDRAINED,
                               source=(Source.SWITCHING, Source.POSTCOPY, Source.DONE)),
        E.NOTE_DISK_ERROR, "Somebody led the source past its pause before the disks were equal: it goes back."),
    Row("C-wait-load", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.HELD, source=Source.SWITCHING,
                               target=USABLE),
        None, "Device state is on its way; QEMU has no time limit here, we have.",
        limit_ms=DEVICE_MS, then=E.NOTE_TIMEOUT),
    Row("C-grant", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.HELD,
                           source=(Source.POSTCOPY, Source.DONE), target=Target.LOADED, cpus=NOT_RUNNING),
        E.SEND_GRANT, "The source is stopped and cannot start by itself, the destination has loaded."),
    Row("C-ask", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.HELD,
                         source=(Source.POSTCOPY, Source.DONE),
                         target=(Target.PREPARED, Target.READY, Target.UNKNOWN)),
        E.ASK_TARGET, "The source gave everything away; the destination has not said that it loaded.",
        limit_ms=DEVICE_MS, then=E.NOTE_TIMEOUT),
)  # fmt: skip

GOING_BACK: tuple[Row[E], ...] = (
    Row("B-cancel", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=UNDER_WAY,
                            target=(*USABLE, *LOST)),
        E.CANCEL_SOURCE, "Nobody was told to run: the source may go back at any time."),
    Row("B-ending", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=Source.ENDING,
                            target=(*USABLE, *LOST)),
        None, "QEMU cleans up; a stuck channel is cut.", limit_ms=ENDING_MS, then=E.CANCEL_SOURCE),
    Row("B-resume", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=OURS_AGAIN,
                            cpus=Cpus.STOPPED, target=(*USABLE, *LOST)),
        E.RESUME_SOURCE, "The destination never got the right to run, so the source may.", Outcome.HELD,
        action=FREE),
    Row("B-drop", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=OURS_AGAIN, cpus=SETTLED,
                          target=(*USABLE, *LOST), disks=MIRRORS),
        E.DROP_MIRRORS, "The guest runs here; its mirrors end before what they write to does.",
        Outcome.SOURCE, DROP_MS, E.CLEAN_UP),
    Row("B-release", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=OURS_AGAIN,
                             cpus=SETTLED, target=TO_RELEASE, disks=NO_MIRRORS),
        E.RELEASE_TARGET, "The guest runs here; the destination gives its place up.",
        Outcome.SOURCE, RELEASE_MS, E.CLEAN_UP),
    Row("B-clean", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=OURS_AGAIN,
                           cpus=SETTLED, target=NOTHING_THERE, disks=NO_MIRRORS),
        E.CLEAN_UP, "The guest runs here and nothing is left there.", Outcome.SOURCE),
    Row("B-stuck", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=OURS_AGAIN,
                           cpus=Cpus.STUCK, target=(*USABLE, *LOST)),
        None, "QEMU could not take its disks back and refuses to start until it has migrated to nobody.", Outcome.HELD,
        STUCK_MS, E.THROW_AWAY, "none needed: it is led out; then the start is tried again"),
    Row("B-unlocked", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=OURS_AGAIN,
                              cpus=Cpus.UNLOCKED, target=(*USABLE, *LOST)),
        E.STOP_SOURCE, "QEMU started the guest although its disks' locks were refused: somebody may write to them.",
        Outcome.HELD, action=FREE),
    Row("B-cpus-unknown", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=OURS_AGAIN,
                                  cpus=Cpus.UNKNOWN, target=(*USABLE, *LOST)),
        None, "Whether the guest runs here is not known yet."),
    Row("B-postcopy", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT,
                              source=(Source.POSTCOPY, Source.BROKEN), target=TO_RELEASE),
        E.RELEASE_TARGET, "QEMU refuses cancel here; a stand-in for the destination leads it out, when that is gone.",
        Outcome.HELD, RELEASE_MS, E.BRING_BACK, "none needed: it comes back by itself"),
    Row("B-postcopy-lost", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT,
                                   source=(Source.POSTCOPY, Source.BROKEN), target=NOTHING_THERE),
        E.BRING_BACK, "The destination is gone and never ran; QEMU's source would wait for it for ever.",
        Outcome.HELD, action="none needed: a stand-in leads it out; by hand: vmferry rescue NAME bring-back"),
    Row("F-back-partial", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=DEAD,
                                  target=(Target.PREPARED, Target.READY, Target.REFUSED)),
        E.RELEASE_TARGET, "The source's process died; a destination that loaded everything has the only copy, and says "
        "so instead of giving it up, and so does one whose QEMU hangs in its load.", Outcome.HELD,
        action="none needed: the destination is asked again; if its QEMU hangs for good, it lacks what the source's "
        "took with it: end that one, and the job ends as lost"),
    Row("F-back-unknown", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=DEAD,
                                  target=Target.UNKNOWN),
        E.ASK_TARGET, "The source's process died; whether the destination had loaded everything is not known.",
        Outcome.UNCERTAIN, action=MAY_HOLD),
    Row("F-back-loaded", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=Source.GONE,
                                 target=Target.LOADED),
        None, "The source's process died; the destination loaded the device state, lacks pages and never ran.",
        Outcome.HELD, action=FEED, remedy=Remedy.FEED),
    Row("F-whole-undrained", pattern(step=Step.STARTED, grant=Grant.NONE, source=Source.RETIRED,
                                     target=Target.LOADED, disks=UNDRAINED),
        None, "The source's process died, the destination holds all memory, and nobody knows whether its disks are "
        "equal to the source's.", Outcome.UNCERTAIN,
        action="compare the disks on both hosts before anything is started"),
    Row("F-whole-commit", pattern(step=Step.STARTED, grant=Grant.NONE, source=Source.RETIRED,
                                  target=Target.LOADED, disks=Disks.SETTLED),
        E.COMMIT, "The source's process died, and the destination holds all of the guest: forward is the only way."),
    Row("F-whole-grant", pattern(step=Step.STARTED, grant=Grant.HELD, source=Source.RETIRED,
                                 target=Target.LOADED),
        E.SEND_GRANT, "The destination holds the only copy, whole and paused, and this side cannot run."),
    Row("F-back-nothing", pattern(want=Want.BACK, step=Step.STARTED, grant=UNSENT, source=DEAD,
                                  target=NOTHING_THERE),
        E.CLEAN_UP, "The source's process died with the only copy.", Outcome.LOST),
    Row("X-ran-ungranted", pattern(step=Step.STARTED, grant=UNSENT, target=(Target.RAN, Target.DIED)),
        None, "The destination runs without having been told to: somebody started it by hand.",
        Outcome.UNCERTAIN, action="find out who started the destination; keep the source paused"),
)  # fmt: skip

PAUSED_THERE = (Target.PREPARED, Target.READY, Target.LOADED, Target.REFUSED)

GRANTED: tuple[Row[E], ...] = (
    Row("G-ran-retire", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, source=Source.DONE,
                                cpus=NOT_RUNNING),
        E.RETIRE_SOURCE, "The guest runs there with every page.", Outcome.DESTINATION),
    Row("G-ran-double", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, cpus=RUNNING,
                                source=ALIVE),
        E.STOP_SOURCE, "The destination holds the newer generation: the source must not run.",
        Outcome.DESTINATION),
    Row("G-ran-pages", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN,
                               source=(Source.POSTCOPY, Source.SWITCHING, Source.UNKNOWN, Source.SILENT,
                                       Source.IDLE, *BEGINNING, Source.BUSY, Source.WAITING),
                               cpus=NOT_RUNNING, change=(Change.NONE, Change.POSTCOPY)),
        None, "The guest runs there; the last pages are on their way and both sides are needed.",
        Outcome.DESTINATION, PAGES_MS, E.ASK_TARGET),
    Row("G-ran-pause", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, source=Source.POSTCOPY,
                               cpus=NOT_RUNNING, change=Change.PAUSE),
        E.PAUSE_PAGES, "The guest runs there, and a person wants no page to move for now.", Outcome.DESTINATION),
    Row("G-ran-pause-late", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, change=Change.PAUSE,
                                    source=(Source.SWITCHING, Source.UNKNOWN, Source.SILENT,
                                            Source.IDLE, *BEGINNING, Source.BUSY, Source.WAITING),
                                    cpus=NOT_RUNNING),
        None, "The guest runs there; its pages can be paused once QEMU says that it sends them.",
        Outcome.DESTINATION),
    Row("G-ran-pace", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, change=Change.PACE,
                              source=(Source.POSTCOPY, Source.SWITCHING, Source.UNKNOWN, Source.SILENT,
                                      Source.IDLE, *BEGINNING, Source.BUSY, Source.WAITING),
                              cpus=NOT_RUNNING),
        E.LET_PAGES_GO, "The guest runs there: the pages that were held back until then may go.", Outcome.DESTINATION),
    Row("G-ran-broken", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, source=Source.BROKEN,
                                cpus=NOT_RUNNING, retry=Retry.AGAIN),
        E.RECONNECT, "The guest runs there and some of its pages are still here: both QEMUs are needed.",
        Outcome.DEGRADED, action="none needed: the agents connect the two QEMUs again"),
    Row("G-ran-broken-hold", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, source=Source.BROKEN,
                                     cpus=NOT_RUNNING, retry=(Retry.ASK, Retry.BACK)),
        None, "A person paused it, or it was tried for as long as the policy says; both QEMUs are needed and wait.",
        Outcome.DEGRADED, action="mend the link between the hosts if it is that, then: vmferry recover NAME",
        remedy=Remedy.TRY_AGAIN),
    Row("G-ran-failed", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN,
                                source=(Source.ENDING, Source.BACK),
                                cpus=NOT_RUNNING),
        E.ASK_TARGET, "The guest runs there, and the source's QEMU gave up with pages that it may still need.",
        Outcome.DEGRADED, action="keep both QEMUs, then: vmferry recover NAME", remedy=Remedy.FEED),
    Row("G-ran-clean", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, source=Source.RETIRED),
        E.CLEAN_UP, "The guest runs there and the source's QEMU is gone.", Outcome.DESTINATION),
    Row("F-ran-gone", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.RAN, source=Source.GONE),
        E.ASK_TARGET, "The source's process died with pages that the running guest still needs, unless the last ones "
        "arrived before that.", Outcome.DEGRADED, action=FEED, remedy=Remedy.FEED),
    Row("G-again", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT,
                           source=(Source.POSTCOPY, Source.DONE), target=Target.LOADED, cpus=NOT_RUNNING),
        E.SEND_GRANT, "The grant was lost on its way; the same generation again is harmless.",
        Outcome.HELD, action="none needed: the start is tried again"),
    Row("G-runs-here", pattern(want=Want.GO, step=Step.STARTED, grant=(Grant.HELD, Grant.SENT),
                               source=(Source.POSTCOPY, Source.DONE), target=Target.LOADED, cpus=RUNNING),
        E.NOTE_QEMU_ERROR, "Everything was given away, and yet the guest runs here: it must not be started there."),
    Row("F-again", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, source=Source.RETIRED,
                           target=Target.LOADED),
        E.SEND_GRANT, "The grant was lost on its way; the same generation again is harmless.",
        Outcome.HELD, action="none needed: the start is tried again"),
    Row("G-refused-runs", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, retry=(Retry.AGAIN, Retry.ASK),
                                  source=(Source.POSTCOPY, Source.DONE), target=Target.REFUSED, cpus=RUNNING),
        E.NOTE_QEMU_ERROR, "Everything was given away, and yet the guest runs here: it must not be started there."),
    Row("G-start-refused", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, retry=Retry.BACK,
                                   source=(Source.POSTCOPY, Source.BROKEN, Source.DONE), target=Target.REFUSED),
        E.NOTE_TARGET_LOST, "The destination could not start and never ran: the guest goes back."),
    Row("G-retry-start", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, retry=Retry.AGAIN,
                                 source=(Source.POSTCOPY, Source.DONE), target=Target.REFUSED, cpus=NOT_RUNNING),
        E.SEND_GRANT, "The destination could not start; the policy is to hold it there and to try again.",
        Outcome.HELD, action="none needed: the start is tried again; to go back: vmferry cancel NAME"),
    Row("G-retry-link", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, retry=Retry.AGAIN,
                                source=Source.BROKEN, target=Target.REFUSED),
        E.RECONNECT, "The destination could not start, and lacks pages: first the channel, then the start.",
        Outcome.HELD, action="none needed: the agents connect the two QEMUs again; to go back: vmferry cancel NAME"),
    Row("G-ask-person", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, retry=Retry.ASK,
                                source=(Source.POSTCOPY, Source.DONE), target=Target.REFUSED, cpus=NOT_RUNNING),
        None, "The destination could not start, and the policy is to ask: both sides are paused and whole.",
        Outcome.HELD, action=ASK, remedy=Remedy.TRY_AGAIN),
    Row("G-ask-broken", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, retry=Retry.ASK,
                                source=Source.BROKEN, target=Target.REFUSED),
        None, "The destination could not start and lacks pages, and the policy is to ask.",
        Outcome.HELD, action=ASK, remedy=Remedy.TRY_AGAIN),
    Row("F-retry-start", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.REFUSED, source=Source.RETIRED),
        E.SEND_GRANT, "The destination could not start and holds the only copy: it is tried until it can.",
        Outcome.HELD, action="free the disk that is locked elsewhere: the start is tried again"),
    Row("G-ask", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT,
                         source=(Source.POSTCOPY, Source.DONE, Source.RETIRED),
                         target=(Target.ABSENT, Target.PREPARED, Target.READY)),
        E.ASK_TARGET, "The commit is durable and the destination has not said that it loaded.",
        Outcome.UNCERTAIN, action="none needed: the destination is asked again"),
    Row("G-under-way", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT,
                               source=(Source.IDLE, *UNDER_WAY), target=(Target.ABSENT, *PAUSED_THERE)),
        E.ASK_TARGET, "The agent came back in the middle of the switchover; QEMU goes on by itself.",
        Outcome.UNCERTAIN, action="none needed: QEMU finishes and the agents agree again"),
    Row("G-qemu-ends", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT,
                               source=(Source.ENDING, Source.BACK), target=(Target.ABSENT, *PAUSED_THERE)),
        E.NOTE_QEMU_ERROR, "The source's QEMU gave the attempt up before the destination ran."),
    Row("G-broken", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, source=Source.BROKEN,
                            target=(Target.ABSENT, Target.PREPARED, Target.READY, Target.LOADED)),
        E.RECONNECT, "Postcopy lost its channel; the destination is paused and never ran.", Outcome.HELD,
        action="none needed: the agents connect the two QEMUs again"),
    Row("F-granted-gone", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, source=Source.GONE,
                                  target=(Target.ABSENT, *PAUSED_THERE)),
        None, "The source's process died before it had given everything away.", Outcome.HELD,
        action=FEED, remedy=Remedy.FEED),
    Row("G-uncertain-broken", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.UNKNOWN,
                                      source=Source.BROKEN, retry=Retry.AGAIN),
        E.RECONNECT, "The destination may run the guest, and lacks pages: it is asked on both ways, and connected when "
        "it has answered.", Outcome.UNCERTAIN, UNCERTAIN_MS, E.FENCE_TARGET, REACH),
    Row("G-uncertain", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.UNKNOWN,
                               source=tuple(s for s in Source if s is not Source.BROKEN)),
        E.ASK_TARGET, "The destination may run the guest: both QEMUs are kept and the source stays paused.",
        Outcome.UNCERTAIN, UNCERTAIN_MS, E.FENCE_TARGET, REACH),
    Row("G-uncertain-hold", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.UNKNOWN,
                                    source=Source.BROKEN, retry=(Retry.ASK, Retry.BACK)),
        E.ASK_TARGET, "The destination may run the guest: both QEMUs are kept and the source stays paused.",
        Outcome.UNCERTAIN, UNCERTAIN_MS, E.FENCE_TARGET, REACH),
    Row("G-back-release", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, source=ALIVE,
                                  target=(Target.ABSENT, *PAUSED_THERE)),
        E.RELEASE_TARGET, "Going back needs the destination's word that it never ran and never will.",
        Outcome.UNCERTAIN, action="none needed: the destination is asked again"),
    Row("F-back-granted", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, source=Source.GONE,
                                  target=(Target.ABSENT, *PAUSED_THERE)),
        None, "The source's process is gone, so the destination may have the only copy: nothing of it is given up.",
        Outcome.HELD, action=FEED, remedy=Remedy.FEED),
    Row("F-back-whole", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, source=Source.RETIRED,
                                target=Target.LOADED),
        E.SEND_GRANT, "The destination holds the only copy, whole and paused, and this side cannot run."),
    Row("F-back-ask", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, source=Source.RETIRED,
                              target=(Target.ABSENT, Target.PREPARED, Target.READY)),
        E.ASK_TARGET, "The only copy is there, and it has not said that it loaded.",
        Outcome.UNCERTAIN, action="none needed: the destination is asked again"),
    Row("G-gone-note", pattern(want=Want.GO, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE),
        E.NOTE_TARGET_LOST, "The destination renounced: it never ran and never will."),
    Row("G-gone-cancel", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE,
                                 source=UNDER_WAY),
        E.CANCEL_SOURCE, "The destination renounced; the source's QEMU still tries."),
    Row("G-gone-ending", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE,
                                 source=Source.ENDING),
        None, "QEMU cleans up; a stuck channel is cut.", limit_ms=ENDING_MS, then=E.CANCEL_SOURCE),
    Row("G-gone-resume", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE,
                                 source=OURS_AGAIN, cpus=Cpus.STOPPED),
        E.RESUME_SOURCE, "The destination renounced, so the source may run.", Outcome.HELD,
        action=FREE),
    Row("G-gone-clean", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE,
                                source=OURS_AGAIN, cpus=SETTLED),
        E.CLEAN_UP, "The guest runs here again and nothing is left there.", Outcome.SOURCE),
    Row("G-gone-stuck", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE,
                                source=OURS_AGAIN, cpus=Cpus.STUCK),
        None, "QEMU could not take its disks back and refuses to start until it has migrated to nobody.", Outcome.HELD,
        STUCK_MS, E.THROW_AWAY, "none needed: it is led out; then the start is tried again"),
    Row("G-gone-unlocked", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE,
                                   source=OURS_AGAIN, cpus=Cpus.UNLOCKED),
        E.STOP_SOURCE, "QEMU started the guest although its disks' locks were refused: somebody may write to them.",
        Outcome.HELD, action=FREE),
    Row("G-gone-cpus-unknown", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT,
                                       target=Target.GONE, source=OURS_AGAIN, cpus=Cpus.UNKNOWN),
        None, "Whether the guest runs here is not known yet."),
    Row("G-gone-postcopy", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE,
                                   source=(Source.POSTCOPY, Source.BROKEN)),
        E.BRING_BACK, "The destination is gone and never ran; QEMU's source would wait for it for ever.",
        Outcome.HELD, action="none needed: a stand-in leads it out; by hand: vmferry rescue NAME bring-back"),
    Row("F-gone-both", pattern(want=Want.BACK, step=Step.STARTED, grant=Grant.SENT, target=Target.GONE,
                               source=DEAD),
        E.CLEAN_UP, "Both processes are gone; the destination never ran.", Outcome.LOST),
    Row("G-died", pattern(step=Step.STARTED, grant=Grant.SENT, target=Target.DIED),
        None, "The guest ran on the destination and its process is gone: the source's copy is old.",
        Outcome.LOST, action="restart the guest from its disks; the source's old memory is kept until then"),
)  # fmt: skip

SOURCE_ROWS: tuple[Row[E], ...] = SET_UP + MOVING + COMMIT + GOING_BACK + GRANTED
