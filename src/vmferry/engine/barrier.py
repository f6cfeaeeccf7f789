"""Where threads of one migration wait for each other: for the block list, and at the barriers of multifd.

Pages before a barrier must be in memory before pages after it, because the same page may travel on another channel
the next time (protocol, 12.4).

Rule 1: the main channel's thread never waits here: it asks `try_pass`, and is woken when the answer may have changed,
        so that it notices orders, cuts and the end of its connection meanwhile.
Rule 2: every wait ends when the barrier is broken or the waiter's connection is cut.
Rule 3: a channel counts once it has introduced itself; a stranger's connection never counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmferry.engine.wires import Gone, Wire
from vmferry.wire.errors import refuse


class Gate:
    """Closed until the block list has come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.is_open = False

    def open(self) -> None:
        """The block list has come, or never will."""
        with self._changed:
            self.is_open = True
            self._changed.notify_all()

    def wait(self, wire: Wire) -> None:
        """Until it is open. Raises Gone when the connection is cut (and `shake` called) before."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_open or wire.is_cut)
        if not self.is_open:
            raise Gone("it was cut before the block list")

    def shake(self) -> None:
        """Connections were cut: the waiters look at theirs."""
        with self._changed:
            self._changed.notify_all()


class Barrier:
    """For one main channel and `channels` others. `wake_main` is called after each change."""

    def __init__(self, channels: int, wake_main: Callable[[], None]) -> None:
        self.channels = channels
        self._wake_main = wake_main
        self._changed = threading.Condition()
        self._introduced: set[int] = set()
        self._arrived = 0
        self._ended = 0
        self._points = 0
        self._is_broken = False

    def introduce(self, number: int) -> bool:
        """A channel says who it is; False: it is none of ours, or somebody else is it already."""
        with self._changed:
            is_ours = number < self.channels and number not in self._introduced
            if is_ours:
                self._introduced.add(number)
            return is_ours

    def arrive(self) -> None:
        """A channel delivered its SYNC: waits until the main channel has passed the point. Raises Gone."""
        with self._changed:
            before = self._points
            self._arrived += 1
            self._wake_main()
            self._changed.wait_for(lambda: self._points != before or self._is_broken)
            if self._points == before:
                raise Gone("the migration ended at a barrier")

    @property
    def has_all(self) -> bool:
        """Every channel has introduced itself."""
        with self._changed:
            return len(self._introduced) == self.channels

    def try_pass(self, offset: int) -> bool:
        """The main channel is at the point: whether it may go on.

        Raises Gone when the barrier is broken, WireError when a channel ended before its SYNC.
        """
        with self._changed:
            if self._is_broken:
                raise Gone("the migration ended at a barrier")
            if self._arrived + self._ended < self.channels:
                return False
            if self._arrived < self.channels:
                refuse("multifd-end", "a channel ended before its barrier", offset=offset, section="multifd")
            self._arrived = 0
            self._points += 1
            self._changed.notify_all()
            return True

    def end_channel(self) -> None:
        """A channel that was introduced is over; it will not arrive any more."""
        with self._changed:
            self._ended += 1
            self._wake_main()

    def break_up(self) -> None:
        """Everybody goes home: the main channel has ended, or the endpoint stops."""
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()
            self._wake_main()
