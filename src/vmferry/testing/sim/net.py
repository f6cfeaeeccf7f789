"""The ways between the simulated hosts: how long a message takes, and what is wrong with them.

Theory of operation
-------------------
There is a `Path` per kind of traffic ('agents', 'stream', 'local') and direction. What waits on a blocked path leaves
when it is free again, in its order. A connection whose data waited longer than its kernel's patience is broken for
the side that sent; the other side hears of it when the path is free (or never, which is what keepalives and questions
of agents are for).

Rule 1: everything that is left to chance is drawn from the run's own generator.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmferry.testing.sim.loop import VirtualLoop, pass_s

if TYPE_CHECKING:
    from vmferry.testing.sim.kernel import Socket

PATIENCE_S = {"agents": 15.0, "stream": 120.0, "local": float("inf")}
"""As agents set TCP_USER_TIMEOUT on each kind."""
LOCAL_S = 0.00005

Message = Callable[[], None]


@dataclass(eq=False)
class Path:
    """One direction between two hosts, for one kind of traffic."""

    kind: str
    source: str
    target: str
    latency_s: float
    jitter_s: float = 0.0
    is_blocked: bool = False
    drop: float = 0.0
    """Which share of the agents' messages never arrives."""
    double: float = 0.0
    """Which share arrives twice."""
    held: list[tuple[Socket, Message]] = field(default_factory=list)
    free: asyncio.Event = field(default_factory=asyncio.Event)


class Net:
    """All paths of a run."""

    def __init__(self, loop: VirtualLoop, chance: random.Random, latency_s: float) -> None:
        self._loop, self._chance, self._latency_s = loop, chance, latency_s
        self._paths: dict[tuple[str, str, str], Path] = {}

    def path(self, kind: str, source: str, target: str) -> Path:
        """The path of this kind and direction."""
        if source == target:
            kind = "local"
        key = (kind, source, target)
        if key not in self._paths:
            latency_s = LOCAL_S if kind == "local" else self._latency_s
            self._paths[key] = Path(kind, source, target, latency_s, latency_s / 4)
            self._paths[key].free.set()
        return self._paths[key]

    # --- traffic ---

    def carry(self, path: Path, sender: Socket, payload: Any) -> None:
        """Something for the sender's peer."""
        times = 1
        if path.drop and self._chance.random() < path.drop:
            return
        if path.double and self._chance.random() < path.double:
            times = 2
        for _ in range(times):
            self._put(path, sender, lambda: sender.peer.arrive(payload))

    def carry_end(self, path: Path, sender: Socket) -> None:
        """The sender ended the connection."""
        self._put(path, sender, lambda: sender.peer.broke("the other side closed it"))

    async def round_trip(self, source: str, target: str, kind: str) -> None:
        """There and back; on a blocked path it waits until both ways are free."""
        for path in (self.path(kind, source, target), self.path(kind, target, source)):
            await path.free.wait()
            await pass_s(self._way_s(path))

    def _way_s(self, path: Path) -> float:
        return path.latency_s + path.jitter_s * self._chance.random()

    def _put(self, path: Path, sender: Socket, message: Message) -> None:
        if not path.is_blocked:
            self._fly(path, sender, message)
            return
        if not path.held or all(waiting is not sender for waiting, _ in path.held):
            self._loop.call_later(PATIENCE_S[path.kind], self._give_up, path, sender, context=contextvars.Context())
        path.held.append((sender, message))

    def _fly(self, path: Path, sender: Socket, message: Message) -> None:
        arrives_s = max(self._loop.time() + self._way_s(path), sender.last_arrival_s)
        sender.last_arrival_s = arrives_s
        self._loop.call_at(arrives_s, message, context=contextvars.Context())  # no sender's death stops it

    def _give_up(self, path: Path, sender: Socket) -> None:
        """The kernel of the sender waited long enough."""
        mine = [message for waiting, message in path.held if waiting is sender]
        if not mine or not path.is_blocked:
            return
        path.held = [(waiting, message) for waiting, message in path.held if waiting is not sender]
        sender.broke("Connection timed out")
        path.held.append((sender, lambda: sender.peer.broke("Connection reset by peer")))

    # --- trouble ---

    def block(self, path: Path) -> None:
        """Nothing gets through, and nobody is told."""
        path.is_blocked = True
        path.free.clear()

    def unblock(self, path: Path) -> None:
        """It works again: what waited leaves now."""
        if not path.is_blocked:
            return
        path.is_blocked = False
        path.free.set()
        held, path.held = path.held, []
        for sender, message in held:
            self._fly(path, sender, message)

    def heal(self) -> None:
        """Every path is as good as on the first day."""
        for path in self._paths.values():
            path.drop = path.double = 0.0
            path.latency_s = LOCAL_S if path.kind == "local" else self._latency_s
            self.unblock(path)
