"""A small agent-like QMP server for the tests of this folder."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vmferry.errors import PlanRefused
from vmferry.qmp.codec import Command
from vmferry.qmp.errors import QmpCommandError
from vmferry.qmp.server import CommandNotFound, QmpServer, Session

VERSION = {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "vmferry 0"}


class FixedClock:
    def now_s(self) -> float:
        return 5.0

    def wall_s(self) -> float:
        return 1000.25


class Handler:
    """`wait` blocks until `gates[name]` is set; the rest answers at once. `log` has what began, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.began: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled: list[Any] = []

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def __call__(self, session: Session, command: Command) -> Any:
        arguments = command.arguments
        self.log.append((command.name, arguments.get("name")))
        self.began.put_nowait(arguments.get("name"))
        match command.name:
            case "echo":
                return arguments
            case "nothing":
                return None
            case "peer":
                peer = session.peer
                return {"uid": peer.credentials and peer.credentials.uid, "certificate": peer.certificate}
            case "wait":
                try:
                    await self.gate(arguments["name"]).wait()
                except asyncio.CancelledError:
                    self.cancelled.append(arguments["name"])
                    raise
                return arguments["name"]
            case "emit":
                for number in range(arguments["count"]):
                    session.emit("TICK", {"number": number, "padding": "x" * arguments.get("padding", 0)})
                return None
            case "big":
                return "x" * arguments["size"]
            case "refuse":
                raise PlanRefused("web1 cannot go there", hint="mend it", cause="no kvm")
            case "relay":
                raise QmpCommandError("cont", "DeviceNotActive", "not now", peer="the QEMU of web1")
            case "bug":
                raise KeyError("oops")
            case "unsayable":
                return object()
            case _:
                raise CommandNotFound(command.name)


@dataclass
class Serving:
    """A listening server, its path, and what its handler saw."""

    server: QmpServer
    path: str
    handler: Handler


def new_server(name: str = "test", handler: Handler | None = None, prompt: frozenset[str] | None = None) -> QmpServer:
    return QmpServer(handler or Handler(), version=VERSION, clock=FixedClock(), name=name, prompt=prompt)


@pytest.fixture
def make_server() -> Callable[..., QmpServer]:
    return new_server


@pytest.fixture
async def serving(tmp_path: Path) -> AsyncIterator[Serving]:
    """Afterwards nothing of the server may be left."""
    handler = Handler()
    server = new_server(handler=handler)
    path = os.fspath(tmp_path / "qmp")
    await server.listen_unix(path)
    yield Serving(server, path, handler)
    await server.close()
    assert server.sessions == ()
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if name.startswith("qmp-")], names
    assert os.listdir(tmp_path) == []
