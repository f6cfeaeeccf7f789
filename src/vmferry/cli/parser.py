"""The command line's grammar and its help. No command is imported here."""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any, NoReturn

from vmferry import __version__
from vmferry.cli.snapshot_epilogs import (
    DISKS_EPILOG,
    EXPORT_EPILOG,
    IMPORT_EPILOG,
    INIT_EPILOG,
    RESTORE_EPILOG,
    RUN_EPILOG,
    SAVE_EPILOG,
)
from vmferry.errors import UsageError

DEFAULT_SOCKET = "/run/vmferry/agent.sock"

MIGRATE_EPILOG = """\
modes
  precopy     all memory first, then the guest; can go back until the destination runs it
  postcopy    the guest first, the rest of its memory after it; for guests that dirty memory too fast
  auto        picks one of them and says why (the default)

exit codes
  0 the guest runs on HOST;  8 refused, nothing was touched;  11 failed, the guest runs here as before;
  12 cancelled;  13 UNCERTAIN: both QEMUs are kept;  14 held: whole and paused, one named action away.
  All of them: 'vmferry exit-codes'.

examples
  vmferry migrate web1 host-b
  vmferry migrate web1 host-b --mode postcopy --set max-bandwidth=500M
  vmferry migrate web1 host-b --json | jq .downtime_ms
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Knows the terminal's width by itself: argparse asks shutil, which brings every compressor along, and makes a
    formatter for each argument of each command, also when nobody asked for help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_help_width())


@functools.cache
def _help_width() -> int:
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (ValueError, OSError):
        columns = 80
    return max(columns, 40) - 2


FAIL_BACK_EPILOG = """
A guest that went with its disks (--disks copy) leaves its images behind, and its QEMU counts what it writes from then
on. As long as nobody touches those images, the way back sends only that. --plan says how much it is.

examples:
  vmferry migrate web1 host-b --disks copy
  vmferry fail-back web1
"""

SET_EPILOG = """\
options of QEMU, where their lock windows allow it ('vmferry options'), and the policies for trouble, at any time:
  on-storage-error=rollback|hold|ask   on-postcopy-failure=run|pause   retry-for=TIME|for-ever

examples
  vmferry set web1 downtime-limit=200ms max-bandwidth=2G
  vmferry set web1 on-postcopy-failure=pause
"""
JOB_EPILOG = """\
verbs
  cancel    the guest stays here, as long as nobody was told to run it there; a verify, prune, export or import ends
  pause     a postcopy: no page moves until it is resumed. A precopy cannot be paused: change max-bandwidth.
            A disk (JOB-disk-0) that goes along: no more of it is copied, and its migration waits
  resume    a paused postcopy, also one whose channel broke, is joined again now; a paused disk is copied on
  change    options ('vmferry options') and policies, as 'vmferry set', and mode=postcopy
  complete  for kinds of jobs that wait for it; a migration does not
  finalize  hand the guest over, or carry out a prune's plan, where --no-auto-finalize made the job wait for this word
  dismiss   the result of a concluded job is not shown any more

  A job takes a verb only in some states; 'vmferry jobs' shows which. All of them: docs/jobs.md.

exit codes
  0 done, or nothing was left to do;  10 the option is locked now;  18 too late to cancel;
  22 the job does not take this verb in its state;  23 no such job. All of them: 'vmferry exit-codes'.

examples
  vmferry job finalize web1
  vmferry job change web1 downtime-limit=200ms mode=postcopy
  vmferry job dismiss 3f2a
"""
VERIFY_EPILOG = """\
Reads every pack, index and manifest, and compares every page with what it must be. Damaged objects are named with the
snapshots that need them. It is a job: interrupted, the command leaves it at work ('vmferry jobs'). It changes nothing,
but for indexes that --rebuild-indexes makes again, while nobody saves, restores or prunes.

exit codes
  0 everything is whole;  12 cancelled;  25 something is damaged. All of them: 'vmferry exit-codes'.
"""
PRUNE_EPILOG = """\
Plans first, by looking at every snapshot, shows the plan, and asks. What is carried out is exactly the plan that was
shown; if the repository has changed since (somebody saved, forgot or pruned) nothing is done, and a new plan is needed.
In a script say --yes. To look first and decide later:

  vmferry prune --no-auto-finalize --json      the plan, as .plan, and its .job, which waits for an hour
  vmferry job finalize JOB                     carries it out; 'vmferry job cancel JOB' gives it up

With --detach it waits in the same way, unless --yes is said as well; the last line (.next) says how it goes on.

It waits for nobody: while somebody saves or restores it is refused (25, retry: yes). What is younger than an hour
stays. It never touches a snapshot. Cancelled in the middle it has done a part, and the next prune does the rest.

exit codes
  0 done, or nothing was to be done;  2 nobody can be asked;  12 the answer was no, or it was cancelled;  25 the
  repository is busy, damaged, or has changed since the plan. All of them: 'vmferry exit-codes'.
"""
BLOCK_EPILOG = """\
A blocker lasts until it is removed, over restarts of the agent, and goes along when the VM moves. 'vmferry status NAME'
lists it together with what migrations and QEMU itself hold. The same name again replaces it.

example
  vmferry block web1 migrate backup "its disks are being copied"
"""
INSPECT_EPILOG = """\
Shows for each side its QEMU's process, migration status and run state, who has the guest's disks, where the whole
guest is, and the one action that follows. All pairs of states and what follows from each: docs/faults.md.
"""
RESOLVE_EPILOG = """\
Only for a guest in doubt: the destination was told to start it and has not been heard since. The word is refused
while its agent answers, or while somebody has a disk of the guest for writing. It is durable: the guest goes on
here, and a destination that comes back with a QEMU that has not run it yet gives that up.
"""
RESCUE_EPILOG = """\
tools
  bring-back  the guest left this host in postcopy, and its destination is gone without ever having run it: QEMU's
              source waits for it for ever. Ends the migration into a stand-in; the guest is then an ordinary paused
              one, its memory untouched. Takes about 10 ms.
  throw-away  a migration failed or was cancelled, and the guest sticks in finish-migrate because a disk could not be
              taken back: QEMU refuses to start it even when the disk is free. Sends the memory to nobody, after
              which it can be started. Takes about a second per GiB.
  feed        the guest runs on its destination and waits for pages that its source does not serve any more, because
              the source's QEMU failed or died. Serves them from that QEMU's memory: of the living process, or
              what it left in a shared RAM file (memory-backend-memfd or -file with share=on).

  Each is refused where it does not fit; then nothing was done. None ever takes a complete copy of a guest away, and
  each may be given again after it failed. A guest of a migration that this host conducts is started by that as
  soon as it can be; for any other one say --run.

exit codes
  0 done;  14 held: it did not get through, or a disk is still locked; whole and paused;
  21 refused: the tool does not fit, or the proof is missing. All of them: 'vmferry exit-codes'.

examples
  vmferry rescue web1 bring-back
  vmferry rescue web1 throw-away --run --never-ran
  vmferry rescue web1 feed --json | jq .pages
"""


class _Parser(argparse.ArgumentParser):
    """Tells what is malformed as every other error is told, with --json too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=" ".join(self.format_usage().split()))


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar. Its `parse_args` raises UsageError."""
    parser = _Parser(
        prog="vmferry",
        formatter_class=_Help,
        description="Live-migrates running QEMU/KVM virtual machines between hosts and never loses one.",
        epilog="'vmferry COMMAND --help' explains one command. The agent of this host must run for most of them.",
    )
    parser.add_argument("--version", action="version", version=f"vmferry {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_agent(commands)
    _add_vm_commands(commands)
    _add_migration_commands(commands)
    _add_restore(commands)
    _add_jobs(commands)
    _add_snapshots(commands)
    _add_rescue(commands)
    _add_host_commands(commands)
    _add_demo_and_bench(commands)
    return parser


def _command(commands: Any, name: str, run: str, text: str, *, client: bool = True, **more: Any) -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=_Help,
        **more,
    )
    parser.set_defaults(run=f"vmferry.cli.{run}")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    if client:
        parser.add_argument(
            "--socket",
            default=os.environ.get("VMFERRY_SOCKET", DEFAULT_SOCKET),
            metavar="PATH",
            help="the agent's control socket (default: $VMFERRY_SOCKET or %(default)s)",
        )
    return parser


def _add_agent(commands: Any) -> None:
    agent = _command(commands, "agent", "agent_cmd:run", "run the agent of this host", client=False)
    agent.add_argument("--config", metavar="FILE", help="settings in TOML; flags win over it")
    agent.add_argument("--name", help="this host's name, as in its certificate")
    agent.add_argument("--listen", metavar="ADDRESS:PORT", help="where other agents reach this one")
    agent.add_argument("--peer", action="append", dest="peers", metavar="NAME=ADDRESS:PORT",
                       help="another agent; may be given more than once")  # fmt: skip
    agent.add_argument("--pki", dest="pki_dir", metavar="DIR", help="this host's certificates ('vmferry pki')")
    agent.add_argument("--clear-text", action="store_true", default=None,
                       help="agents and guests' memory without encryption; only on a network you trust")  # fmt: skip
    agent.add_argument("--tls-only", action="store_true", default=None,
                       help="refuse migrations for which someone says --clear-text")  # fmt: skip
    agent.add_argument("--state-dir", metavar="DIR", help="the journal (default: /var/lib/vmferry)")
    agent.add_argument("--runtime-dir", metavar="DIR", help="sockets and logs (default: /run/vmferry)")
    agent.add_argument("--control-socket", dest="socket", metavar="PATH", help="the control socket")
    agent.add_argument(
        "--migration-address",
        metavar="ADDRESS[,ADDRESS]",
        help="where guests' memory arrives; the first that can be reached is taken",
    )
    agent.add_argument("--migration-ports", metavar="FIRST-LAST", help="ports for guests' memory")
    agent.add_argument("--disk-dir", metavar="DIR", help="where copies of guests' disks are put (default: same path)")
    agent.add_argument("--repository", metavar="FOLDER|URL",
                       help="where snapshots are kept; made by 'vmferry repository-init' (default: 'repository' in "
                       "the state directory, which makes itself)")  # fmt: skip
    agent.add_argument("--repository-key", metavar="FILE", help="the key file of an encrypted repository")
    agent.add_argument("--qemu", metavar="PATH", help="the QEMU for guests that start or arrive here")
    agent.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def _add_base_image(parser: Any) -> None:
    parser.add_argument("--accept", action="append", default=[], metavar="CODE",
                        help="base-image: it may write to an image on which others lie")  # fmt: skip


def _add_vm_commands(commands: Any) -> None:
    run = _command(commands, "run", "vm_cmd:run_vm", "start a VM from a spec", epilog=RUN_EPILOG)
    run.add_argument("spec", metavar="SPEC.toml")
    _add_base_image(run)
    adopt = _command(commands, "adopt", "vm_cmd:adopt", "take over a QEMU that someone else started")
    adopt.add_argument("vm", metavar="NAME")
    adopt.add_argument("--qmp", required=True, metavar="PATH", help="its QMP socket on this host")
    adopt.add_argument("--local-disks", action="store_true",
                       help="its disks are not on storage that every host sees under the same paths")  # fmt: skip
    _add_base_image(adopt)
    _command(commands, "ls", "vm_cmd:list_vms", "list every VM on every known host")
    status = _command(commands, "status", "vm_cmd:status", "show one VM and its newest migration")
    status.add_argument("vm", metavar="NAME")
    stop = _command(commands, "stop", "vm_cmd:stop", "power a VM down")
    stop.add_argument("vm", metavar="NAME")
    stop.add_argument("--force", action="store_true", help="end its QEMU at once")
    stop.add_argument("--remove-disks", action="store_true",
                      help="the disks that its restore made go with it, for good; others stay")  # fmt: skip


def _add_wish(parser: Any) -> None:
    """Where to, with which disks, and how."""
    parser.add_argument("vm", metavar="NAME")
    parser.add_argument("destination", metavar="HOST")
    parser.add_argument(
        "--disks",
        choices=("copy", "shared"),
        help="copy: every disk that is local (shared = false) goes with the guest",
    )
    parser.add_argument(
        "--disk",
        action="append",
        dest="disk",
        default=[],
        metavar="ID=copy|shared",
        help="the same for one disk: disk0 is the guest's first",
    )
    _add_ways(parser)


def _add_ways(parser: Any) -> None:
    parser.add_argument("--mode", choices=("auto", "precopy", "postcopy"), default="auto")
    parser.add_argument("--set", action="append", dest="settings", default=[], metavar="NAME=VALUE",
                        help="a migration option; 'vmferry options' lists them")  # fmt: skip
    parser.add_argument(
        "--verify-disks",
        action="store_true",
        help="read and compare both sides' disks while the guest is paused (raw images)",
    )
    parser.add_argument("--multifd", type=int, default=0, metavar="N", help="send memory over N channels")
    parser.add_argument("--clear-text", action="store_true",
                        help="this guest's memory without encryption; only on a network you trust")  # fmt: skip
    parser.add_argument("--accept", action="append", default=[], metavar="CODE",
                        help="take a blocker upon yourself: the guest may be damaged")  # fmt: skip
    parser.add_argument("--postcopy-after-passes", type=int, metavar="N",
                        help="switch to postcopy after N passes over memory; 0: at once")  # fmt: skip
    parser.add_argument("--postcopy-after", metavar="TIME", help="switch to postcopy after this time, e.g. 10s")


def _add_policies(parser: Any) -> None:
    parser.add_argument("--on-storage-error", choices=("rollback", "hold", "ask"),
                        help="when the destination cannot take a disk and never ran the guest: back to the source "
                        "(the default), try until it can, or wait for a person")  # fmt: skip
    parser.add_argument("--on-postcopy-failure", choices=("run", "pause"),
                        help="when the channel breaks while the guest runs there and some of its memory is still here: "
                        "let it run until it touches a missing page (the default), or stop it at once")  # fmt: skip
    parser.add_argument("--retry-for", metavar="TIME",
                        help="how long to connect a broken postcopy again before a person is waited for, e.g. 10m "
                        "(default: for-ever)")  # fmt: skip


def _add_ending(parser: Any) -> None:
    parser.add_argument("--source-disks", choices=("keep", "remove"), default="keep",
                        help="what becomes of the images that it leaves behind when its disks go with it: keep them "
                        "(the default), or remove them when it has run there for the grace time")  # fmt: skip
    parser.add_argument("--grace", default="60s", metavar="TIME", help="with --source-disks remove (default: 60s)")
    parser.add_argument("--detach", action="store_true", help="return as soon as the agent has taken it on")
    parser.add_argument("--patience", default="10s", metavar="TIME",
                        help="how long to wait until an uncertain guest is settled (default: 10s)")  # fmt: skip
    parser.add_argument("--no-auto-finalize", action="store_true",
                        help="pause before the guest is handed over, until 'vmferry job finalize NAME'; for a minute, "
                        "then it runs on here")  # fmt: skip
    parser.add_argument("--no-auto-dismiss", action="store_true",
                        help="keep the job and its result in 'vmferry jobs' until it is dismissed")  # fmt: skip


def _add_migration_commands(commands: Any) -> None:
    migrate = _command(commands, "migrate", "migrate_cmd:migrate", "move a running VM to another host",
                       epilog=MIGRATE_EPILOG)  # fmt: skip
    _add_wish(migrate)
    _add_policies(migrate)
    _add_ending(migrate)
    back = _command(commands, "fail-back", "migrate_cmd:fail_back",
                    "move a VM back to where it came from with its disks",
                    epilog=FAIL_BACK_EPILOG)  # fmt: skip
    back.add_argument("vm", metavar="NAME")
    back.add_argument("--plan", action="store_true", help="only ask both hosts, and change nothing")
    _add_ways(back)
    _add_policies(back)
    _add_ending(back)
    plan = _command(commands, "plan", "migrate_cmd:plan",
                    "ask both hosts whether a VM can move; changes nothing")  # fmt: skip
    _add_wish(plan)
    watch = _command(commands, "watch", "migrate_cmd:watch", "follow a VM's migration until it ends")
    watch.add_argument("vm", metavar="NAME")
    watch.add_argument("--patience", default="10s", metavar="TIME", help=argparse.SUPPRESS)
    cancel = _command(commands, "cancel", "migrate_cmd:cancel", "cancel a VM's migration; it runs on here")
    cancel.add_argument("vm", metavar="NAME")
    change = _command(commands, "set", "migrate_cmd:change", "change options while a migration runs")
    change.add_argument("vm", metavar="NAME")
    change.add_argument("settings", nargs="+", metavar="NAME=VALUE")
    change.epilog = SET_EPILOG
    postcopy = _command(commands, "postcopy", "migrate_cmd:postcopy", "switch a migration to postcopy now")
    postcopy.add_argument("vm", metavar="NAME")


def _add_restore(commands: Any) -> None:
    disks = _command(commands, "disks", "vm_cmd:disks",
                     "list the disks that restores and saves made here, and who needs them",
                     epilog=DISKS_EPILOG)  # fmt: skip
    disks.add_argument("--remove", metavar="DISK", help="take this one away, for good; one that is needed stays")
    disks.add_argument("--force", action="store_true",
                       help="with --remove: also if a host or the repository cannot be asked whether it is needed "
                       "there")  # fmt: skip
    restore = _command(commands, "restore", "restore_cmd:restore", "bring a guest back from a snapshot",
                       epilog=RESTORE_EPILOG)  # fmt: skip
    restore.add_argument(
        "snapshot",
        metavar="NAME",
        help="the snapshot's name, or its id or the beginning of it, as 'vmferry snapshots' shows it",
    )
    restore.add_argument(
        "--lazy", action="store_true", help="run the guest at once; its memory follows as it is needed"
    )
    restore.add_argument("--as", dest="rename", default="", metavar="VM", help="the name that the guest gets")
    restore.add_argument("--spec", default="", metavar="FILE",
                         help="for a snapshot that was imported, and only for one: what its guest is made of, as "
                         "'vmferry run' takes it")  # fmt: skip
    restore.add_argument("--on", dest="host", default="", metavar="HOST",
                         help="restore it there; that agent's repository must have the snapshot")  # fmt: skip
    restore.add_argument("--paused", action="store_true", help="do not start the guest")
    restore.add_argument("--accept", action="append", default=[], metavar="CODE",
                         help="same-address: a card's address that another VM has on a network, too; unchecked-disk: "
                         "a disk on a device or of a --spec, which nobody has written to since")  # fmt: skip
    restore.add_argument("--trust-definition", action="store_true",
                         help="take arguments of QEMU out of the snapshot that this host does not know")  # fmt: skip
    restore.add_argument("--wait", action="store_true", help="with --lazy: until all of its memory is there")
    restore.add_argument("--detach", action="store_true", help="return as soon as the agent has taken it on")
    restore.add_argument("--no-auto-dismiss", action="store_true",
                         help="keep the job and its result in 'vmferry jobs' until it is dismissed")  # fmt: skip


def _add_jobs(commands: Any) -> None:
    _command(commands, "jobs", "job_cmd:jobs", "list this host's jobs, with their states and what they take")
    job = _command(commands, "job", "job_cmd:act", "steer one job, or read and dismiss it", epilog=JOB_EPILOG)
    job.add_argument(
        "verb", choices=("cancel", "pause", "resume", "change", "complete", "finalize", "dismiss"), metavar="VERB"
    )
    job.add_argument("job", metavar="JOB", help="its id, the beginning of it, or its VM")
    job.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="for change")
    block = _command(commands, "block", "job_cmd:block", "have an operation on a VM refused, with a reason",
                     epilog=BLOCK_EPILOG)  # fmt: skip
    block.add_argument("vm", metavar="NAME")
    block.add_argument("operation", choices=("migrate", "set", "stop", "snapshot"), metavar="OPERATION",
                       help="migrate, set (options of a migration), stop, or snapshot (to save it)")  # fmt: skip
    block.add_argument("name", metavar="BLOCKER", help="the name by which it is removed")
    block.add_argument("reason", metavar="REASON", help="what a person reads whom it stops")
    unblock = _command(commands, "unblock", "job_cmd:unblock", "remove a blocker")
    unblock.add_argument("vm", metavar="NAME")
    unblock.add_argument("name", metavar="BLOCKER")


def _add_snapshots(commands: Any) -> None:
    save = _command(commands, "save", "snapshot_cmd:save", "save a running VM as a snapshot; it goes on",
                    epilog=SAVE_EPILOG)  # fmt: skip
    save.add_argument("vm", metavar="VM")
    save.add_argument("name", metavar="NAME", help="the snapshot's; no other one of the repository may have it")
    save.add_argument("--pause", action="store_true", help="the guest stands still until its snapshot is there")
    save.add_argument("--way", choices=("auto", "precopy", "background"), default="auto",
                      help="how its memory is taken (default: auto)")  # fmt: skip
    save.add_argument("--disks", choices=("refuse", "mirror", "external-snapshot"), default="refuse",
                      help="what becomes of disks that the guest writes to (default: refuse)")  # fmt: skip
    save.add_argument("--disks-dir", default="", metavar="DIR",
                      help="with --disks mirror: the folder of the agent's host in which the copies are made, as an "
                      "absolute path (default: beside each disk)")  # fmt: skip
    save.add_argument("--detach", action="store_true", help="return as soon as the agent has taken it on")
    save.add_argument("--no-auto-finalize", action="store_true",
                      help="pause before the guest's last state is taken, until 'vmferry job finalize VM'; for a "
                      "minute, then it goes on unsaved")  # fmt: skip
    save.add_argument("--no-auto-dismiss", action="store_true",
                      help="keep the job and its result in 'vmferry jobs' until it is dismissed")  # fmt: skip
    _command(commands, "repository-init", "snapshot_cmd:init",
             "make the repository that this host's agent is configured with", epilog=INIT_EPILOG)  # fmt: skip
    _command(commands, "snapshots", "snapshot_cmd:snapshots", "list the snapshots of this host's repository")
    verify = _command(commands, "verify", "chore_cmd:verify",
                      "read every snapshot and name what is damaged",
                      epilog=VERIFY_EPILOG)  # fmt: skip
    verify.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="tell only what concerns this snapshot (its name, or the beginning of its id)",
    )
    verify.add_argument("--rebuild-indexes", action="store_true",
                        help="first make indexes that are missing or damaged again, from their packs")  # fmt: skip
    forget = _command(commands, "forget", "snapshot_cmd:forget", "take a snapshot away; 'prune' frees its room")
    forget.add_argument("name", metavar="NAME", help="its name, or its id or the beginning of it (8 digits or more)")
    prune = _command(commands, "prune", "chore_cmd:prune", "free the room of what no snapshot needs",
                     epilog=PRUNE_EPILOG)  # fmt: skip
    prune.add_argument("--dry-run", action="store_true", help="show the plan and do nothing")
    prune.add_argument("--empty-below", type=float, default=0.5, metavar="SHARE",
                       help="write packs anew of which less than this is needed (default: 0.5; 1: all that hold "
                       "anything useless)")  # fmt: skip
    prune.add_argument(
        "--drop-pins", metavar="HOST", help="HOST is lost for good: its guests need their snapshots no more"
    )
    prune.add_argument("--yes", action="store_true", help="carry the plan out without a question, for scripts")
    prune.add_argument("--no-auto-finalize", action="store_true",
                       help="show the plan, which waits for 'vmferry job finalize JOB', for an hour")  # fmt: skip
    export = _command(commands, "export", "chore_cmd:export", "write a snapshot as a plain stream file of QEMU's",
                      epilog=EXPORT_EPILOG)  # fmt: skip
    export.add_argument("name", metavar="NAME", help="its name, or its id or the beginning of it (8 digits or more)")
    export.add_argument("file", metavar="FILE", help="a new file on the agent's host")
    load = _command(commands, "import", "chore_cmd:load", "keep a plain stream file of QEMU's as a snapshot",
                    epilog=IMPORT_EPILOG)  # fmt: skip
    load.add_argument("file", metavar="FILE", help="a file on the agent's host")
    load.add_argument("name", metavar="NAME", help="the snapshot's")
    for chore in (verify, prune, export, load):
        chore.add_argument("--detach", action="store_true", help="return as soon as the agent has taken it on")
        chore.add_argument("--no-auto-dismiss", action="store_true",
                           help="keep the job and its result in 'vmferry jobs' until it is dismissed")  # fmt: skip


def _add_rescue(commands: Any) -> None:
    inspect = _command(commands, "inspect", "recover_cmd:inspect",
                       "read both hosts: where a guest is whole, and what to do now; changes nothing",
                       epilog=INSPECT_EPILOG)  # fmt: skip
    inspect.add_argument("vm", metavar="NAME")
    recover = _command(commands, "recover", "recover_cmd:recover",
                       "take the action that 'vmferry inspect' names")  # fmt: skip
    recover.add_argument("vm", metavar="NAME")
    recover.add_argument("--patience", default="10s", metavar="TIME",
                         help="how long to wait until the guest is settled (default: 10s)")  # fmt: skip
    resolve = _command(commands, "resolve", "recover_cmd:resolve",
                       "say what only a person can know of a guest in doubt", epilog=RESOLVE_EPILOG)  # fmt: skip
    resolve.add_argument("vm", metavar="NAME")
    resolve.add_argument("--other-side-is-dead", action="store_true",
                         help="your word that the destination's host or QEMU is dead and stays so. If it is wrong, "
                         "the guest may run twice and damage its disks")  # fmt: skip
    resolve.add_argument("--patience", default="10s", metavar="TIME", help=argparse.SUPPRESS)
    rescue = _command(commands, "rescue", "rescue_cmd:rescue", "lead a guest out of a migration that is stuck",
                      epilog=RESCUE_EPILOG)  # fmt: skip
    rescue.add_argument("vm", metavar="NAME")
    rescue.add_argument("tool", choices=("bring-back", "throw-away", "feed"))
    rescue.add_argument(
        "--run", dest="then_run", action="store_true", help="start the guest as soon as that is possible"
    )
    rescue.add_argument("--never-ran", action="store_true",
                        help="your word that the other side never ran the guest and that its QEMU is gone; needed "
                        "for a migration that this host does not conduct. If it is wrong, the guest may run "
                        "twice and damage its disks")  # fmt: skip


def _add_host_commands(commands: Any) -> None:
    _command(commands, "doctor", "host_cmd:doctor", "say whether this host is fit for migrations")
    _command(commands, "options", "host_cmd:options", "list the migration options", client=False)
    _command(commands, "exit-codes", "host_cmd:exit_codes", "list what exit codes mean", client=False)
    inspect = _command(commands, "inspect-stream", "inspect_cmd:inspect_stream",
                       "say what a recorded migration stream holds, or how two of them differ",
                       client=False)  # fmt: skip
    inspect.add_argument("file", metavar="FILE", help="the bytes of a main channel, or a mapped-ram file")
    inspect.add_argument("other", metavar="OTHER", nargs="?", help="show what differs between FILE and this one")
    inspect.add_argument("--fields", action="store_true", help="every field of every device")
    pki = _command(commands, "pki", "host_cmd:pki", "make certificates for a set-up of hosts", client=False,
                   epilog="example\n  vmferry pki /etc/vmferry/pki host-a=10.0.0.1 host-b=10.0.0.2\n\n"
                   "Copy DIR/HOST to its host and start the agent there with --pki. Keep DIR/ca safe.")  # fmt: skip
    pki.add_argument("directory", metavar="DIR")
    pki.add_argument("hosts", nargs="*", metavar="HOST=ADDRESS[,ADDRESS]")
    pki.add_argument("--days", type=int, metavar="N", help="how long the hosts' certificates last")
    pki.add_argument("--renew", action="store_true", help="new certificates for hosts that have one")


def _add_demo_and_bench(commands: Any) -> None:
    model = _command(commands, "model", "model_cmd:model",
                     "explore every interleaving of what decides, and small mistakes in it", client=False)  # fmt: skip
    model.add_argument("--no-mutants", action="store_true", help="only what really decides")
    model.add_argument("--only", metavar="WORD", default="", help="only settings and mutants with this in their name")
    model.add_argument(
        "--faults", type=int, metavar="N", help="this many faults in each run, instead of each setting's own"
    )
    model.add_argument("--processes", type=int, default=2, metavar="N", help="side by side (default: %(default)s)")
    demo = _command(commands, "demo", "demo_cmd:demo",
                    "boot a real Linux guest, migrate it between two agents, prove that it went on",
                    client=False)  # fmt: skip
    demo.add_argument("--mode", choices=("auto", "precopy", "postcopy"), default="auto")
    demo.add_argument("--memory", default="256M", metavar="SIZE")
    demo.add_argument("--dirty", type=int, default=20, metavar="MIB", help="MiB/s that the guest rewrites")
    demo.add_argument("--clear-text", action="store_true", help="without encryption")
    bench = _command(commands, "bench", "demo_cmd:bench", "measure against the raw thing", client=False)
    bench.add_argument("what", choices=("migrate", "stream", "monitor", "disks", "lazy"))
    bench.add_argument("--rounds", type=int, default=15, metavar="N", help="moves of each guest (default: %(default)s)")
    chaos = _command(commands, "chaos", "chaos_cmd:chaos",
                     "do faults to migrations on purpose, and let outsiders judge what became of the guests",
                     client=False)  # fmt: skip
    chaos.add_argument("--core", action="store_true", help="the part of the matrix that runs for each change")
    chaos.add_argument(
        "--only",
        default="",
        metavar="PATTERN",
        help="cells whose name holds or matches this, or one of several with commas between",
    )
    chaos.add_argument("--bare", action="store_true",
                       help="instead: the same faults against a bare QMP script, for comparison")  # fmt: skip
    chaos.add_argument("--list", action="store_true", help="name the cells and do nothing")
    chaos.add_argument("--save", metavar="FILE", help="write everything that docs/reliability.md is made from")
    chaos.add_argument("--logs", metavar="DIR", help="keep the agents' logs of runs that did not end well")
