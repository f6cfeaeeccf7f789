"""A restore at work with a QEMU, a feed and an agent that are values, for tests to lead it through its life."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest

from vmferry.agent import images, overlays, restore_after, restoring
from vmferry.agent.directories import make_directory
from vmferry.agent.events import EVENTS
from vmferry.agent.open_snapshots import Opened
from vmferry.agent.restore_definition import Overlay
from vmferry.agent.restore_feed import Progress
from vmferry.agent.restoring import RestoreAttempt, RestoreWanted
from vmferry.agent.vm_commands import definition_of
from vmferry.core.facts import Fact
from vmferry.core.restore import RestoreFact as F
from vmferry.engine.lazy import Touches
from vmferry.errors import VmferryError
from vmferry.jobs.journal import Entry, Written, replay
from vmferry.qmp.codec import Event
from vmferry.store.manifest import Block
from vmferry.vm import spec as vm_spec
from vmferry.vm.ram_blocks import RamBlockLine
from vmferry.vm.spawn import ProcessIdentity

BLOCKS = [Block("pc.ram", 1 << 20), Block("pc.bios", 1 << 18)]
LINES = (RamBlockLine("pc.ram", 4096, 1 << 20, 1 << 20), RamBlockLine("pc.bios", 4096, 4096, 1 << 18))
WAIT_S = 10.0


class FakeQemu:
    """A machine: what it was told, and what it answers."""

    version = (11, 1)
    pid = 7
    qmp_path = "/run/qmp.sock"
    identity = ProcessIdentity(7, 1, "boot")

    def __init__(self) -> None:
        self.told: list[str] = []
        self.state = "inmigrate"
        self.state_after = "running"
        """Where the guest gets to by the time that somebody asks after `cont`."""
        self.refuses: dict[str, Exception] = {}
        self.on_gone: Callable[[], None] | None = None
        self.on_event: Callable[[Event], None] | None = None
        self.is_gone = self.is_launched = False

    async def execute(self, command: str, arguments: Any = None, **more: Any) -> Any:
        self.told.append(command)
        if command in self.refuses:
            raise self.refuses.pop(command)
        if command == "cont":
            self.resume()
            self.state = self.state_after
        if command == "migrate-recover":
            self.listen(arguments["uri"].removeprefix("unix:"))

    def resume(self) -> None:
        self.state = "running"
        assert self.on_event is not None
        self.on_event(Event("RESUME", {}, 1_000_000))

    def listen(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()

    async def run_state(self, **more: Any) -> str:
        return self.state

    async def migration(self, **more: Any) -> dict[str, Any]:
        return {"status": "postcopy-paused"}

    async def kill(self) -> bool:
        self.is_gone = True
        return True

    async def close(self) -> None:
        if hasattr(self, "listener"):
            self.listener.close()


class FakeFeed:
    """A feed whose facts the test sets. `made` are all of them."""

    made: ClassVar[list[FakeFeed]] = []

    def __init__(self, reader: Any, state: Any, *, lazy: bool, broken: bool = False, on_news: Any, **more: Any) -> None:
        self.facts: set[Fact] = set()
        self.trouble: Any = None
        self.lost: str | None = None
        self.failed: VmferryError | None = None
        self.has_rejoined = self.is_stopped = False
        self.outgoing = SimpleNamespace(saw_running=lambda: None)
        self.given = more
        self.touches = Touches(["pc.ram", "pc.bios"])
        assert threading.current_thread() is not threading.main_thread(), "maps of all pages: not on the event loop"
        self.is_broken, self.on_news = broken, on_news
        self.done: list[str] = []
        FakeFeed.made.append(self)

    def has(self, fact: Fact) -> bool:
        return fact in self.facts

    def say(self, **now: Any) -> None:
        """Something is so now."""
        self.facts |= now.pop("facts", set())
        for name, value in now.items():
            setattr(self, name, value)
        self.on_news()

    def start(self, sock: Any) -> None:
        sock.close()
        self.done.append("start")

    def rejoin(self, sock: Any) -> None:
        sock.close()
        self.done.append("rejoin")

    def progress(self) -> Progress:
        return Progress(3, 4)

    def outcome(self) -> None:
        return None

    async def stop(self) -> None:
        self.is_stopped = True


class FakeAgent:
    """What an attempt uses of its agent."""

    def __init__(self, folder: Path, qemu: FakeQemu) -> None:
        self.qemu = qemu
        self.folder = folder
        self.entries: list[tuple[Entry, str]] = []
        self.written: list[Written] = []
        """The same, with all that is in them."""
        self.at_entry: dict[Entry, Callable[[], None]] = {}
        """What happens while such an entry is being written."""
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.vms: dict[str, Any] = {}
        self.ended: dict[str, Any] | None = None
        self.reading: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self.gone: list[Any] = []
        self.pinned = ""
        self.remembered: list[Touches] = []
        self.clock = SimpleNamespace(wall_s=lambda: 1.0, now_s=asyncio.get_running_loop().time)
        self.config = SimpleNamespace(name="host-a", qemu="qemu-system-x86_64")
        self.journal = SimpleNamespace(append=self._append)
        self.host = SimpleNamespace(find_qemu=lambda directory: None)
        self.restores = SimpleNamespace(
            snapshots=SimpleNamespace(open=self._open),
            pin=self._pin,
            adopt=self._adopt,
            disown=self._disown,
            over=self._over,
            remember_touches=self._remember,
        )
        self.snapshot_store = SimpleNamespace(run=self._run)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.jobs: Any = None
        self.vm_gone = self.gone.append

    def publish(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, {"host": "host-a", **data}))

    def tail_log(self, runtime: Any) -> str:
        return "its last words"

    async def launch(self, vm: str, argv: list[str], runtime: Any) -> Any:
        make_directory(runtime.directory)
        self.qemu.is_launched = True
        return self.qemu

    async def _append(self, kind: Entry, subject: str, body: Any = None) -> None:
        if kind in self.at_entry:
            self.at_entry.pop(kind)()
        self.entries.append((kind, subject))
        self.written.append(Written(len(self.written), kind, subject, body or {}))

    async def _open(self, snapshot: str) -> Opened:
        return await asyncio.shield(self.reading)

    def _adopt(self, attempt: RestoreAttempt) -> None:
        attempt.was_adopted = True
        self.vms[attempt.vm] = attempt.kept

    def _disown(self, attempt: RestoreAttempt) -> None:
        self.vms.pop(attempt.vm, None)

    async def _over(self, attempt: RestoreAttempt, result: dict[str, Any]) -> None:
        self.ended = result

    def keep_task(self, task: asyncio.Task[Any]) -> None:
        self.tasks.add(task)

    async def _pin(self, wanted: RestoreWanted) -> None:
        assert self.pinned or not any(kind is Entry.STARTING for kind, _ in self.entries)
        self.pinned = wanted.snapshot

    async def _remember(self, wanted: RestoreWanted, touches: Touches) -> None:
        self.remembered.append(touches)

    async def _run(self, work: Any) -> None:
        return None


async def until_true(is_so: Callable[[], bool]) -> None:
    """Gives the loop turns until it is so."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class Bed:
    def __init__(self, folder: Path, *, lazy: bool = True, runs: bool = True, job: str = "j" * 32) -> None:
        self.qemu = FakeQemu()
        self.agent = FakeAgent(folder, self.qemu)
        spec = vm_spec.pin(vm_spec.from_wire({"name": "web1", "memory": "1M"}), machine="pc-q35-7.2", accel="tcg")
        self.overlay = folder / "web1.qcow2"
        wanted = RestoreWanted(
            job=job, vm="web1", snapshot="5" * 32, name="monday", lazy=lazy, runs=runs,
            definition=definition_of(spec).to_wire(), directory=str(folder / "vm"),
            overlays=(Overlay(str(self.overlay), "/a.img", "raw"),),
        )  # fmt: skip
        assert msgspec.convert(msgspec.to_builtins(wanted), RestoreWanted) == wanted, "the journal gives it back"
        self.attempt = RestoreAttempt(self.agent, wanted)  # type: ignore[arg-type]
        reader = SimpleNamespace(head=SimpleNamespace(blocks=BLOCKS), renew_if_due=lambda: None)
        self.opened = Opened(reader, None, None)  # type: ignore[arg-type]
        self.attempt.note(F.WANTED)

    def begin(self, *, read: bool = True) -> None:
        if read:
            self.agent.reading.set_result(self.opened)
        self.task = asyncio.create_task(self.attempt.run())

    async def take_up(self) -> None:
        """The next agent, with what the journal has, goes on with the same QEMU."""
        begun: list[RestoreAttempt] = []
        self.agent.restores.begin = begun.append
        wanted = Written(0, Entry.RESTORE_WANTED, self.attempt.job, msgspec.to_builtins(self.attempt.wanted))
        state = replay([wanted, *self.agent.written]).jobs[self.attempt.job]
        await restore_after.take_up(self.agent, state)  # type: ignore[arg-type]
        (self.attempt,) = begun
        self.task = asyncio.create_task(self.attempt.run())

    async def until(self, fact: F) -> None:
        await until_true(lambda: fact in self.attempt.log)

    async def feed(self, number: int = 0) -> FakeFeed:
        await until_true(lambda: len(FakeFeed.made) > number and bool(FakeFeed.made[number].done))
        return FakeFeed.made[number]

    async def loaded(self) -> FakeFeed:
        """Its QEMU has the device state, and nobody has told it to run."""
        self.begin()
        self.qemu.state = "paused"
        feed = await self.feed()
        feed.say(facts={Fact.PACKAGE_LOADED})
        return feed

    async def ran(self) -> FakeFeed:
        """And the guest runs."""
        feed = await self.loaded()
        await self.until(F.RAN)
        return feed

    async def end(self) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            await self.task
        await self.qemu.close()
        assert self.attempt.ended.is_set()
        assert all(feed.is_stopped for feed in FakeFeed.made)
        for name, data in self.agent.events:
            kind = EVENTS[name]
            assert set(data) <= {field.name for field in dataclasses.fields(kind)}, name
            msgspec.convert(data, kind)
        assert self.agent.ended is not None
        assert self.agent.entries[-1] == (Entry.ENDED, self.attempt.job)
        return self.agent.ended

    def is_nothing_left(self) -> bool:
        return self.qemu.is_gone and not self.overlay.exists() and not (self.agent.folder / "vm").exists()


def use_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores make their overlays, feeds and QEMUs of these."""
    FakeFeed.made = []
    monkeypatch.setattr(restoring, "Feed", FakeFeed)

    async def lines(machine: Any) -> tuple[RamBlockLine, ...]:
        return LINES

    async def make(overlay: overlays.Layer, *, job: str, qemu: str) -> images.Identity:
        name = images.temporary(overlay.path, job)
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        found = os.stat(name)
        return found.st_dev, found.st_ino

    async def settled(machine: Any) -> str:
        return "completed"

    monkeypatch.setattr("vmferry.agent.guest_memory.block_lines", lines)
    monkeypatch.setattr(overlays, "make_overlay", make)
    monkeypatch.setattr("vmferry.agent.rescue.settled", settled)
