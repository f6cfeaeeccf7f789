"""Our QMP client against every installed QEMU: what only the real thing can tell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmferry import limits
from vmferry.qmp import commands, info
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.client import QmpClient, connect_socket, connect_unix
from vmferry.qmp.codec import MISSING, Decoder, ErrorReply, Event, Greeting, Malformed, NeedData, Reply
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout
from vmferry.testing.qemus import available

pytestmark = pytest.mark.real

QEMUS = {version: str(path) for version, path in available().items()}
every_qemu = pytest.mark.parametrize("version", sorted(QEMUS))


@contextlib.contextmanager
def qemu(version: str, *more: str, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU without a machine, killed at the end."""
    argv = [QEMUS[version], "-M", "none", "-nodefaults", "-display", "none", "-S", *more]
    process = subprocess.Popen(argv, pass_fds=fds, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def monitor(
    version: str, *more: str, on_event: Callable[[Event], None] | None = None
) -> AsyncIterator[tuple[subprocess.Popen[bytes], QmpClient]]:
    """A QEMU and a client of its monitor, over a socketpair."""
    ours, theirs = socket.socketpair()
    chardev = f"socket,id=qmp,fd={theirs.fileno()}"
    argv = ("-chardev", chardev, "-mon", "qmp,mode=control", *more)
    with qemu(version, *argv, fds=(theirs.fileno(),)) as process:
        theirs.close()
        client = await connect_socket(ours, name="the QEMU under test", on_event=on_event)
        try:
            yield process, client
        finally:
            await client.close()


@every_qemu
async def test_the_greeting_and_every_query(version: str) -> None:
    async with monitor(version) as (_, client):
        assert client.oob
        assert client.peer_pid == os.getpid()  # of a socketpair: who made it
        major, minor, micro = client.version
        asked = await commands.query_version(client)
        assert (asked.major, asked.minor, asked.micro) == (major, minor, micro)
        assert major >= 7
        assert await commands.query_status(client) == info.RunState("prelaunch", running=False)
        assert (await commands.query_migrate(client)).status is None
        assert (await commands.query_migrate_capabilities(client))["postcopy-ram"] is False
        assert (await commands.query_migrate_parameters(client))["downtime-limit"] == 300
        machines = {machine.alias: machine for machine in await commands.query_machines(client)}
        assert machines["q35"].cpu_max is not None
        cpus = {cpu.name: cpu for cpu in await commands.query_cpu_definitions(client)}
        assert cpus["max"].migration_safe is False
        assert (await commands.query_kvm(client)).enabled is False
        assert await commands.query_block(client) == []
        assert await commands.query_named_block_nodes(client) == ()
        assert {"type": "chardev", "id": "qmp"} in await commands.query_yank(client)
        schema = await commands.query_qmp_schema(client)
        assert {"migrate", "yank", "getfd"} <= {entry["name"] for entry in schema}


@every_qemu
async def test_options_objects_and_refusals(version: str) -> None:
    async with monitor(version) as (_, client):
        await commands.migrate_set_capabilities(client, {"events": True, "return-path": True})
        assert (await commands.query_migrate_capabilities(client))["return-path"] is True
        await commands.migrate_set_parameters(client, {"max-bandwidth": 1 << 20})
        assert (await commands.query_migrate_parameters(client))["max-bandwidth"] == 1 << 20
        await commands.object_add(client, "iothread", "io", {"poll-max-ns": 0})
        with pytest.raises(QmpCommandError, match="duplicate"):
            await commands.object_add(client, "iothread", "io")
        await commands.object_del(client, "io")
        with pytest.raises(QmpCommandError) as caught:
            await client.execute("no-such-command")
        assert caught.value.qmp_class == "CommandNotFound"
        assert caught.value.desc == "The command no-such-command has not been found"


@every_qemu
async def test_oob_answers_find_their_commands_among_in_band_ones(version: str) -> None:
    async with monitor(version) as (_, client):
        in_band = [asyncio.create_task(commands.query_status(client)) for _ in range(20)]
        pauses = [asyncio.create_task(commands.migrate_pause(client)) for _ in range(20)]
        yanks = [asyncio.create_task(commands.yank(client)) for _ in range(20)]
        refused = await asyncio.gather(*pauses, *yanks, return_exceptions=True)
        assert all(isinstance(error, QmpCommandError) for error in refused)
        assert {error.command for error in refused[:20] if isinstance(error, QmpCommandError)} == {"migrate-pause"}
        assert {error.command for error in refused[20:] if isinstance(error, QmpCommandError)} == {"yank"}
        assert {state.status for state in await asyncio.gather(*in_band)} == {"prelaunch"}
        with pytest.raises(QmpCommandError, match="does not support OOB"):
            await client.execute("query-status", oob=True)


@every_qemu
async def test_descriptors_arrive_each_under_its_own_name(version: str) -> None:
    """QEMU keeps only the descriptors it received last, so many at once would be lost if they overtook."""
    async with monitor(version) as (process, client):
        pipes = [os.pipe() for _ in range(12)]
        giving = [commands.getfd(client, f"fd{number}", pipe[1]) for number, pipe in enumerate(pipes)]
        await asyncio.gather(*giving, *[commands.query_status(client) for _ in range(12)])
        for _, write_end in pipes:
            os.close(write_end)
        held = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")}
        for read_end, _ in pipes:
            assert os.readlink(f"/proc/self/fd/{read_end}") in held
        for number, (read_end, _) in enumerate(pipes):
            await commands.closefd(client, f"fd{number}")
            assert os.read(read_end, 1) == b""  # QEMU had the only other end, and it was this one
            os.close(read_end)
        with pytest.raises(QmpCommandError, match="No file descriptor supplied"):
            await client.execute("getfd", {"fdname": "x"})


@every_qemu
async def test_a_stopped_qemu_costs_a_deadline_and_not_the_session(version: str) -> None:
    async with monitor(version) as (process, client):
        process.send_signal(signal.SIGSTOP)
        many = limits.QMP_IN_BAND_UNANSWERED_MAX + 2
        calls = [commands.query_status(client, deadline_s=0.2) for _ in range(many)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        sent = [error.was_sent for error in errors if isinstance(error, QmpTimeout)]
        assert sent == [True] * limits.QMP_IN_BAND_UNANSWERED_MAX + [False] * 2
        with pytest.raises(QmpTimeout):
            await commands.yank(client, deadline_s=0.2)
        process.send_signal(signal.SIGCONT)
        assert (await commands.query_status(client)).status == "prelaunch"
        assert client.late_replies == limits.QMP_IN_BAND_UNANSWERED_MAX + 1


@every_qemu
async def test_quit_answers_says_why_and_ends(version: str) -> None:
    events: list[Event] = []
    async with monitor(version, on_event=events.append) as (process, client):
        await commands.cont(client)
        await commands.stop(client)
        await commands.quit(client)
        await asyncio.wait_for(asyncio.shield(client.closed), 20)
        assert [event.name for event in events] == ["RESUME", "STOP", "SHUTDOWN"]
        assert events[-1].data["reason"] == "host-qmp-quit"
        assert events[0].timestamp_us is not None
        assert process.wait(20) == 0


@every_qemu
async def test_a_killed_qemu_fails_what_waits(version: str) -> None:
    async with monitor(version) as (process, client):
        process.send_signal(signal.SIGSTOP)
        call = asyncio.create_task(commands.cont(client))
        await asyncio.sleep(0)
        process.kill()
        with pytest.raises(QmpDisconnected) as caught:
            await call
        assert caught.value.guest == "unknown"


@every_qemu
async def test_a_monitor_serves_one_client_after_the_other(version: str, tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    second_monitor = ("-chardev", f"socket,id=two,path={path},server=on,wait=off", "-mon", "two,mode=control")
    async with monitor(version, *second_monitor) as (process, _):  # it greeted, so the other one listens
        first = await connect_unix(str(path))
        assert first.peer_pid == process.pid
        with pytest.raises(QmpTimeout, match="another client may hold it"):
            await connect_unix(str(path), deadline_s=0.2)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(QmpTimeout):
            await commands.query_status(first, deadline_s=0.1)
        await first.close()
        process.send_signal(signal.SIGCONT)
        second = await connect_unix(str(path))
        assert (await commands.query_status(second)).status == "prelaunch"
        await second.close()
        with BlockingClient(str(path)) as third:
            assert third.oob
            assert third.execute("query-status")["status"] == "prelaunch"
            seen: list[Event] = []
            third.call("cont", on_event=seen.append)
            third.execute("quit", on_event=seen.append)
            with contextlib.suppress(QmpDisconnected):
                seen += third.events(20)
            assert [event.name for event in seen] == ["RESUME", "SHUTDOWN"]


@every_qemu
async def test_a_reply_to_a_client_that_left_is_not_taken_for_ones_own(version: str, tmp_path: Path) -> None:
    """QEMU sends such a reply to the next client of the monitor; about one round in two shows it on 11.1."""
    path = tmp_path / "qmp"
    second_monitor = ("-chardev", f"socket,id=two,path={path},server=on,wait=off", "-mon", "two,mode=control")
    async with monitor(version, *second_monitor):
        for turns in range(60):
            hasty = await connect_unix(str(path))
            calls = [asyncio.create_task(commands.query_qmp_schema(hasty)) for _ in range(4)]
            for _ in range(turns % 5):
                await asyncio.sleep(0)  # leave a little later each time
            await hasty.close()
            await asyncio.gather(*calls, return_exceptions=True)
            patient = await connect_unix(str(path))
            assert await patient.execute("query-name") == {}
            await patient.close()


# --- the scanner hears what QEMU hears ---

JUNK = (
    b'} ] { [ : , " \' \n \xff @ nul  1  - \\ {"a": {"a":1, \t "abc \x00 \xfe \xc3\xa9 "x\\ {} [] true "s" E'
    b" 01 -1.x 1e5 2E+ -0.5e-3 1. 3e [1,-2.5E3,0]"
).split(b" ")


def soup(chance: random.Random, number: int) -> bytes:
    """Commands of every spelling, each with an id of its own, and what does not belong there."""

    def command(at: int) -> bytes:
        name = f"i{number}.{at}"
        spelling = chance.choice(
            [
                f'{{"execute":"query-name","id":"{name}"}}',
                f"{{'execute':'query-name','id':'{name}'}}",
                f'{{"id":"{name}","execute":"query-name"}}\r\n',
                f'{{ "execute" : "nope" ,\n"id":"{name}"}}',
                f'{{"execute":"x{{}}]\'","id":"{name}"}}',
                f'{{"execute":\'x\\\'y\',"id":"{name}"}}',
                f'{{"id":"{name}"}}',
                f'{{"execute":"query-name","arguments":{{"a":[1,{{}}]}},"id":"{name}"}}\n',
            ]
        )
        return spelling.encode()

    count = chance.randrange(1, 14)
    return b"".join(command(at) if chance.random() < 0.45 else chance.choice(JUNK) for at in range(count))


def heard_by_us(data: bytes, end: str) -> list[Any]:
    decoder = Decoder()
    ids: list[Any] = []
    decoder.feed(data)
    while not isinstance(message := decoder.next(), NeedData):
        message_id = getattr(message, "id", MISSING)
        if message_id == end:
            return ids
        ids.append(None if message_id is MISSING else message_id)
    raise AssertionError(f"the last command was not heard: {data!r}")


async def heard_by_qemu(stream: tuple[asyncio.StreamReader, Decoder], end: str) -> list[Any]:
    reader, decoder = stream
    ids: list[Any] = []
    while True:
        message = decoder.next()
        match message:
            case NeedData():
                data = await reader.read(65536)
                assert data, "QEMU went away"
                decoder.feed(data)
            case Reply(id=message_id) | ErrorReply(id=message_id) if message_id == end:
                return ids
            case Reply(id=message_id) | ErrorReply(id=message_id):
                ids.append(None if message_id is MISSING else message_id)
            case _:
                assert isinstance(message, Greeting | Event | Malformed)


@every_qemu
async def test_our_scanner_hears_the_same_commands_as_qemu_in_any_noise(version: str) -> None:
    """Ids of commands, and one None for each error without id, in the same order."""
    ours, theirs = socket.socketpair()
    chardev = f"socket,id=qmp,fd={theirs.fileno()}"
    with qemu(version, "-chardev", chardev, "-mon", "qmp,mode=control", fds=(theirs.fileno(),)):
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        stream = (reader, Decoder())
        writer.write(b'{"execute":"qmp_capabilities","id":"ready"}')
        await heard_by_qemu(stream, "ready")
        chance = random.Random(20260101)
        for number in range(1500):
            end = f"end{number}"
            data = soup(chance, number) + f'\n\xff\n{{"execute":"query-name","id":"{end}"}}'.encode("latin-1")
            writer.write(data)
            assert heard_by_us(data, end) == await heard_by_qemu(stream, end), data
        writer.close()
        await writer.wait_closed()
