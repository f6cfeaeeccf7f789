"""Relays in the way of the memory stream, one per port that a destination offers, all treated alike.

Made when an offer passes the link's proxy, in the destination's network: what crosses the cable is the source QEMU's
own connection.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from vmferry.agent.channel import REPLY_BYTES
from vmferry.testing.relay import Direction, Relay

DOORS = 2
"""Ports at which a place may be called that get a relay: the first is free unless another run has it."""


class Streams:
    """All relays of one pair of hosts. `rewrite` is what `LinkProxy` calls with an offer."""

    def __init__(self) -> None:
        self._relays: dict[tuple[str, int], Relay] = {}
        self._lock = threading.Lock()
        self._is_refusing = False
        self._bytes_per_s: float | None = None
        self._is_held = False
        self._is_held_back = False

    def rewrite(self, offer: dict[str, Any]) -> None:
        """Puts our relay's address in the place of each of the destination's."""
        offer["addresses"] = [list(self._relay((str(host), int(port)))) for host, port in offer.get("addresses", [])]
        way = offer.get("recovery")
        if way:  # the destination's door is behind relays of ours, too: what is cut is cut for calls there as well
            host = str(way["hosts"][0])
            doors = [self._relay((host, int(port))) for port in way["ports"][:DOORS]]
            offer["recovery"] = {**way, "hosts": [host], "ports": [port for _, port in doors]}

    def _relay(self, target: tuple[str, int]) -> tuple[str, int]:
        with self._lock:
            relay = self._relays.get(target)
            if relay is None:
                relay = self._relays[target] = Relay(target, listen=(target[0], 0))
                relay.refuse(refusing=self._is_refusing)
                relay.to_target.throttle(self._bytes_per_s)
                if self._is_held:
                    relay.to_target.hold()
                if self._is_held_back:
                    relay.to_client.hold()
            address = relay.address
        assert not isinstance(address, str)
        return address

    @property
    def ports(self) -> list[int]:
        """Where the relays listen."""
        return [int(relay.address[1]) for relay in self._relays.values()]

    def hold(self) -> None:
        """What the source sends gets no further."""
        self._is_held = True
        self._each(lambda relay: relay.to_target.hold())

    def hold_back(self) -> None:
        """What the destination answers gets no further."""
        self._is_held_back = True
        self._each(lambda relay: relay.to_client.hold())

    def hold_back_new(self) -> None:
        """The same for the next connection, and only when it is greeted: two agents have agreed on it, and what the
        destination's QEMU answers on it gets no further."""

        def hold_when_greeted(relay: Relay) -> None:
            relay.to_client.at_offset(REPLY_BYTES, relay.to_client.hold)

        self._each(hold_when_greeted)

    def throttle(self, bytes_per_s: float | None) -> None:
        """So much per second from the source."""
        self._bytes_per_s = bytes_per_s
        self._each(lambda relay: relay.to_target.throttle(bytes_per_s))

    def let_go(self) -> None:
        """No hold and no brake any more."""
        self._is_held = self._is_held_back = False
        self.throttle(None)
        self._each(lambda relay: relay.to_target.release())
        self._each(lambda relay: relay.to_client.release())

    def cut(self, *, refusing: bool) -> None:
        """Resets the connections; `refusing`: none can be made again until `refuse(False)`."""
        self.refuse(refusing=refusing)
        self._each(lambda relay: relay.cut(reset=True))

    def refuse(self, *, refusing: bool) -> None:
        """Whether new connections are closed at once."""
        self._is_refusing = refusing
        self._each(lambda relay: relay.refuse(refusing=refusing))

    def passed(self) -> int:
        """Bytes that went on to the destination."""
        return sum(relay.to_target.passed_bytes for relay in self._relays.values())

    def forget(self) -> None:
        """Ends every relay: the next run gets its own."""
        with self._lock:
            relays, self._relays = list(self._relays.values()), {}
            self._is_refusing, self._bytes_per_s = False, None
            self._is_held = self._is_held_back = False
        with contextlib.ExitStack() as stack:
            for relay in relays:
                stack.callback(relay.stop)

    def _each(self, what: Callable[[Relay], None]) -> None:
        with self._lock:
            relays = list(self._relays.values())
        for relay in relays:
            what(relay)


__all__ = ["Direction", "Streams"]
