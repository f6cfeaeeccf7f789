"""The one tree of errors: what a person, a script and a peer learn when something is refused or fails.

Theory of operation
-------------------
Every error answers five questions: whose fault (`side`), how is the guest (`guest`), may I retry
(`retry`), what now (`hint`), what caused it (`cause`, a chain that also crosses hosts). The class fixes the
exit code; the instance fills in the words. `to_wire` / `from_wire` carry an error between hosts as plain
values, so that the person at the source reads what the destination said.

Rule 1: an exit code belongs to exactly one class and is never reused. docs/exit-codes.md is made from here.
Rule 2: the message is one sentence and names the thing (VM, host, file, option) that it is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

Side = Literal["source", "destination", "both", "client", "network"]
Guest = Literal["unharmed", "paused", "unknown", "lost", "running-on-destination"]
Retry = Literal["yes", "after-fix", "no"]


class VmferryError(Exception):
    """Something went wrong that vmferry has no better word for."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "error"
    default_side: ClassVar[Side] = "client"
    default_guest: ClassVar[Guest] = "unharmed"
    default_retry: ClassVar[Retry] = "after-fix"
    default_hint: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        side: Side | None = None,
        guest: Guest | None = None,
        retry: Retry | None = None,
        hint: str | None = None,
        cause: Mapping[str, Any] | BaseException | str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.side: Side = side or self.default_side
        self.guest: Guest = guest or self.default_guest
        self.retry: Retry = retry or self.default_retry
        self.hint: str = hint if hint is not None else self.default_hint
        self.cause: dict[str, Any] | None = _cause_to_wire(cause)

    def to_wire(self) -> dict[str, Any]:
        """The error as plain values: `code`, `message`, `side`, `guest`, `retry`, `hint`, `cause`, `exit_code`."""
        return {
            "code": self.code,
            "message": self.message,
            "side": self.side,
            "guest": self.guest,
            "retry": self.retry,
            "hint": self.hint,
            "cause": self.cause,
            "exit_code": self.exit_code,
        }


def _cause_to_wire(cause: Mapping[str, Any] | BaseException | str | None) -> dict[str, Any] | None:
    match cause:
        case None:
            return None
        case str():
            return {"code": "text", "message": cause, "cause": None}
        case VmferryError():
            return cause.to_wire()
        case BaseException():
            text = str(cause) or type(cause).__name__
            return {"code": type(cause).__name__, "message": text, "cause": _cause_to_wire(cause.__cause__)}
        case _:
            return dict(cause)


class UsageError(VmferryError):
    """The command line or a value on it is malformed."""

    exit_code = 2
    code = "usage"
    default_hint = "mend the command line; 'vmferry COMMAND --help' explains it"


class SpecError(VmferryError):
    """A VM spec is malformed, or QEMU refuses it."""

    exit_code = 3
    code = "spec"
    default_hint = "mend the spec and run the command again"


class UnknownVm(VmferryError):
    """No known host has a VM of this name."""

    exit_code = 4
    code = "unknown-vm"
    default_hint = "'vmferry ls' shows every VM on every known host"


class UnknownHost(VmferryError):
    """The host is not among this agent's peers."""

    exit_code = 5
    code = "unknown-host"
    default_hint = "name one of the agent's peers, or add it with --peer NAME=ADDRESS:PORT"


class HostUnreachable(VmferryError):
    """The host's agent does not answer."""

    exit_code = 6
    code = "host-unreachable"
    default_side = "network"
    default_retry = "yes"
    default_hint = "check that the agent runs there and that its port is open"


class NotTrusted(VmferryError):
    """The peer's certificate is missing, expired, or not signed by this set-up's authority."""

    exit_code = 7
    code = "not-trusted"
    default_side = "destination"
    default_hint = "make certificates for both hosts with 'vmferry pki'"


class PlanRefused(VmferryError):
    """The guest cannot go there: at least one blocker stands; every blocker is listed at once."""

    exit_code = 8
    code = "refused"
    default_side = "destination"


class Busy(VmferryError):
    """The VM already has a migration, or one that is not cleaned up yet."""

    exit_code = 9
    code = "busy"
    default_side = "source"
    default_retry = "yes"
    default_hint = "wait for it ('vmferry watch NAME') or cancel it ('vmferry cancel NAME')"


class OptionLocked(VmferryError):
    """An option cannot be changed now; the message names the window that locks it."""

    exit_code = 10
    code = "option-locked"
    default_side = "source"
    default_retry = "yes"


class MigrationFailed(VmferryError):
    """The migration failed and the guest runs on the source as before."""

    exit_code = 11
    code = "failed"
    default_retry = "yes"


class MigrationCancelled(VmferryError):
    """The migration was cancelled; the guest runs on the source."""

    exit_code = 12
    code = "cancelled"
    default_side = "source"
    default_retry = "yes"


class Uncertain(VmferryError):
    """Nobody can say yet whether the destination runs the guest: both QEMUs are kept and nothing is undone."""

    exit_code = 13
    code = "uncertain"
    default_side = "network"
    default_guest = "unknown"
    default_retry = "no"


class GuestHeld(VmferryError):
    """The guest is whole but paused on purpose; one named action gets it going."""

    exit_code = 14
    code = "held"
    default_guest = "paused"
    default_retry = "no"


class GuestLost(VmferryError):
    """No complete copy of the guest's memory exists any more; the message lists what is lost."""

    exit_code = 15
    code = "lost"
    default_guest = "lost"
    default_retry = "no"


class AgentUnreachable(VmferryError):
    """The agent on this host does not answer on its control socket."""

    exit_code = 16
    code = "agent-unreachable"
    default_hint = "start it with 'vmferry agent', or name its socket with --socket"


class QemuError(VmferryError):
    """A QEMU cannot be started, does not answer, or refused a command."""

    exit_code = 17
    code = "qemu"
    default_side = "source"
    default_hint = (
        "look at QEMU's own log in the VM's directory ('vmferry status NAME' shows where), and at 'vmferry doctor'"
    )


class CancelRefused(VmferryError):
    """The migration is past its point of no return, so cancel is refused; it goes forward."""

    exit_code = 18
    code = "cancel-refused"
    default_side = "source"
    default_retry = "no"
    default_hint = "let it arrive ('vmferry watch NAME'); after that it can be moved back"


class Unfit(VmferryError):
    """The host is not fit for a task; the message says what is missing."""

    exit_code = 19
    code = "unfit"


class RemoteProtocolError(VmferryError):
    """A peer sent something that its protocol does not allow."""

    exit_code = 20
    code = "protocol"
    default_side = "network"


class RescueRefused(VmferryError):
    """A rescue tool does not fit the trouble, or the proof that it needs is missing; nothing was done."""

    exit_code = 21
    code = "rescue-refused"
    default_side = "source"
    default_guest = "paused"


class JobRefused(VmferryError):
    """The job does not take this verb in the state that it is in; nothing was done."""

    exit_code = 22
    code = "job-refused"
    default_side = "source"
    default_hint = "'vmferry jobs' shows each job's state and what it takes; all of them: docs/jobs.md"


class UnknownJob(VmferryError):
    """This agent lists no job of this id."""

    exit_code = 23
    code = "unknown-job"
    default_hint = "'vmferry jobs' lists the jobs of this host; one that was dismissed is not shown any more"


class Blocked(VmferryError):
    """Somebody holds a blocker against this operation on the VM; the message cites it. Nothing was done."""

    exit_code = 24
    code = "blocked"


class RepositoryError(VmferryError):
    """A repository of snapshots cannot be reached, is damaged, or refuses; the message names the object."""

    exit_code = 25
    code = "repository"


class FileFailed(VmferryError):
    """A file that was named cannot be written or read whole: no room, no right, a fault of its disk."""

    exit_code = 26
    code = "file"
    default_hint = "mend what the message says, or name a file elsewhere, and run the command again"


ERROR_CLASSES: tuple[type[VmferryError], ...] = (
    VmferryError, UsageError, SpecError, UnknownVm, UnknownHost, HostUnreachable, NotTrusted, PlanRefused,
    Busy, OptionLocked, MigrationFailed, MigrationCancelled, Uncertain, GuestHeld, GuestLost,
    AgentUnreachable, QemuError, CancelRefused, Unfit, RemoteProtocolError,
    RescueRefused, JobRefused, UnknownJob, Blocked, RepositoryError, FileFailed,
)  # fmt: skip
_BY_CODE = {cls.code: cls for cls in ERROR_CLASSES}
assert len(_BY_CODE) == len(ERROR_CLASSES), "two error classes share a code"
assert len({cls.exit_code for cls in ERROR_CLASSES}) == len(ERROR_CLASSES), "two classes share an exit code"


def from_wire(wire: Mapping[str, Any]) -> VmferryError:
    """The error that `to_wire` made, of the same class; an unknown code becomes a plain `VmferryError`."""
    cls = _BY_CODE.get(str(wire.get("code")), VmferryError)
    return cls(
        str(wire.get("message", "no message")),
        side=wire.get("side"),
        guest=wire.get("guest"),
        retry=wire.get("retry"),
        hint=wire.get("hint"),
        cause=wire.get("cause"),
    )


def docs_markdown() -> str:
    """The text of docs/exit-codes.md."""
    lines = [
        "# Exit codes",
        "",
        "<!-- made by tools/gen_docs.py from src/vmferry/errors.py; do not edit -->",
        "",
        "A code means one thing and is never reused. `--json` carries the same as `code` and `exit_code`, with the",
        "answers to five questions: whose fault (`side`), how is the guest (`guest`), may I try again (`retry`),",
        "what now (`hint`), what was the reason (`cause`, also from the other host). The columns show what a class",
        "says if it knows no better.",
        "",
        "| exit code | code | meaning | guest | try again | hint |",
        "|---|---|---|---|---|---|",
        "| 0 | | What was asked for is done. | | | |",
    ]
    for cls in ERROR_CLASSES:
        meaning = " ".join((cls.__doc__ or "").split())
        lines.append(
            f"| {cls.exit_code} | `{cls.code}` | {meaning} | {cls.default_guest} | {cls.default_retry} "
            f"| {cls.default_hint} |"
        )
    return "\n".join(lines) + "\n"
