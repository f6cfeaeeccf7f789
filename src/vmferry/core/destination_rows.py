"""THE table of the destination's agent.

Rule 1: CPUs start only in `D-start`: newer generation durable here, state loaded, never started before.
        And nobody but the guest writes to its disks from then on (`D-close`).
Rule 2: the place is given up only while it is proved that the guest never ran here (`D-renounce`).
Rule 3: `cont` without an answer (`ran` UNKNOWN) is neither started again nor given up: it is looked at.
"""

from __future__ import annotations

from vmferry.core.effects import DestinationEffect as D
from vmferry.core.table import Outcome, Row, pattern
from vmferry.core.view import Halt, Held, Incoming, Ran, Served, Wish

HERE = (Incoming.RUNNING, Incoming.UNKNOWN, Incoming.LOADED)
"""The guest ran here; whether it runs at this moment may not be known yet."""
INERT = (Incoming.NONE, Incoming.LOADING, Incoming.LOADED, Incoming.FAILED, Incoming.GONE)

DESTINATION_ROWS: tuple[Row[D], ...] = (
    Row("D-spawn", pattern(wish=Wish.KEEP, held=Held.NO, incoming=Incoming.NONE, ran=Ran.NO),
        D.SPAWN, "A place was asked for."),
    Row("D-load", pattern(wish=Wish.KEEP, held=Held.NO, incoming=(Incoming.LOADING, Incoming.UNKNOWN),
                          ran=Ran.NO),
        None, "The stream is on its way; QMP may lag while QEMU loads."),
    Row("D-close", pattern(wish=Wish.KEEP, incoming=Incoming.LOADED, ran=Ran.NO, served=Served.YES),
        D.CLOSE_EXPORTS, "Loaded: the source wrote its last to the disks before it sent this, and they are the guest's "
        "own from here on."),
    Row("D-wait-grant", pattern(wish=Wish.KEEP, held=Held.NO, incoming=Incoming.LOADED, ran=Ran.NO,
                                served=Served.NO),
        None, "Loaded and paused: only the source's agent can give the right to run.", Outcome.HELD,
        action="none needed: the source decides, and this side waits for it"),
    Row("D-start", pattern(wish=Wish.KEEP, held=Held.YES, incoming=Incoming.LOADED, ran=Ran.NO, served=Served.NO),
        D.START_CPUS, "The newer generation is durable here and the state is loaded."),
    Row("D-granted-early", pattern(wish=Wish.KEEP, held=Held.YES,
                                   incoming=(Incoming.NONE, Incoming.LOADING, Incoming.UNKNOWN), ran=Ran.NO),
        None, "Granted before QEMU said that it had loaded: wait for that."),
    Row("D-failed", pattern(wish=Wish.KEEP, incoming=(Incoming.FAILED, Incoming.GONE), ran=Ran.NO),
        D.RENOUNCE, "QEMU could not load, or is gone, and never ran: say so for good.", Outcome.SOURCE),
    Row("D-renounce", pattern(wish=Wish.DROP, incoming=INERT, ran=Ran.NO),
        D.RENOUNCE, "The source takes the guest back and it never ran here.", Outcome.SOURCE),
    Row("D-renounce-blind", pattern(wish=Wish.DROP, incoming=Incoming.UNKNOWN, ran=Ran.NO),
        D.RENOUNCE, "QEMU does not answer, but `cont` was never written to it: it cannot have run.",
        Outcome.SOURCE),
    Row("D-in-doubt", pattern(incoming=(Incoming.NONE, Incoming.LOADING, Incoming.LOADED, Incoming.FAILED,
                                        Incoming.UNKNOWN), ran=Ran.UNKNOWN),
        None, "`cont` was written and not answered: the run state will tell.", Outcome.UNCERTAIN,
        action="none needed: QEMU is asked again"),
    Row("D-in-doubt-gone", pattern(incoming=Incoming.GONE, ran=Ran.UNKNOWN),
        D.REPORT_DIED, "`cont` was written and QEMU is gone: it must be taken as having run.", Outcome.LOST),
    Row("D-freeze", pattern(incoming=HERE, ran=Ran.YES, halt=Halt.WANTED),
        D.FREEZE, "The guest runs here, some of its pages are out of reach, and the policy is to pause it.",
        Outcome.DEGRADED, action="none needed: it goes on when the channel is there again"),
    Row("D-thaw", pattern(incoming=HERE, ran=Ran.YES, halt=Halt.OVER),
        D.THAW, "The guest is stopped from outside, and the reason is gone.", Outcome.DESTINATION),
    Row("D-frozen", pattern(incoming=HERE, ran=Ran.YES, halt=Halt.KEPT),
        D.REPORT_RAN, "The guest is this host's, and stopped until the channel is there again.",
        Outcome.DEGRADED, action="none needed: it goes on when the channel is there again"),
    Row("D-running", pattern(incoming=Incoming.RUNNING, ran=Ran.YES, halt=Halt.NONE),
        D.REPORT_RAN, "The guest runs here.", Outcome.DESTINATION),
    Row("D-seen-running", pattern(incoming=Incoming.RUNNING, ran=Ran.UNKNOWN),
        D.REPORT_RAN, "The guest runs here.", Outcome.DESTINATION),
    Row("D-ran", pattern(incoming=Incoming.UNKNOWN, ran=Ran.YES, halt=Halt.NONE),
        D.REPORT_RAN, "The guest ran here; its QEMU does not answer at this moment.", Outcome.DESTINATION),
    Row("D-ran-paused", pattern(incoming=Incoming.LOADED, ran=Ran.YES, halt=Halt.NONE),
        D.REPORT_RAN, "The guest ran here; that it is paused now is its owner's affair.",
        Outcome.DESTINATION),
    Row("D-ran-odd", pattern(incoming=(Incoming.NONE, Incoming.LOADING, Incoming.FAILED), ran=Ran.YES),
        D.REPORT_RAN, "The guest ran here, whatever QEMU's migration says now.", Outcome.DESTINATION),
    Row("D-died", pattern(incoming=Incoming.GONE, ran=Ran.YES),
        D.REPORT_DIED, "The guest ran here and its process is gone.", Outcome.LOST),
    Row("X-runs-ungranted", pattern(incoming=Incoming.RUNNING, ran=Ran.NO),
        None, "QEMU runs although `cont` was never sent: somebody else started it.", Outcome.UNCERTAIN,
        action="find out who started it; the source must stay paused"),
)  # fmt: skip
