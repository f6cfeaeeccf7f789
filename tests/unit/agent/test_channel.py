"""The migration channel: only the ticket's holder opens it, nothing is read beyond the greeting, cut cuts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from tests.channel_ends import LOOPBACK, is_hung_up, unused_port
from vmferry.agent import channel as channel_module
from vmferry.agent import descriptors
from vmferry.agent.channel import Channel, ChannelListener, Ticket, dial
from vmferry.errors import HostUnreachable, NotTrusted, Unfit


@contextlib.asynccontextmanager
async def listening(*hosts: str, greeting_s_max: float = 2.0) -> AsyncIterator[ChannelListener]:
    listener = await ChannelListener.open("job-1", hosts or (LOOPBACK,), greeting_s_max=greeting_s_max)
    try:
        yield listener
    finally:
        await listener.close()


async def connected(listener: ChannelListener, name: str = "main") -> tuple[Channel, Channel]:
    ticket = listener.expect(name)
    source, destination = await asyncio.gather(
        dial(listener.addresses, ticket, deadline_s=2), listener.arrived(name, deadline_s=2)
    )
    return source, destination


@pytest.mark.parametrize("host", [LOOPBACK, "::1"])
async def test_both_sides_get_a_quiet_blocking_tuned_connection(host: str) -> None:
    async with listening(host) as listener:
        source, destination = await connected(listener)
    for side in (source, destination):
        given = side.hand_over()
        assert given.getblocking()
        assert given.fileno() == side.fileno()
        assert given.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert given.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert given.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == channel_module.SILENCE_MS_MAX
        given.settimeout(2)
    # The first byte that QEMU reads is the first byte that QEMU wrote, in both directions.
    source.hand_over().sendall(b"QEVM")
    destination.hand_over().sendall(b"pong")
    assert destination.hand_over().recv(100) == b"QEVM"
    assert source.hand_over().recv(100) == b"pong"
    assert source.peer == listener.addresses[0]
    source.close()
    destination.close()


async def test_nothing_beyond_the_greeting_is_read() -> None:
    async with listening() as listener:
        ticket = listener.expect("main")
        reader, writer = await asyncio.open_connection(*listener.addresses[0])
        writer.write(ticket.greeting() + b"first bytes of the stream")
        destination = await listener.arrived("main", deadline_s=2)
        assert await reader.readexactly(32) == ticket.reply()
        assert destination.hand_over().recv(100) == b"first bytes of the stream"
        destination.close()
        writer.close()


async def test_a_greeting_may_come_byte_by_byte() -> None:
    async with listening() as listener:
        ticket = listener.expect("main")
        _, writer = await asyncio.open_connection(*listener.addresses[0])
        for byte in ticket.greeting():
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        (await listener.arrived("main", deadline_s=2)).close()
        writer.close()


async def test_a_stranger_is_dropped_and_the_source_still_gets_in() -> None:
    async with listening() as listener:
        ticket = listener.expect("main")
        forged = Ticket("job-1", "main", bytes(32))
        other_job = Ticket("job-2", "main", ticket.token)
        other_channel = Ticket("job-1", "preempt", ticket.token)
        for greeting in (
            forged.greeting(),
            other_job.greeting(),
            other_channel.greeting(),
            b"GET / HTTP/1.1\r\n" * 9,
        ):
            reader, writer = await asyncio.open_connection(*listener.addresses[0])
            writer.write(greeting)
            assert await is_hung_up(reader)
            writer.close()
        source, destination = await asyncio.gather(
            dial(listener.addresses, ticket, deadline_s=2), listener.arrived("main", deadline_s=2)
        )
        assert listener.strangers_dropped == 4
        source.close()
        destination.close()


async def test_a_ticket_opens_one_channel_once() -> None:
    async with listening() as listener:
        ticket = listener.expect("main")
        source = await dial(listener.addresses, ticket, deadline_s=2)
        with pytest.raises(HostUnreachable, match="hung up"):
            await dial(listener.addresses, ticket, deadline_s=2)
        destination = await listener.arrived("main", deadline_s=2)
        source.close()
        destination.close()
        with pytest.raises(AssertionError, match="has had its ticket"):
            listener.expect("main")


async def test_a_job_has_several_channels_in_any_order() -> None:
    async with listening() as listener:
        tickets = {name: listener.expect(name) for name in ("main", "preempt", "main-2")}
        opened = {name: await dial(listener.addresses, tickets[name], deadline_s=2) for name in reversed(tickets)}
        for name, source in opened.items():
            destination = await listener.arrived(name, deadline_s=2)
            assert destination.name == name
            source.hand_over().sendall(name.encode())
            assert destination.hand_over().recv(100) == name.encode()
            source.close()
            destination.close()


async def test_a_silent_stranger_is_dropped_at_the_deadline() -> None:
    async with listening(greeting_s_max=0.05) as listener:
        reader, writer = await asyncio.open_connection(*listener.addresses[0])
        writer.write(b"VMFERRY")
        assert await is_hung_up(reader)
        writer.close()


async def test_squatters_are_bounded_and_cannot_keep_the_source_out() -> None:
    async with listening(greeting_s_max=60) as listener:
        ticket = listener.expect("main")
        squatters = [
            await asyncio.open_connection(*listener.addresses[0]) for _ in range(2 * channel_module.STRANGERS_MAX)
        ]
        source, destination = await asyncio.gather(
            dial(listener.addresses, ticket, deadline_s=2), listener.arrived("main", deadline_s=2)
        )
        assert len(listener._strangers) <= channel_module.STRANGERS_MAX
        assert listener.strangers_dropped >= channel_module.STRANGERS_MAX
        assert await is_hung_up(squatters[0][0])
        source.close()
        destination.close()
        for _, writer in squatters:
            writer.close()


async def test_a_stranger_that_resets_does_no_harm() -> None:
    async with listening() as listener:
        ticket = listener.expect("main")
        with socket.create_connection(listener.addresses[0]) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        source = await dial(listener.addresses, ticket, deadline_s=2)
        (await listener.arrived("main", deadline_s=2)).close()
        source.close()


async def test_when_nobody_comes_the_ticket_is_void() -> None:
    async with listening() as listener:
        ticket = listener.expect("main")
        with pytest.raises(HostUnreachable, match=r"main channel of job job-1 in 0\.02 s") as caught:
            await listener.arrived("main", deadline_s=0.02)
        assert caught.value.side == "source"
        with pytest.raises(HostUnreachable, match="hung up"):
            await dial(listener.addresses, ticket, deadline_s=2)


async def test_a_greeting_under_way_at_the_deadline_is_not_accepted_for_nobody() -> None:
    async with listening() as listener:
        ticket = listener.expect("main")
        arrival = listener._arrivals["main"]
        arrival.cancel()
        source = await dial(listener.addresses, ticket, deadline_s=2)
        assert await asyncio.to_thread(source.hand_over().recv, 1) == b""
        source.close()


async def test_close_ends_all_that_nobody_has_taken() -> None:
    async with listening() as listener:
        tickets = [listener.expect("main"), listener.expect("preempt")]
        source = await dial(listener.addresses, tickets[0], deadline_s=2)
        squatter, writer = await asyncio.open_connection(*listener.addresses[0])
        await asyncio.sleep(0.01)
        address = listener.addresses
    source.hand_over().settimeout(2)
    assert source.hand_over().recv(1) == b""
    assert await is_hung_up(squatter)
    with pytest.raises(HostUnreachable, match="refused"):
        await dial(address, tickets[1], deadline_s=2)
    writer.close()
    source.close()


async def test_dial_tries_every_address_and_names_them_all() -> None:
    async with listening() as listener:
        dead = (LOOPBACK, unused_port())
        ticket = listener.expect("main")
        source = await dial([dead, ("::1", dead[1]), *listener.addresses], ticket, deadline_s=2)
        (await listener.arrived("main", deadline_s=2)).close()
        source.close()
        with pytest.raises(HostUnreachable) as caught:
            await dial([dead, ("::1", dead[1]), ("host-b", 1)], listener.expect("two"), deadline_s=2)
        for text in (f"{LOOPBACK}:{dead[1]}", f"[::1]:{dead[1]}", "host-b:1", "refused"):
            assert text in caught.value.message


async def test_dial_gives_a_silent_address_only_its_share() -> None:
    with socket.create_server((LOOPBACK, 0)) as silent:
        async with listening() as listener:
            ticket = listener.expect("main")
            source = await dial([silent.getsockname(), *listener.addresses], ticket, deadline_s=0.4)
            (await listener.arrived("main", deadline_s=2)).close()
            source.close()
        with pytest.raises(HostUnreachable, match="did not answer"):
            await dial([silent.getsockname()], ticket, deadline_s=0.05)


async def test_who_answers_without_the_token_is_not_trusted() -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(80)
        writer.write(bytes(32))
        await reader.read()
        writer.close()
        gone.set()

    gone = asyncio.Event()
    async with await asyncio.start_server(impostor, LOOPBACK, 0) as server:
        ticket = Ticket("job-1", "main", bytes(32))
        with pytest.raises(NotTrusted, match="without the token"):
            await dial([server.sockets[0].getsockname()], ticket, deadline_s=2)
        await gone.wait()


async def test_the_token_never_crosses_the_line() -> None:
    ticket = Ticket("job-1", "main", b"0123456789abcdef0123456789abcdef")
    assert ticket.token not in ticket.greeting() + ticket.reply()
    assert "0123456789abcdef" not in repr(ticket)
    assert ticket.reply() not in ticket.greeting()


async def test_cut_ends_the_connection_whoever_else_holds_it() -> None:
    async with listening() as listener:
        source, destination = await connected(listener)
    in_qemu = socket.socket(fileno=socket.dup(source.fileno()))
    in_qemu.settimeout(2)
    source.cut()
    assert source.is_cut
    assert in_qemu.recv(1) == b""
    assert destination.hand_over().recv(1) == b""
    source.cut()
    in_qemu.close()
    source.close()
    source.cut()
    destination.cut()
    destination.close()
    assert destination.fileno() == -1


async def test_who_holds_a_channel_is_known() -> None:
    async with listening() as listener:
        source, destination = await connected(listener)
    child = await asyncio.create_subprocess_exec("sleep", "60", pass_fds=[source.fileno()])
    assert source.is_held_by(child.pid)
    assert source.is_held_by(os.getpid())
    assert not destination.is_held_by(child.pid)
    child.kill()
    await child.wait()
    assert not source.is_held_by(child.pid)
    source.close()
    assert not source.is_held_by(os.getpid())
    destination.close()


async def test_an_entrusted_channel_ends_with_its_holder_and_can_be_cut_before() -> None:
    async with listening() as listener:
        one, two = await connected(listener), await connected(listener, "two")
    children = [
        await asyncio.create_subprocess_exec("sleep", "60", pass_fds=[source.fileno()]) for source, _ in (one, two)
    ]
    for (source, destination), child in zip((one, two), children, strict=True):
        assert source.entrust(child.pid)
        assert source.fileno() == -1
        assert source.is_held_by(child.pid)
        info = source.tcp_info()
        assert info is not None
        assert info.is_established
        destination.hand_over().settimeout(2)
    one[0].cut()
    assert one[1].hand_over().recv(1) == b""
    assert one[0].is_held_by(children[0].pid), "cut ends the connection, not the descriptor"
    children[1].kill()
    assert two[1].hand_over().recv(1) == b""
    await children[1].wait()
    two[0].cut()
    assert two[0].tcp_info() is None
    children[0].kill()
    await children[0].wait()
    for channel in (*one, *two):
        channel.close()
        channel.close()


@pytest.mark.parametrize("is_dead", [False, True])
async def test_entrusted_to_one_who_has_dropped_it_the_channel_ends(is_dead: bool) -> None:
    async with listening() as listener:
        source, destination = await connected(listener)
    holder = await asyncio.create_subprocess_exec("sleep", "60")
    if is_dead:
        holder.kill()
        await holder.wait()
    assert source.entrust(holder.pid)
    destination.hand_over().settimeout(2)
    assert destination.hand_over().recv(1) == b""
    source.cut()
    assert source.tcp_info() is None
    if not is_dead:
        holder.kill()
        await holder.wait()
    source.close()
    destination.close()


async def test_where_nothing_can_be_borrowed_nothing_is_entrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening() as listener:
        source, destination = await connected(listener)

    def forbid(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(descriptors, "fetch_socket", forbid)
    assert not source.entrust(os.getpid())
    assert source.hand_over().send(b"x") == 1
    assert destination.hand_over().recv(1) == b"x"
    source.close()
    destination.close()


async def test_a_later_agent_reclaims_what_an_earlier_one_left() -> None:
    async with listening() as listener:
        source, destination = await connected(listener)
    holder = await asyncio.create_subprocess_exec("sleep", "60", pass_fds=[source.fileno()])
    inode, peer = source.inode, source.peer
    source.close()
    again = Channel.reclaim("main", holder.pid, inode)
    assert again is not None
    assert (again.name, again.inode, again.peer) == ("main", inode, peer)
    again.cut()
    destination.hand_over().settimeout(2)
    assert destination.hand_over().recv(1) == b""
    assert Channel.reclaim("main", holder.pid, destination.inode) is None
    holder.kill()
    await holder.wait()
    assert Channel.reclaim("main", holder.pid, inode) is None
    again.close()
    destination.close()


async def test_tcp_info_counts_what_the_peer_has() -> None:
    async with listening() as listener:
        source, destination = await connected(listener)
    source.hand_over().sendall(bytes(50_000))
    received = 0
    while received < 50_000:
        received += len(destination.hand_over().recv(65536))
    destination.hand_over().sendall(b"ok")
    source.hand_over().recv(2)
    info = source.tcp_info()
    assert info is not None
    assert info.is_established
    assert 50_000 <= info.acked_bytes <= 50_200
    assert info.received_bytes == 32 + 2
    assert info.unsent_bytes == 0
    assert info.unacked_segments == 0
    assert 0 < info.rtt_min_us <= info.rtt_us < 1_000_000
    assert info.delivery_bytes_per_s > 0
    source.cut()
    after = source.tcp_info()
    assert after is None or not after.is_established
    source.close()
    assert source.tcp_info() is None
    destination.close()


async def test_ports_come_from_the_range() -> None:
    port = unused_port()
    first = await ChannelListener.open("job-1", [LOOPBACK], ports=range(port, port + 1))
    assert first.addresses == ((LOOPBACK, port),)
    with pytest.raises(Unfit, match=f"{LOOPBACK}, ports {port} to {port}: Address already in use"):
        await ChannelListener.open("job-2", ["::1", LOOPBACK], ports=range(port, port + 1))
    second = await ChannelListener.open("job-2", [LOOPBACK], ports=(port, 0))
    assert second.addresses[0][1] != port
    await first.close()
    await second.close()


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(Unfit, match=r"192\.0\.2\.1"):
        await ChannelListener.open("job-1", ["192.0.2.1"])
    with pytest.raises(Unfit, match="not an IP address"):
        await ChannelListener.open("job-1", ["host-b"])
    with pytest.raises(Unfit, match="no port"):
        await ChannelListener.open("job-1", [LOOPBACK], ports=())


async def test_that_the_peer_speaks_is_heard_and_nothing_is_read() -> None:
    async with listening() as listener:
        source, destination = await connected(listener)
    heard = asyncio.create_task(destination.spoken(deadline_s=5))
    await asyncio.sleep(0)
    assert not heard.done()
    source.hand_over().sendall(b"abc")
    assert await heard
    assert destination.hand_over().recv(10) == b"abc"
    assert destination.hand_over().getblocking()
    for side in (source, destination):
        side.close()


@pytest.mark.parametrize("hangs_up", [True, False])
async def test_who_hangs_up_or_says_nothing_has_not_spoken(hangs_up: bool) -> None:
    async with listening() as listener:
        source, destination = await connected(listener)
    if hangs_up:
        source.cut()
    assert not await destination.spoken(deadline_s=5 if hangs_up else 0.05)
    for side in (source, destination):
        side.close()
