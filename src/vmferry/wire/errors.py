"""What a peer did wrong on the wire: where, in which part of the stream, and which rule it broke."""

from __future__ import annotations

from typing import NoReturn

from vmferry.errors import RemoteProtocolError


class WireError(RemoteProtocolError):
    """A peer sent bytes that are no migration stream.

    `offset` counts from the first byte of its connection, `section` names the part of the stream, `reason` is
    one short word for programs; the message is for people.
    """

    def __init__(self, reason: str, message: str, *, offset: int, section: str) -> None:
        super().__init__(f"{section}, at byte {offset}: {message}")
        self.reason = reason
        self.offset = offset
        self.section = section


def refuse(reason: str, message: str, *, offset: int, section: str) -> NoReturn:
    """Raises the `WireError`."""
    raise WireError(reason, message, offset=offset, section=section)
