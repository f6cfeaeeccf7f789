"""The QMP server over real sockets: our clients, QEMU's own client, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from qemu.qmp import ExecuteError, QMPClient
from qemu.qmp.legacy import QEMUMonitorProtocol

from vmferry import limits
from vmferry.errors import Busy, PlanRefused, Unfit
from vmferry.qmp import client as client_module
from vmferry.qmp.client import connect_socket, connect_stream, connect_unix
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout
from vmferry.qmp.server import Peer, QmpServer
from vmferry.qmp.sockets import open_unix, peer_credentials

Serving = Any  # conftest.Serving: server, path, handler
MakeServer = Callable[..., QmpServer]
NEGOTIATE = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'


class RawClient:
    """Bytes out, JSON lines in: what no proper client would do."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path: str, *, negotiate: bool = True) -> RawClient:
        raw = cls(*await asyncio.open_unix_connection(path, limit=limits.QMP_MESSAGE_BYTES_MAX))
        greeting = (await raw.line())["QMP"]
        assert greeting["version"]["qemu"] == {"major": 1, "minor": 2, "micro": 3}
        assert greeting["capabilities"] == ["oob"]
        if negotiate:
            assert await raw.ask(NEGOTIATE) == {"return": {}}
        return raw

    async def line(self) -> Any:
        line = await self.reader.readline()
        assert line.endswith(b"\r\n")
        return json.loads(line)

    async def ask(self, data: bytes) -> Any:
        self.writer.write(data)
        return await self.line()

    def stop_reading(self) -> None:
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


# --- our client ---


async def test_commands_replies_events_and_peer(serving: Serving) -> None:
    server, path = serving.server, serving.path
    events: asyncio.Queue[Event] = asyncio.Queue()
    client = await connect_unix(path, on_event=events.put_nowait)
    assert client.version == (1, 2, 3)
    assert client.oob
    assert client.peer_pid == os.getpid()
    assert await client.execute("echo", {"é": [1, None]}) == {"é": [1, None]}
    assert await client.execute("nothing") == {}
    assert await client.execute("peer") == {"uid": os.getuid(), "certificate": None}
    await client.execute("emit", {"count": 2})
    server.broadcast("ALL", {"x": 1})
    assert [(await events.get()).name for _ in range(3)] == ["TICK", "TICK", "ALL"]
    server.broadcast("BARE")
    assert await events.get() == Event("BARE", {}, 1_000_250_000)
    await client.close()
    await client.close()


async def test_errors_keep_their_class_their_words_and_themselves(serving: Serving) -> None:
    client = await connect_unix(serving.path)
    expected = [
        ("refuse", "GenericError", "web1 cannot go there"),
        ("relay", "DeviceNotActive", "the QEMU of web1 refused cont: not now"),
        ("bug", "GenericError", "bug failed inside the agent: KeyError: 'oops'"),
        ("unsayable", "GenericError", "unsayable failed inside the agent: TypeError: Object of type object is not"),
        ("lost", "CommandNotFound", "The command lost has not been found"),
    ]
    for command, qmp_class, desc in expected:
        with pytest.raises(QmpCommandError) as caught:
            await client.execute(command)
        assert caught.value.qmp_class == qmp_class
        assert caught.value.desc.startswith(desc)
        if command == "refuse":
            remote = caught.value.remote
            assert isinstance(remote, PlanRefused)
            assert remote.cause == {"code": "text", "message": "no kvm", "cause": None}
            assert caught.value.hint == "mend it"
    assert await client.execute("echo") == {}
    await client.close()


async def test_in_band_goes_in_order_and_oob_at_once(serving: Serving) -> None:
    path, handler = serving.path, serving.handler
    client = await connect_unix(path)
    first = asyncio.create_task(client.execute("wait", {"name": "first"}))
    second = asyncio.create_task(client.execute("echo", {"name": "second"}))
    assert await handler.began.get() == "first"
    oob = [asyncio.create_task(client.execute("wait", {"name": name}, oob=True)) for name in ("x", "y")]
    assert {await handler.began.get() for _ in oob} == {"x", "y"}  # both run although `first` does
    assert await client.execute("echo", {"name": "z"}, oob=True) == {"name": "z"}
    assert not first.done()
    assert ("echo", "second") not in handler.log
    for name in ("y", "x"):
        handler.gate(name).set()
    assert [await task for task in oob] == ["x", "y"]
    handler.gate("first").set()
    assert (await first, await second) == ("first", {"name": "second"})
    await client.close()


async def test_a_slow_command_times_out_and_the_session_goes_on(serving: Serving) -> None:
    path, handler = serving.path, serving.handler
    client = await connect_unix(path)
    with pytest.raises(QmpTimeout):
        await client.execute("wait", {"name": "slow"}, deadline_s=0.02)
    handler.gate("slow").set()
    assert await client.execute("echo") == {}
    assert client.late_replies == 1
    await client.close()


async def test_when_a_client_goes_its_commands_are_cancelled(serving: Serving) -> None:
    server, path, handler = serving.server, serving.path, serving.handler
    client = await connect_unix(path)
    tasks = [
        asyncio.create_task(client.execute("wait", {"name": name}, oob=oob))
        for name, oob in (("in", False), ("out", True))
    ]
    assert {await handler.began.get() for _ in tasks} == {"in", "out"}
    await client.close()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(error, QmpDisconnected)
        assert error.guest == "unknown"
    await server.close()
    assert sorted(handler.cancelled) == ["in", "out"]


async def test_the_server_closes_and_the_client_is_told(serving: Serving) -> None:
    server, path = serving.server, serving.path
    client = await connect_unix(path)
    server.broadcast("GOODBYE")
    goodbyes: list[Event] = []
    client.subscribe(goodbyes.append)
    await server.close()
    assert await client.closed
    assert [event.name for event in goodbyes] == ["GOODBYE"]  # what was unsent still left
    with pytest.raises(QmpDisconnected, match="cannot connect"):
        await connect_unix(path)
    await client.close()


# --- negotiation and bad input, worded as QEMU words it ---


async def test_negotiation_comes_first_and_once(serving: Serving) -> None:
    server, path = serving.server, serving.path
    raw = await RawClient.connect(path, negotiate=False)
    server.broadcast("TOO_EARLY")
    conversation: list[tuple[bytes, str, str]] = [
        (b'{"execute":"echo"}', "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'"),
        (b'{"exec-oob":"echo"}', "GenericError", "QMP input member 'exec-oob' is unexpected"),
        (b'{"exec-oob":"qmp_capabilities"}', "GenericError", "QMP input member 'exec-oob' is unexpected"),
        (
            b'{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}',
            "GenericError",
            "Parameter 'enable' does not accept value 'x'",
        ),
        (
            b'{"execute":"qmp_capabilities","arguments":{"x":1}}',
            "GenericError",
            "qmp_capabilities takes 'enable', an array, and nothing else",
        ),
    ]
    for data, qmp_class, desc in conversation:
        assert await raw.ask(data) == {"error": {"class": qmp_class, "desc": desc}}
    assert await raw.ask(b'{"execute":"qmp_capabilities","id":null}') == {"return": {}, "id": None}
    done = {"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"}
    assert await raw.ask(NEGOTIATE) == {"error": done}
    not_enabled = {"class": "GenericError", "desc": "QMP input member 'exec-oob' is unexpected"}
    assert await raw.ask(b'{"exec-oob":"echo","id":[1]}') == {"error": not_enabled, "id": [1]}
    await raw.close()


async def test_malformed_input_is_answered_and_survived(serving: Serving) -> None:
    raw = await RawClient.connect(serving.path)
    bad: list[tuple[bytes, str]] = [
        (b"[1]", "QMP input must be a JSON object"),
        (b'{"a":1,}', "JSON parse error, "),
        (b"\xff", "JSON parse error, stray byte 0xff"),
        (b'{"execute":"ec\n', "JSON parse error, stray byte 0x0a"),
        (b'{"id":1e999}', "JSON parse error, number out of range"),
        (b"[" * 300 + b"]" * 300, "JSON nesting depth limit exceeded"),
        (b'{"execute":"a","arguments":{"a":"%b"}}' % (b"x" * (1 << 20)), "JSON token size limit exceeded"),
        (b'{"execute":"a","arguments":[]}', "QMP input member 'arguments' must be an object"),
        (b'{"return":1}', "QMP input member 'return' is unexpected"),
        (b'{"error":{"class":"a","desc":"b"}}', "QMP input member 'error' is unexpected"),
        (b'{"event":"A"}', "QMP input member 'event' is unexpected"),
        (b'{"QMP":{"version":{},"capabilities":[]}}', "QMP input member 'QMP' is unexpected"),
    ]
    for data, desc in bad:
        answer = await raw.ask(data)
        assert answer["error"]["class"] == "GenericError"
        assert answer["error"]["desc"].startswith(desc)
        assert await raw.ask(b'{"execute":"nothing","id":7}') == {"return": {}, "id": 7}
    await raw.close()


async def test_a_stream_without_newlines_with_single_quotes_is_taken(serving: Serving) -> None:
    raw = await RawClient.connect(serving.path, negotiate=False)
    raw.writer.write(b'{"execute":"qmp_capabilities"}{\'execute\':\'echo\',\'id\':"it\'s"}{"execute":"nothing"}')
    assert [await raw.line() for _ in range(3)] == [{"return": {}}, {"return": {}, "id": "it's"}, {"return": {}}]
    await raw.close()


# --- clients that cost too much ---


async def test_a_session_that_does_not_read_its_events_is_dropped(serving: Serving) -> None:
    server, path = serving.server, serving.path
    raw = await RawClient.connect(path)
    other = await connect_unix(path)
    (session,) = [session for session in server.sessions if session.name.endswith("#1")]
    padding = "x" * 10_000
    emitted = 0
    raw.stop_reading()
    while not session.ended_because:
        server.broadcast("TICK", {"padding": padding})
        emitted += len(padding)
        assert emitted < 2 * limits.QMP_SESSION_EVENT_BYTES_MAX
        if emitted % 500_000 == 0:
            await other.execute("nothing")  # the other session reads, and goes on
    assert "reads too slowly" in session.ended_because
    session.emit("AFTER_THE_END")
    assert await other.execute("echo") == {}
    raw.writer.transport.abort()
    await other.close()


async def test_a_session_that_does_not_read_its_replies_is_not_read_from(serving: Serving) -> None:
    path, handler = serving.path, serving.handler
    raw = await RawClient.connect(path)
    size, count = 300_000, 40
    raw.stop_reading()
    for _ in range(count):
        raw.writer.write(json.dumps({"execute": "big", "arguments": {"size": size}}).encode())
    ran_before = -1
    while ran_before != len(handler.log):  # until nothing moves any more
        ran_before = len(handler.log)
        for _ in range(50):
            await asyncio.sleep(0)
    assert len(handler.log) < count
    held = sum(session._outgoing_bytes for session in serving.server.sessions)
    assert held <= limits.QMP_SESSION_OUT_BYTES_MAX + 2 * size
    raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(count):  # and when it reads again, it gets every reply
        assert len((await raw.line())["return"]) == size
    await raw.close()


async def test_a_session_that_takes_no_byte_is_dropped(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QMP_WRITE_STALL_S", 0.05)
    server, path = serving.server, serving.path
    raw = await RawClient.connect(path)
    (session,) = server.sessions
    raw.stop_reading()
    raw.writer.write(b'{"execute":"big","arguments":{"size":3000000}}')
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "qmp-session test"]
    await asyncio.wait({task})
    assert server.sessions == ()
    assert "took no byte" in session.ended_because
    raw.writer.transport.abort()


async def test_many_commands_at_once_are_all_answered(serving: Serving) -> None:
    raw = await RawClient.connect(serving.path)
    count = 200
    for number in range(count):
        verb = b"exec-oob" if number % 3 == 0 else b"execute"
        raw.writer.write(b'{"%b":"echo","id":%d}' % (verb, number))
    ids = [(await raw.line())["id"] for _ in range(count)]
    assert sorted(ids) == list(range(count))
    in_band = [number for number in ids if number % 3]
    assert in_band == sorted(in_band)
    await raw.close()


async def test_more_sessions_than_allowed_are_refused(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QMP_SESSIONS_MAX", 1)
    client = await connect_unix(serving.path)
    with pytest.raises(QmpDisconnected):
        await connect_unix(serving.path)
    assert await client.execute("echo") == {}
    await client.close()


# --- sockets ---


async def test_the_socket_has_its_mode_and_replaces_only_a_dead_one(tmp_path: Path, make_server: MakeServer) -> None:
    path = os.fspath(tmp_path / "s")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    left_over = socket.socket(socket.AF_UNIX)
    left_over.bind(f"{path}.new")
    left_over.close()
    server = make_server("one")
    await server.listen_unix(path, mode=0o660)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    rival = make_server("two")
    with pytest.raises(Busy, match="another process listens"):
        await rival.listen_unix(path)
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    await server.close()
    assert os.listdir(tmp_path) == []
    await rival.listen_unix(path)
    os.unlink(path)  # somebody else took the path meanwhile: it is not removed
    os.mkdir(path)
    await rival.close()
    assert stat.S_ISDIR(os.stat(path).st_mode)
    with pytest.raises(Unfit, match="no socket"):
        await rival.listen_unix(path)
    with pytest.raises(Unfit, match="longer than"):
        await rival.listen_unix("/" + "x" * 104)
    with pytest.raises(Unfit, match="No such file"):
        await rival.listen_unix(os.fspath(tmp_path / "none" / "s"))


async def test_a_path_too_long_or_a_full_queue_is_a_clear_error(tmp_path: Path, make_server: MakeServer) -> None:
    with pytest.raises(QmpDisconnected, match="longer than 107 bytes"):
        await connect_unix("/" + "x" * 107)
    path = os.fspath(tmp_path / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as queued:
        listener.bind(path)
        listener.listen(0)
        queued.connect(path)
        with pytest.raises(QmpDisconnected, match="queue of connections is full"):
            await connect_unix(path, deadline_s=0.0)
        server = make_server("t")
        with pytest.raises(Busy):
            await server.listen_unix(path)


async def test_a_queue_that_is_full_for_a_moment_is_waited_for(
    tmp_path: Path, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's queue holds one: 1. two come at once  2. the second finds it full  3. the first is accepted."""
    path, found_full = os.fspath(tmp_path / "busy"), asyncio.Event()

    def opening(path: str, *, name: str) -> socket.socket:
        try:
            return open_unix(path, name=name)
        except QmpDisconnected:
            found_full.set()
            raise

    monkeypatch.setattr(client_module, "open_unix", opening)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        second = asyncio.create_task(connect_unix(path))
        await found_full.wait()
        listener.accept()[0].close()
        listener.setblocking(False)
        accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
        server = make_server("t")
        serving = asyncio.create_task(server.serve(*await asyncio.open_unix_connection(sock=accepted)))
        client = await second
        assert client.version == (1, 2, 3)
        await client.close()
        await serving
        await server.close()


# --- over TLS, between agents ---


@pytest.fixture
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    contexts = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, name in zip(contexts, ("host-a", "host-b"), strict=True):
        authority.configure_trust(context)
        authority.issue_cert(name).configure_cert(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return contexts


async def test_a_session_over_tls_knows_the_peers_certificate(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], make_server: MakeServer
) -> None:
    server = make_server("tls")
    sessions: list[asyncio.Task[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sessions.append(asyncio.create_task(server.serve(reader, writer)))

    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls[0])
    port = listener.sockets[0].getsockname()[1]
    streams = await asyncio.open_connection("127.0.0.1", port, ssl=tls[1], server_hostname="host-a")
    events: list[Event] = []
    client = await connect_stream(*streams, name="host-a's agent", on_event=events.append)
    assert client.peer_pid is None
    peer = await client.execute("peer")
    assert peer["uid"] is None
    assert peer["certificate"]["subjectAltName"] == [["DNS", "host-b"]]
    await client.execute("emit", {"count": 3})
    assert [event.data["number"] for event in events] == [0, 1, 2]
    assert len(await client.execute("big", {"size": 2_000_000})) == 2_000_000
    with pytest.raises(Exception, match="only be passed over a unix socket"):
        await client.execute("getfd", fds=(0,))
    await client.close()
    await asyncio.wait(sessions)
    assert server.sessions == ()
    listener.close()
    await listener.wait_closed()


async def test_a_stream_that_ends_or_talks_nonsense_ends_the_client(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    async def once(greet: Callable[[asyncio.StreamWriter], None]) -> QmpDisconnected:
        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greet(writer)

        listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls[0])
        port = listener.sockets[0].getsockname()[1]
        streams = await asyncio.open_connection("127.0.0.1", port, ssl=tls[1], server_hostname="host-a")
        with pytest.raises(QmpDisconnected) as caught:
            await connect_stream(*streams, name="host-a's agent")
        listener.close()
        await listener.wait_closed()
        return caught.value

    assert "closed it" in (await once(lambda writer: writer.close())).message
    assert "no QMP" in (await once(lambda writer: writer.write(b"HTTP/1.1 400\r\n"))).message


async def test_a_handed_over_socketpair_is_served_too(make_server: MakeServer) -> None:
    ours, theirs = socket.socketpair()
    server = make_server("pair")
    session = asyncio.create_task(server.serve(*await asyncio.open_connection(sock=theirs)))
    client = await connect_socket(ours, name="pair")
    assert (await client.execute("peer"))["uid"] == os.getuid()
    await client.close()
    await session
    await server.close()


async def test_close_waits_for_sessions_that_were_handed_over_and_refuses_later_ones(
    make_server: MakeServer,
) -> None:
    server = make_server("pair")
    ours, theirs = socket.socketpair()
    session = asyncio.create_task(server.serve(*await asyncio.open_connection(sock=theirs)))
    client = await connect_socket(ours, name="pair")
    await server.close()
    assert server.sessions == ()
    assert await client.closed == "the other side closed it"
    await session
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        await server.serve(*await asyncio.open_connection(sock=theirs))
        assert await asyncio.get_running_loop().sock_recv(ours, 1) == b""


def test_peer_credentials_are_the_kernels() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert peer_credentials(left).pid == os.getpid()
        assert Peer(peer_credentials(right)).credentials == peer_credentials(left)


# --- QEMU's own client, the outside judge ---


async def test_qemus_client_drives_our_server(serving: Serving) -> None:
    judge = QMPClient("judge")
    await judge.connect(serving.path)
    assert await judge.execute("echo", {"a": ["é", 1.5]}) == {"a": ["é", 1.5]}
    with judge.listener("TICK") as listener:
        await judge.execute("emit", {"count": 2})
        assert [(await listener.get()).get("data") for _ in range(2)] == [
            {"number": 0, "padding": ""},
            {"number": 1, "padding": ""},
        ]
    with pytest.raises(ExecuteError, match="web1 cannot go there") as caught:
        await judge.execute("refuse")
    assert caught.value.error.error.class_ == "GenericError"
    with pytest.raises(ExecuteError, match="has not been found"):
        await judge.execute("lost")
    assert await judge.execute_msg(judge.make_execute_msg("echo", {"x": 1}, oob=True)) == {"x": 1}
    await judge.disconnect()


async def test_qemus_legacy_client_drives_our_server(serving: Serving) -> None:
    def drive() -> tuple[Any, Any]:
        asyncio.set_event_loop(loop := asyncio.new_event_loop())
        try:
            judge = QEMUMonitorProtocol(serving.path)
            judge.connect()
            echo = judge.cmd("echo", a=1)
            judge.cmd("emit", count=1)
            event = judge.pull_event(wait=5.0)
            judge.close()
            return echo, event
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    echo, event = await asyncio.to_thread(drive)
    assert echo == {"a": 1}
    assert event["event"] == "TICK"


async def test_news_wait_for_what_is_prompt_and_leave_with_it(
    tmp_path: Path, make_server: Callable[..., QmpServer]
) -> None:
    """Three events, one read: the client is woken up once, and nothing overtakes anything."""
    server = make_server(prompt=frozenset({"END"}))
    path = os.fspath(tmp_path / "qmp")
    await server.listen_unix(path)
    reader, writer = await asyncio.open_unix_connection(path)
    await reader.readuntil(b"\n")
    writer.write(b'{"execute": "qmp_capabilities"}')
    await reader.readuntil(b"\n")
    for name in ("ONE", "TWO", "END"):
        server.broadcast(name)
    seen = (await reader.read(1 << 16)).decode().splitlines()
    assert [json.loads(line)["event"] for line in seen] == ["ONE", "TWO", "END"]
    server.broadcast("LAST")  # nothing prompt follows: it leaves by itself
    assert json.loads(await reader.readuntil(b"\n"))["event"] == "LAST"
    writer.close()
    await server.close()
