"""What can go wrong on a QMP connection; all of them are `QemuError`, so they share its exit code.

Rule 1: none of these claims more about the guest than the connection knows. A command that QEMU refused had
no effect, so the guest is as it was; after a silence or a broken connection nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmferry.errors import QemuError, VmferryError, from_wire


class QmpCommandError(QemuError):
    """A QMP server refused a command.

    `qmp_class` and `desc` are the server's words, `command` is what was asked. `remote` is the error of a
    vmferry agent at the other end, rebuilt in its own class, or None when QEMU itself refused.
    """

    def __init__(
        self, command: str, qmp_class: str, desc: str, *, peer: str, data: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(f"{peer} refused {command}: {desc}", cause=data)
        self.command = command
        self.qmp_class = qmp_class
        self.desc = desc
        self.remote: VmferryError | None = None if data is None else from_wire(data)
        if self.remote is not None:
            self.side, self.guest = self.remote.side, self.remote.guest
            self.retry, self.hint = self.remote.retry, self.remote.hint


class QmpTimeout(QemuError):
    """A QMP server did not answer in time; the session stays usable and a late answer is dropped.

    `was_sent` False means that the command never left, so it had and will have no effect.
    """

    default_guest = "unknown"
    default_retry = "yes"

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message, guest=None if was_sent else "unharmed")
        self.was_sent = was_sent


class QmpDisconnected(QemuError):
    """The connection to a QMP server is gone or never was; whether the last command ran is not known."""

    default_guest = "unknown"
    default_retry = "yes"
