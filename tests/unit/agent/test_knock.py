"""The call of a source's agent at the destination's door: who holds the token gets one word, nobody else gets anything.

The checks are the contract of both sides; what goes to QEMU is behind the word, byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.channel_ends import LOOPBACK, is_hung_up, unused_port
from vmferry import limits
from vmferry.agent import channel as channels
from vmferry.agent import knock
from vmferry.agent.channel import Channel
from vmferry.agent.knock import Caller, KnockListener
from vmferry.agent.wants import RecoveryWay
from vmferry.errors import HostUnreachable, NotTrusted, Unfit

TOKEN = bytes(range(32)).hex()
JOB = "job-1"
WORD = {"taken": True, "channel": "vmferry-round-1", "uri": "", "facts": {"job": JOB}}


class Door:
    """A listener that keeps its callers and says `word` to each, unless that is None."""

    def __init__(self, word: dict[str, Any] | None = WORD, *, more: bytes = b"") -> None:
        self.callers: list[Caller] = []
        self.came = asyncio.Event()
        self._word, self._more = word, more

    async def __call__(self, caller: Caller) -> None:
        self.callers.append(caller)
        self.came.set()
        if self._word is not None:
            caller.answer(self._word)
            if self._more:
                os.write(caller.channel.fileno(), self._more)


@contextlib.asynccontextmanager
async def listening(
    on_caller: Door, *, token: str = TOKEN, job: str = JOB, greeting_s_max: float = 2.0, port: int = 0
) -> AsyncIterator[KnockListener]:
    servers = channels.bind_all((LOOPBACK,), (port,))
    listener = KnockListener(job, token, servers, on_caller, greeting_s_max=greeting_s_max)
    try:
        yield listener
    finally:
        await listener.close()
        for caller in on_caller.callers:
            caller.channel.close()


def way(*ports: int, token: str = TOKEN) -> RecoveryWay:
    return RecoveryWay(token=token, hosts=(LOOPBACK,), ports=ports)


def port_of(listener: KnockListener) -> int:
    return listener.addresses[0][1]


async def test_who_has_the_token_hears_the_word_and_not_one_byte_more_is_read() -> None:
    door = Door(more=b"QEMU's first byte")
    async with listening(door) as listener:
        channel, word = await knock.call(JOB, way(port_of(listener)))
        assert word == WORD
        assert isinstance(channel, Channel)
        given = channel.hand_over()
        assert given.getblocking()
        assert given.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        given.settimeout(2)
        assert given.recv(100) == b"QEMU's first byte"
        given.sendall(b"resume")
        theirs = door.callers[0].channel
        assert os.read(theirs.fileno(), 100) == b"resume"
        channel.close()


@pytest.mark.parametrize("is_nonblocking", [False, True])
async def test_the_word_leaves_whatever_qemu_has_made_of_the_socket(is_nonblocking: bool) -> None:
    door = Door(None)
    async with listening(door) as listener:
        calling = asyncio.create_task(knock.call(JOB, way(port_of(listener))))
        await door.came.wait()
        os.set_blocking(door.callers[0].channel.fileno(), not is_nonblocking)
        door.callers[0].answer(WORD)
        channel, word = await calling
        assert word == WORD
        channel.close()


async def test_a_second_call_is_another_call() -> None:
    door = Door()
    async with listening(door) as listener:
        for _ in range(2):
            channel, _ = await knock.call(JOB, way(port_of(listener)))
            channel.close()
        assert len(door.callers) == 2


async def test_what_was_heard_on_the_line_opens_nothing_later() -> None:
    """Somebody between the two hears a whole call, and says the same again."""
    door = Door()
    async with listening(door) as listener:
        said: list[bytes] = []

        async def listen_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(LOOPBACK, port_of(listener))

            async def back() -> None:
                while data := await far_reader.read(1000):
                    writer.write(data)

            backward = asyncio.create_task(back())
            while data := await reader.read(1000):
                said.append(data)
                far_writer.write(data)
            backward.cancel()
            far_writer.close()
            writer.close()

        spy = await asyncio.start_server(listen_in, LOOPBACK, 0)
        channel, word = await knock.call(JOB, way(spy.sockets[0].getsockname()[1]))
        assert word == WORD
        channel.cut()
        channel.close()
        spy.close()
        assert len(b"".join(said)) == 56 + channels.GREETING_BYTES
        reader, writer = await asyncio.open_connection(LOOPBACK, port_of(listener))
        writer.write(b"".join(said))
        assert len(await reader.readexactly(knock.NONCE_BYTES)) == knock.NONCE_BYTES
        assert await is_hung_up(reader)
        writer.close()
        assert len(door.callers) == 1


@pytest.mark.parametrize(
    "hello",
    [b"", b"x", b"GET / HTTP/1.1\r\n" * 9, b"VMFERRY\x01" + bytes(72), b"VMFERRY\x02" + bytes(48), bytes(4096)],
)
async def test_a_stranger_hears_nothing(hello: bytes) -> None:
    door = Door()
    async with listening(door, greeting_s_max=0.2) as listener:
        reader, writer = await asyncio.open_connection(LOOPBACK, port_of(listener))
        writer.write(hello)
        assert await is_hung_up(reader)
        writer.close()
        channel, _ = await knock.call(JOB, way(port_of(listener)))
        channel.close()
        assert listener.strangers_dropped == 1
        assert len(door.callers) == 1


async def test_one_who_knows_the_job_and_not_the_token_gets_a_nonce_and_nothing_else() -> None:
    door = Door()
    async with listening(door) as listener:
        with pytest.raises(HostUnreachable, match="hung up"):
            await knock.call(JOB, way(port_of(listener), token=bytes(32).hex()))
        with pytest.raises(HostUnreachable, match="hung up"):
            await knock.call("job-2", way(port_of(listener)))
        assert not door.callers


async def test_silent_strangers_are_bounded_and_the_source_gets_in() -> None:
    door = Door()
    async with listening(door, greeting_s_max=30.0) as listener:
        squatters = [await asyncio.open_connection(*listener.addresses[0]) for _ in range(channels.STRANGERS_MAX + 4)]
        channel, _ = await knock.call(JOB, way(port_of(listener)))
        channel.close()
        assert await is_hung_up(squatters[0][0])
        for _, writer in squatters:
            writer.close()


async def test_the_port_of_somebody_else_is_passed_over() -> None:
    """Nobody, another job's door, an impostor who says what he likes: the next port is tried."""
    door, other = Door(), Door()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(4096))
        await reader.read()
        writer.close()

    lies = await asyncio.start_server(impostor, LOOPBACK, 0)
    async with listening(door) as listener, listening(other, job="job-2", token=bytes(32).hex()) as stranger:
        ports = (unused_port(), port_of(stranger), lies.sockets[0].getsockname()[1], port_of(listener))
        channel, word = await knock.call(JOB, way(*ports))
        assert word == WORD
        channel.close()
        with pytest.raises(NotTrusted, match="answered without the token"):
            await knock.call(JOB, way(*ports[:3]))
    lies.close()
    assert not other.callers


async def test_nobody_there_is_an_unreachable_host() -> None:
    with pytest.raises(HostUnreachable, match="Connection refused"):
        await knock.call(JOB, way(unused_port()))
    with pytest.raises(HostUnreachable, match="nowhere to call"):
        await knock.call(JOB, way())


async def test_a_silent_port_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECOVERY_CONNECT_S", 0.1)
    with socket.create_server((LOOPBACK, 0)) as silent, pytest.raises(HostUnreachable, match="did not answer"):
        await knock.call(JOB, way(silent.getsockname()[1], unused_port()))


async def test_no_word_in_time_is_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECOVERY_WORD_S", 0.1)
    door = Door(None)
    async with listening(door) as listener:
        with pytest.raises(HostUnreachable, match="said no word"):
            await knock.call(JOB, way(port_of(listener)))
        await door.came.wait()
        assert door.callers[0].has_hung_up()
        door.callers[0].channel.cut()
        with pytest.raises(HostUnreachable):
            door.callers[0].answer(WORD)


@pytest.mark.parametrize("spoilt", ["proof", "length", "text", "no object", "end"])
async def test_a_word_without_its_proof_is_no_word(spoilt: str) -> None:
    """Somebody on the line changes what is said."""

    class Spoiler(Door):
        async def __call__(self, caller: Caller) -> None:
            self.callers.append(caller)
            ticket = caller._ticket  # type: ignore[attr-defined]
            good = knock.seal(ticket, WORD)
            data = {
                "proof": good[:-1] + bytes([good[-1] ^ 1]),
                "length": b"\xff\xff" + good[2:],
                "text": good.replace(b"true", b"TRUE"),
                "no object": knock.seal(ticket, ["taken"]),  # type: ignore[arg-type]
                "end": good[:20],
            }[spoilt]
            os.write(caller.channel.fileno(), data)
            if spoilt == "end":
                caller.channel.cut()

    async with listening(Spoiler()) as listener:
        with pytest.raises(HostUnreachable, match="said no word"):
            await knock.call(JOB, way(port_of(listener)))


async def test_a_word_that_is_too_long_is_not_said() -> None:
    with pytest.raises(ValueError, match="a word of"):
        knock.seal(knock.ticket_of(JOB, TOKEN, b""), {"reason": "x" * limits.RECOVERY_WORD_BYTES_MAX})


async def test_a_door_that_closes_leaves_its_callers_alone() -> None:
    door = Door(None)
    async with listening(door) as listener:
        calling = asyncio.create_task(knock.call(JOB, way(port_of(listener))))
        await door.came.wait()
        await listener.close()
        door.callers[0].answer(WORD)
        channel, word = await calling
        assert word == WORD
        channel.close()


async def test_a_port_that_is_taken_is_passed_over_by_the_listener_too() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        first, second = taken.getsockname()[1], unused_port()
        door = Door()
        listener = await KnockListener.listen(JOB, TOKEN, (LOOPBACK,), (first, second), door)
        assert port_of(listener) == second
        await listener.close()
        with pytest.raises(Unfit):
            await KnockListener.listen(JOB, TOKEN, (LOOPBACK,), (first,), door)


def test_both_sides_try_the_same_ports_in_the_same_order() -> None:
    ports = knock.ports_of(JOB, 49152, 49215)
    assert ports == knock.ports_of(JOB, 49152, 49215)
    assert len(set(ports)) == limits.RECOVERY_PORTS_MAX
    assert all(49152 <= port <= 49215 for port in ports)
    assert len({knock.ports_of(f"job-{n}", 49152, 49215)[0] for n in range(100)}) > 30
    assert sorted(knock.ports_of(JOB, 5, 6)) == [5, 6]
    assert knock.ports_of(JOB, 0, 0) == ()
