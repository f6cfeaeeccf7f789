"""What becomes of each command that a client of a VM's monitor says. Pure.

Theory of operation
-------------------
What would move the guest is answered by vmferry (`Fate.OURS`). While the guest
is on its way, is saved, or is about to run after a restore, a command goes to QEMU only if it is known to change
nothing of that (`PASSES`, `LINES_PASS`). Every other one waits until it is over (`Fate.HELD`), a command that nobody
here has heard of among them. The list says what may pass and not what may not: what is left out of it by mistake is
refused in words, and what would be passed by mistake loses the guest's writes:

    1. a disk is on storage that both hosts share, and the guest is on its way  2. a nightly backup takes a snapshot:
    the guest writes to an overlay from then on  3. the guest is paused, and the destination opens the image that it
    was started with  4. it runs there, without everything that was written since 2

Rule 1: a line for people is no way around: its word has the same fates.
Rule 2: jobs, nodes, exports, bitmaps and objects that vmferry makes in a QEMU have names that begin with `OWN`. They
        are never changed from outside, at no time: what a bitmap counts decides what goes back with a guest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from vmferry.core.blockers import Operation


class Fate(StrEnum):
    """What becomes of a command."""

    PASSED = "passed"
    OURS = "ours"
    HELD = "held"
    """Passed on, but not while the guest is on its way."""
    NEVER = "never"


OWN: Final = "vmferry-"
OURS: Final[frozenset[str]] = frozenset(
    {
        "migrate", "migrate-incoming", "migrate_cancel", "migrate-pause", "migrate-recover", "migrate-continue",
        "migrate-start-postcopy", "migrate-set-parameters", "migrate-set-capabilities", "query-migrate",
        "query-migrate-parameters", "query-migrate-capabilities", "query-jobs",
        "job-cancel", "job-pause", "job-resume", "job-complete", "job-finalize", "job-dismiss", "job-change",
    }
)  # fmt: skip
NEVER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "getfd": "a file descriptor cannot be passed on to QEMU here",
        "add-fd": "a file descriptor cannot be passed on to QEMU here",
    }
)
PASSES: Final[frozenset[str]] = frozenset(
    {
        # They look.
        "qom-list", "qom-get", "qom-list-get", "qom-list-types", "qom-list-properties", "device-list-properties",
        "trace-event-get-state", "ringbuf-read", "screendump", "dumpdtb", "xen-event-list",
        # What a person at the guest's keyboard, its network or its host could do as well.
        "send-key", "input-send-event", "ringbuf-write", "chardev-send-break", "inject-nmi", "announce-self",
        "set_link", "balloon", "rtc-reset-reinjection",
        # Displays and their passwords, traces and statistics of this process: they stay behind with it.
        "set_password", "expire_password", "change-vnc-password", "client_migrate_info", "display-reload",
        "display-update", "trace-event-set-state", "block-latency-histogram-set", "block-set-write-threshold",
        # How fast a disk may be, and a job of a client's own: it goes on, slows down, is given up or forgotten. Not its
        # end: that may change what the guest writes to.
        "block_set_io_throttle", "block-job-pause", "block-job-resume", "block-job-set-speed", "block-job-dismiss",
    }
)  # fmt: skip
_LOOKS: Final = ("query-", "x-query-")
JOBS_PASS: Final = frozenset({"job-pause", "job-resume", "job-cancel", "job-dismiss"})
"""Verbs for jobs of QEMU's own that pass while the guest is on its way; `job-complete` and `job-finalize` do not: with
them a client's mirror puts another image under the guest."""
LINES_PASS: Final = frozenset(
    {
        "", "help", "?", "info", "print", "p", "x", "xp", "sum", "gpa2hva", "gpa2hpa", "gva2gpa", "qom-list", "qom-get",
        "sendkey", "mouse_move", "mouse_button", "mouse_set", "screendump", "nmi", "announce_self", "balloon",
        "set_link",
    }
)  # fmt: skip
_SNAPSHOTS: Final = ("snapshot-save", "blockdev-snapshot", "blockdev-snapshot-sync", "blockdev-snapshot-internal-sync")
OPERATIONS: Final[Mapping[str, Operation]] = MappingProxyType(
    {
        **dict.fromkeys(("quit", "system_powerdown"), Operation.STOP),
        **dict.fromkeys(_SNAPSHOTS, Operation.SNAPSHOT),
    }
)
"""Commands that are what a person can hold a blocker against."""
LINE_OPERATIONS: Final[Mapping[str, Operation]] = MappingProxyType(
    {
        **dict.fromkeys(("q", "quit", "system_powerdown"), Operation.STOP),
        **dict.fromkeys(("savevm", "snapshot_blkdev", "snapshot_blkdev_internal"), Operation.SNAPSHOT),
    }
)
_MAY_BE_TAKEN_AWAY: Final = "block-dirty-bitmap-remove"
"""A disk whose bitmap is gone goes as a whole: nothing is wrong then."""


def fate(name: str, arguments: Mapping[str, Any]) -> tuple[Fate, str]:
    """What becomes of this command, and for one that is never passed on the reason."""
    if name in OURS:
        return Fate.OURS, ""
    if name in NEVER:
        return Fate.NEVER, NEVER[name]
    if name == "human-monitor-command":
        return _of_line(str(arguments.get("command-line", "")))
    if name in PASSES or name.startswith(_LOOKS):
        return _never_if_own(name, arguments) if name.startswith("block-job-") else (Fate.PASSED, "")
    own, why = _never_if_own(name, arguments)
    return (own, why) if own is Fate.NEVER else (Fate.HELD, "")


def _never_if_own(name: str, arguments: Mapping[str, Any]) -> tuple[Fate, str]:
    found = next(own_names(name, arguments), None)
    return (Fate.PASSED, "") if found is None else (Fate.NEVER, not_yours(found))


def not_yours(name: str) -> str:
    """Why a thing with this name is not changed."""
    return f"{name} is vmferry's own, and nobody else changes it"


def own_names(name: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """The names of vmferry's things that the command would change."""
    if name == "transaction":
        for kind, data in _actions(arguments):
            yield from own_names(kind, data)
    elif name == "block-dirty-bitmap-merge":  # what it reads from is not changed
        yield from _own({"node": arguments.get("node"), "target": arguments.get("target")})
    elif name == _MAY_BE_TAKEN_AWAY:
        yield from _own(arguments.get("node"))
    else:
        yield from _own(arguments)


def _actions(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What a transaction does: the type of each action, and its data."""
    actions = arguments.get("actions")
    for action in actions if isinstance(actions, list) else ():
        if isinstance(action, dict):
            data = action.get("data")
            yield str(action.get("type")), data if isinstance(data, dict) else {}


def operation(name: str, arguments: Mapping[str, Any]) -> Operation | None:
    """What people can hold a blocker against, and this command would do; None: no such thing."""
    if name == "human-monitor-command":
        return LINE_OPERATIONS.get(line_word(str(arguments.get("command-line", ""))))
    if name == "transaction":
        return next((OPERATIONS[kind] for kind, _ in _actions(arguments) if kind in OPERATIONS), None)
    return OPERATIONS.get(name)


def _own(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.startswith(OWN):
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _own(each)
    elif isinstance(value, list):
        for each in value:
            yield from _own(each)


def line_word(line: str) -> str:
    """The command of a line for people, as QEMU reads it: `info/x` is `info`."""
    return re.split(r"[\s/]", line.lstrip(), maxsplit=1)[0]


def _of_line(line: str) -> tuple[Fate, str]:
    word = line_word(line)
    if word.startswith("migrate"):
        return Fate.NEVER, f"use the command {word.replace('_', '-')} itself: vmferry moves this guest"
    if word in LINES_PASS:
        return Fate.PASSED, ""
    own = next(_own(line.split()), None)
    return (Fate.HELD, "") if own is None else (Fate.NEVER, not_yours(own))
