"""The meeting point of multifd: the main channel waits for a SYNC on every channel, and they wait for it.

Pages before a point must be in memory before pages after it, because the same page may travel on another channel the
next time (protocol, 12.4).

Rule 1: every wait ends when the barrier is broken; whoever breaks it has said why elsewhere.
"""

from __future__ import annotations

import threading

from vmferry.engine.wires import Gone
from vmferry.wire.errors import refuse


class Barrier:
    """For one main channel and `channels` others."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._changed = threading.Condition()
        self._arrived = 0
        self._ended = 0
        self._points = 0
        self._is_broken = False

    def arrive(self) -> None:
        """A channel delivered its SYNC: waits until the main channel has passed the point. Raises Gone."""
        with self._changed:
            before = self._points
            self._arrived += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._points != before or self._is_broken)
            if self._is_broken and self._points == before:
                raise Gone("the migration ended at a barrier")

    def pass_point(self, offset: int) -> None:
        """The main channel is at the point. Raises Gone, or WireError when a channel ended before its SYNC."""
        if self.channels == 0:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._arrived + self._ended >= self.channels or self._is_broken)
            if self._is_broken:
                raise Gone("the migration ended at a barrier")
            if self._arrived < self.channels:
                refuse("multifd-end", "a channel ended before its barrier", offset=offset, section="multifd")
            self._arrived = 0
            self._points += 1
            self._changed.notify_all()

    def end_channel(self) -> None:
        """A channel is over; it will not arrive any more."""
        with self._changed:
            self._ended += 1
            self._changed.notify_all()

    def break_up(self) -> None:
        """Everybody goes home: the endpoint stops, or a channel failed."""
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()
