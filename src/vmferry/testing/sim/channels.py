"""Connections between simulated agents: the channel of the memory, its door, and the door of a broken postcopy.

Rule 1: what an end does to its connection it does through the kernel, which knows who else holds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from vmferry.agent import knock
from vmferry.agent.channel import Address, ChannelEnd, Ticket
from vmferry.agent.knock import OnCaller
from vmferry.errors import HostUnreachable, Unfit
from vmferry.testing.sim.kernel import Kernel, SimProcess, Socket


class SimChannel:
    """One end of a migration channel."""

    def __init__(self, kernel: Kernel, agent: SimProcess, name: str, sock: Socket) -> None:
        self.name = name
        self._kernel, self._agent, self._sock = kernel, agent, sock
        self._descriptor = kernel.give(agent, sock)
        self._is_ours = True
        self._is_cut = False
        self._pid = 0

    def fileno(self) -> int:
        return self._descriptor

    @property
    def is_entrusted(self) -> bool:
        return self._pid > 0

    @property
    def is_cut(self) -> bool:
        return self._is_cut

    def entrust(self, pid: int) -> bool:
        self._pid = pid
        self._give_up()
        return True

    async def spoken(self, *, deadline_s: float) -> bool:
        """A simulated QEMU may have the connection before the first message."""
        return True

    def is_held_by(self, pid: int) -> bool:
        return any(holder.pid == pid for holder in self._sock.holders)

    def cut(self) -> None:
        self._is_cut = True
        if self._is_ours or self.is_held_by(self._pid):
            self._sock.shut("cut")

    def close(self) -> None:
        self._is_cut = True
        self._give_up()
        self._pid = 0

    def give_away(self) -> Socket:
        """The connection, for somebody in this agent who takes it over."""
        sock = self._sock.held_by(self._agent)
        self.close()
        return sock

    def _give_up(self) -> None:
        if self._is_ours:
            self._is_ours = False
            self._kernel.close(self._descriptor)


class SimRelay(SimChannel):
    """A channel whose bytes go through the agent. Its QEMU is connected to when the first of them is there."""

    def __init__(self, kernel: Kernel, agent: SimProcess, channel: SimChannel, path: str) -> None:
        super().__init__(kernel, agent, channel.name, channel.give_away())
        self._path = path
        self._inner: Socket | None = None
        self._early: list[Any] = []
        self._sock.read(agent, self._from_source, self._ended)

    @property
    def is_entrusted(self) -> bool:
        return True

    def is_held_by(self, pid: int) -> bool:
        return not self._is_cut

    def cut(self) -> None:
        super().cut()
        if self._inner is not None:
            self._inner.shut("cut")

    def close(self) -> None:
        """The relay ends with its connection."""

    def _from_source(self, payload: Any) -> None:
        if self._inner is not None:
            self._inner.send(payload)
            return
        self._early.append(payload)
        if len(self._early) == 1:
            self._agent.spawn(self._connect(), f"relay {self.name}")

    async def _connect(self) -> None:
        try:
            inner = await self._kernel.connect(self._agent, self._agent.host, self._path, "local")
        except OSError:
            self.cut()
            return
        self._inner = inner
        if self._is_cut:
            inner.shut("cut")
            return
        for payload in self._early:
            inner.send(payload)
        inner.read(self._agent, self._sock.send, self._ended)

    def _ended(self, reason: str) -> None:
        """Of either side; what was sent before travels ahead of the end."""
        self.cut()
        self._give_up()
        if self._inner is not None:
            self._inner.let_go(self._agent)


class SimDoor:
    """Where a job's channels arrive. The greeting is the ticket itself: its bytes are `agent.channel`'s own tests' to
    show."""

    def __init__(self, kernel: Kernel, agent: SimProcess, job: str) -> None:
        self._kernel, self._agent, self._job = kernel, agent, job
        self._tickets: dict[str, Ticket] = {}
        self._arrivals: dict[str, asyncio.Future[SimChannel]] = {}
        port = kernel.listen(agent, 0, self._accept, f"stream {job}")
        self.addresses: tuple[Address, ...] = ((agent.host, port),)

    def expect(self, channel: str) -> Ticket:
        ticket = Ticket(self._job, channel, channel.encode().ljust(32, b"\0"))
        self._tickets[channel] = ticket
        self._arrivals[channel] = asyncio.get_running_loop().create_future()
        return ticket

    async def arrived(self, channel: str, *, deadline_s: float) -> ChannelEnd:
        arrival = self._arrivals[channel]
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(arrival)
        except TimeoutError as error:
            self._tickets.pop(channel, None)
            if arrival.cancel():
                del self._arrivals[channel]
                sentence = f"the source did not open the {channel} channel of job {self._job} in {deadline_s:g} s"
                raise HostUnreachable(sentence, side="source") from error
        del self._arrivals[channel]
        return arrival.result()

    async def close(self) -> None:
        for address in self.addresses:
            self._kernel.unlisten(address, self._agent)
        self._tickets.clear()
        for arrival in self._arrivals.values():
            if not arrival.cancel() and not arrival.cancelled():
                arrival.result().close()
        self._arrivals.clear()

    def _accept(self, sock: Socket) -> None:
        sock.read(self._agent, lambda payload: self._greeted(sock, payload), lambda reason: sock.let_go(self._agent))

    def _greeted(self, sock: Socket, payload: object) -> None:
        assert isinstance(payload, Ticket)
        ticket = self._tickets.pop(payload.channel, None)
        arrival = self._arrivals.get(payload.channel)
        if ticket != payload or arrival is None or arrival.done():
            sock.let_go(self._agent)
            return
        sock.unread()
        sock.send("welcome")
        arrival.set_result(SimChannel(self._kernel, self._agent, payload.channel, sock))


class SimCaller:
    """A source's agent that has shown the token."""

    def __init__(self, kernel: Kernel, agent: SimProcess, sock: Socket) -> None:
        self.channel: ChannelEnd = SimChannel(kernel, agent, knock.NAME, sock)
        self._sock = sock

    def has_hung_up(self) -> bool:
        return self._sock.is_over

    def answer(self, word: dict[str, Any]) -> None:
        if self._sock.is_over:
            raise HostUnreachable("the source does not wait any more", side="source")
        self._sock.send(dict(word))


class SimKnockDoor:
    """Where the source of a broken postcopy may call. The greeting is the token: its bytes are `agent.knock`'s own
    tests' to show."""

    def __init__(
        self, kernel: Kernel, agent: SimProcess, job: str, token: str, ports: Sequence[int], on_caller: OnCaller
    ) -> None:
        self._kernel, self._agent, self._token, self._on_caller = kernel, agent, token, on_caller
        for port in ports:
            if (agent.host, port) not in kernel.listeners:
                kernel.listen(agent, port, self._accept, f"door {job}")
                break
        else:
            raise Unfit("no port is free", side="destination")
        self.addresses: tuple[Address, ...] = ((agent.host, port),)

    async def close(self) -> None:
        for address in self.addresses:
            self._kernel.unlisten(address, self._agent)

    def _accept(self, sock: Socket) -> None:
        sock.read(self._agent, lambda payload: self._greeted(sock, payload), lambda reason: sock.let_go(self._agent))

    def _greeted(self, sock: Socket, payload: object) -> None:
        if payload != self._token:
            sock.let_go(self._agent)
            return
        sock.unread()
        caller = SimCaller(self._kernel, self._agent, sock)
        self._agent.spawn(_served(self._on_caller, caller), "recovery-call")


async def _served(on_caller: OnCaller, caller: SimCaller) -> None:
    await on_caller(caller)
