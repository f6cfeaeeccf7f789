"""What a machine type says about the wire, whatever QEMU speaks it (protocol, section 1)."""

from __future__ import annotations

import re
from typing import Final

_VERSIONED = re.compile(r"-(\d+)\.(\d+)(?:\.\d+)?$")
NEWEST: Final = (1 << 30, 0)
"""A machine type without a version follows its QEMU, so it counts as newer than any."""


def version_of(machine: str) -> tuple[int, int]:
    """(11, 1) for pc-i440fx-11.1."""
    found = _VERSIONED.search(machine)
    return NEWEST if found is None else (int(found[1]), int(found[2]))


def has_flush_per_section(machine: str) -> bool:
    """Multifd: each end of a RAM section is a barrier, instead of each flush record."""
    return version_of(machine) <= (8, 0)


def has_early_preempt(machine: str) -> bool:
    """The preempt channel connects with the main one, and a record ends it."""
    return version_of(machine) <= (7, 2)


def has_legacy_zero_pages(machine: str) -> bool:
    """With multifd, zero pages travel on the main channel by default."""
    return version_of(machine) <= (8, 2)


def has_switchover_start(machine: str) -> bool:
    """The command SWITCHOVER_START may be sent to a destination of this machine type.

    Not if the type has no version: a QEMU before 10.0 may have it too, and ends at a command that it does not know,
    while no QEMU needs this one to load what we send.
    """
    return (10, 0) <= version_of(machine) < NEWEST


def wants_multifd_goodbye(machine: str) -> bool:
    """Under TLS, a multifd channel must end with a proper goodbye."""
    return version_of(machine) >= (10, 0)


def has_switchover_ack(machine: str) -> bool:
    """With the capability on, the source waits for one SWITCHOVER_ACK; a newer one fails because of it."""
    return version_of(machine) <= (11, 0)
