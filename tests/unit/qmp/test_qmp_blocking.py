"""The blocking client against our server, which runs on a loop in a thread of its own, and against a script."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmferry import limits
from vmferry.errors import PlanRefused, QemuError
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.codec import (
    MISSING,
    Command,
    Decoder,
    Event,
    NeedData,
    encode_error,
    encode_event,
    encode_greeting,
    encode_reply,
)
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout
from vmferry.qmp.server import QmpServer


@pytest.fixture
def agent(tmp_path: Path, make_server: Callable[..., QmpServer]) -> Iterator[str]:
    """The path of a server that runs in another thread."""
    path = os.fspath(tmp_path / "agent")
    ready, loop = threading.Event(), asyncio.new_event_loop()
    over = asyncio.Event()

    async def main() -> None:
        server = make_server()
        await server.listen_unix(path)
        ready.set()
        await over.wait()
        await server.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(10)
    yield path
    loop.call_soon_threadsafe(over.set)
    thread.join()
    loop.close()


def test_it_negotiates_executes_and_closes(agent: str) -> None:
    with BlockingClient(agent) as client:
        assert client.oob
        assert client.greeting is not None
        assert client.peer_pid == os.getpid()
        assert client.fileno() >= 0
        assert client.execute("echo", {"é": 1}) == {"é": 1}
        assert client.execute("echo", {"x": 1}, oob=True) == {"x": 1}
        padding = "y" * 800_000  # more than a socket takes at once
        assert client.execute("echo", {"x": padding}) == {"x": padding}
        assert len(client.execute("big", {"size": 3_000_000})) == 3_000_000
        with pytest.raises(QmpCommandError) as caught:
            client.execute("refuse")
        assert isinstance(caught.value.remote, PlanRefused)
        assert client.execute("nothing") == {}
    client.close()
    with pytest.raises(QmpDisconnected, match="closed by this side") as gone:
        client.execute("nothing")
    assert gone.value.guest == "unharmed"


def test_events_are_kept_or_given_as_they_come(agent: str) -> None:
    with BlockingClient(agent) as client:
        client.execute("emit", {"count": 2})
        seen: list[Event] = []
        client.call("emit", {"count": 3}, on_event=seen.append)
        assert [event.data["number"] for event in seen] == [0, 1, 0, 1, 2]
        client.execute("emit", {"count": 2})
        assert [event.data["number"] for event in client.events(0.0)] == [0, 1]
        stream = client.events()
        client.execute("emit", {"count": 1})
        assert next(stream).name == "TICK"


def test_too_many_kept_events_drop_the_oldest_and_are_counted(agent: str) -> None:
    with BlockingClient(agent) as client:
        client.execute("emit", {"count": limits.QMP_EVENTS_KEPT_MAX + 5})
        assert client.events_dropped == 5
        assert next(client.events(0)).data["number"] == 5


def test_after_a_timeout_the_session_goes_on(agent: str) -> None:
    with BlockingClient(agent) as client:
        with pytest.raises(QmpTimeout) as caught:
            client.execute("wait", {"name": "never"}, deadline_s=0.02)
        assert (caught.value.was_sent, caught.value.guest) == (True, "unknown")
        assert client.execute("echo", {"a": 1}, oob=True) == {"a": 1}


# --- a server that is a script ---


class Script:
    """One connection of a listening socket, played by the test's own thread."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)

    def play(self, act: Callable[[Callable[[], Command], Callable[[bytes], None]], None]) -> threading.Thread:
        """In a thread: accept, then `act(next_command, say)`, then close."""

        def run() -> None:
            connection, _ = self.listener.accept()
            decoder = Decoder()

            def next_command() -> Command:
                while isinstance(message := decoder.next(), NeedData):
                    data = connection.recv(65536)
                    assert data, "the client went away"
                    decoder.feed(data)
                assert isinstance(message, Command)
                return message

            with connection:
                act(next_command, connection.sendall)

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    script = Script(os.fspath(tmp_path / "script"))
    yield script
    script.listener.close()


def greet(next_command: Callable[[], Command], say: Callable[[bytes], None]) -> None:
    say(encode_greeting({"qemu": {}}))
    command = next_command()
    assert command.arguments == {}  # nothing was offered, so nothing is asked for
    say(encode_reply({}, id=command.id))


def test_replies_to_others_are_dropped(script: Script) -> None:
    def act(next_command: Callable[[], Command], say: Callable[[bytes], None]) -> None:
        say(encode_reply({}, id="departed-7"))
        greet(next_command, say)
        command = next_command()
        say(encode_error("GenericError", "?", id="departed-8") + encode_reply(5, id=MISSING))
        say(encode_reply(7, id=command.id))
        next_command()
        say(encode_reply({}, id="nobody") + encode_event("END", timestamp_us=1))

    thread = script.play(act)
    with BlockingClient(script.path) as client:
        with pytest.raises(QemuError, match="takes no out-of-band"):
            client.execute("yank", oob=True)
        assert client.execute("a") == 7
        assert client.late_replies == 2
        with pytest.raises(QmpDisconnected, match="before it answered b: the other side closed it") as caught:
            client.execute("b")
        assert caught.value.guest == "unknown"
        assert [event.name for event in client._kept] == ["END"]
        assert client.late_replies == 3
    thread.join()


@pytest.mark.parametrize("when", ["greeting", "reply", "events"])
def test_a_server_that_does_not_speak_qmp(script: Script, when: str) -> None:
    def act(next_command: Callable[[], Command], say: Callable[[bytes], None]) -> None:
        if when != "greeting":
            greet(next_command, say)
        if when == "reply":
            next_command()
        say(encode_reply({}, id="x") + encode_event("E", timestamp_us=1) + b"HTTP/1.1 400 Bad Request\r\n")

    def use() -> None:
        with BlockingClient(script.path) as client:
            if when == "reply":
                client.execute("a")
            stream = client.events(10)
            assert next(stream).name == "E"
            next(stream)

    thread = script.play(act)
    with pytest.raises(QmpDisconnected, match=r"no QMP|did not greet"):
        use()
    thread.join()


def test_a_server_that_does_not_greet(script: Script) -> None:
    with pytest.raises(QmpTimeout, match="no greeting") as caught:
        BlockingClient(script.path, deadline_s=0.02)
    assert not caught.value.was_sent


def test_a_server_that_takes_nothing(script: Script) -> None:
    release = threading.Event()

    def act(next_command: Callable[[], Command], say: Callable[[bytes], None]) -> None:
        greet(next_command, say)
        release.wait(30)

    thread = script.play(act)
    with BlockingClient(script.path) as client:
        with pytest.raises(QmpTimeout, match="did not take big") as caught:
            client.execute("big", {"x": "y" * 5_000_000}, deadline_s=0.05)
        assert caught.value.was_sent
        with pytest.raises(QmpDisconnected):  # half a command would garble the next one
            client.execute("a")
    release.set()
    thread.join()


def test_a_server_that_goes_with_our_bytes_unread_is_a_reset(script: Script) -> None:
    asked = threading.Event()

    def act(next_command: Callable[[], Command], say: Callable[[bytes], None]) -> None:
        greet(next_command, say)
        asked.wait(30)

    thread = script.play(act)
    with BlockingClient(script.path) as client:
        with pytest.raises(QmpTimeout):
            client.execute("a", deadline_s=0)
        asked.set()
        with pytest.raises(QmpDisconnected, match="Connection reset by peer"):
            list(client.events())
    thread.join()


def test_a_server_that_is_gone(script: Script) -> None:
    thread = script.play(greet)
    with BlockingClient(script.path) as client:
        thread.join()
        with pytest.raises(QmpDisconnected):
            client.execute("a")
    script.listener.close()
    with pytest.raises(QmpDisconnected, match="cannot connect to web1's monitor: Connection refused"):
        BlockingClient(script.path, name="web1's monitor")


def test_importing_it_costs_little() -> None:
    """The command line pays for this import each time; asyncio alone would double it."""
    code = "import sys, vmferry.qmp.blocking; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded: set[Any] = set(output.split())
    too_big = {"asyncio", "msgspec", "numpy", "cryptography", "rich", "ssl", "logging", "subprocess"}
    assert loaded & too_big == set()
