"""One restore at work, with a QEMU, a feed and an agent that are values: how it can end, and what is told of it."""

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

from vmferry.agent import images, overlays, restoring
from vmferry.agent.directories import make_directory
from vmferry.agent.events import EVENTS
from vmferry.agent.open_snapshots import Opened
from vmferry.agent.restore_definition import Overlay
from vmferry.agent.restore_feed import Progress, block_objection
from vmferry.agent.restoring import RestoreAttempt, RestoreWanted, trouble_text
from vmferry.agent.vm_commands import definition_of
from vmferry.core import restore as core
from vmferry.core.facts import Fact
from vmferry.core.restore import RestoreFact as F
from vmferry.engine.frozen import FrozenDisk
from vmferry.errors import QemuError, RepositoryError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpCommandError
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
        self.at_entry: dict[Entry, Callable[[], None]] = {}
        """What happens while such an entry is being written."""
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.vms: dict[str, Any] = {}
        self.ended: dict[str, Any] | None = None
        self.reading: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self.gone: list[Any] = []
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
            remember_touches=self._note,
        )
        self.snapshot_store = SimpleNamespace(run=self._run)
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

    async def _open(self, snapshot: str) -> Opened:
        return await asyncio.shield(self.reading)

    def _adopt(self, attempt: RestoreAttempt) -> None:
        attempt.was_adopted = True
        self.vms[attempt.vm] = attempt.kept

    def _disown(self, attempt: RestoreAttempt) -> None:
        self.vms.pop(attempt.vm, None)

    async def _over(self, attempt: RestoreAttempt, result: dict[str, Any]) -> None:
        self.ended = result

    async def _pin(self, wanted: RestoreWanted) -> None:
        assert not any(kind is Entry.STARTING for kind, _ in self.entries)
        self.pinned = wanted.snapshot

    async def _note(self, *arguments: Any) -> None:
        return None

    async def _run(self, work: Any) -> None:
        return None


async def until_true(is_so: Callable[[], bool]) -> None:
    """Gives the loop turns until it is so."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class Bed:
    def __init__(self, folder: Path, *, lazy: bool = True, runs: bool = True) -> None:
        self.qemu = FakeQemu()
        self.agent = FakeAgent(folder, self.qemu)
        spec = vm_spec.pin(vm_spec.from_wire({"name": "web1", "memory": "1M"}), machine="pc-q35-7.2", accel="tcg")
        self.overlay = folder / "web1.qcow2"
        wanted = RestoreWanted(
            job="j" * 32, vm="web1", snapshot="5" * 32, name="monday", lazy=lazy, runs=runs,
            definition=definition_of(spec).to_wire(), directory=str(folder / "vm"),
            overlays=(Overlay(str(self.overlay), "/a.img", "raw"),),
        )  # fmt: skip
        assert msgspec.convert(msgspec.to_builtins(wanted), RestoreWanted) == wanted, "the journal gives it back"
        self.attempt = RestoreAttempt(self.agent, wanted)  # type: ignore[arg-type]
        reader = SimpleNamespace(head=SimpleNamespace(blocks=BLOCKS), renew_if_due=lambda: None)
        self.opened = Opened(reader, None, [])  # type: ignore[arg-type]
        self.attempt.note(F.WANTED)

    def begin(self, *, read: bool = True) -> None:
        if read:
            self.agent.reading.set_result(self.opened)
        self.task = asyncio.create_task(self.attempt.run())

    async def until(self, fact: F) -> None:
        await until_true(lambda: fact in self.attempt.log)

    async def feed(self, number: int = 0) -> FakeFeed:
        await until_true(lambda: len(FakeFeed.made) > number and bool(FakeFeed.made[number].done))
        return FakeFeed.made[number]

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


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.proves("S39")
async def test_a_lazy_restore_starts_the_guest_when_the_journal_keeps_it(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin()
    feed = await bed.feed()
    assert "cont" not in bed.qemu.told
    bed.qemu.state = "paused"
    feed.say(facts={Fact.PACKAGE_LOADED})
    await bed.until(F.RAN)
    job = bed.attempt.job
    assert bed.agent.entries == [
        (Entry.IMAGE_MADE, job), (Entry.KEPT, "web1"), (Entry.STARTING, job), (Entry.RAN, job),
    ]  # fmt: skip
    assert bed.agent.vms["web1"].machine is bed.qemu
    feed.say(facts={Fact.PEER_ACK})
    ended = await bed.end()
    assert (ended["detail"], ended["state"], ended["error"], ended["resumed_s"]) == (
        "completed",
        "concluded",
        None,
        1.0,
    )
    assert bed.overlay.exists()


async def test_a_full_restore_starts_nothing_before_all_is_there(tmp_path: Path) -> None:
    bed = Bed(tmp_path, lazy=False)
    bed.begin()
    feed = await bed.feed()
    bed.qemu.state = "paused"
    feed.say(facts={Fact.SETUP_DONE})
    assert {kind for kind, _ in bed.agent.entries} == {Entry.IMAGE_MADE}
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"
    assert bed.qemu.told.index("migrate-incoming") < bed.qemu.told.index("cont")


async def test_a_guest_that_is_to_stay_paused_is_not_started(tmp_path: Path) -> None:
    bed = Bed(tmp_path, runs=False)
    bed.begin()
    bed.qemu.state = "paused"
    (await bed.feed()).say(facts={Fact.PACKAGE_LOADED, Fact.PEER_ACK})
    ended = await bed.end()
    assert "cont" not in bed.qemu.told
    assert (ended["detail"], ended["resume_ms"]) == ("completed", None)


@pytest.mark.parametrize("error", [RepositoryError("packs/x is damaged", retry="no"), OSError("no room")])
async def test_a_snapshot_that_cannot_be_read_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    bed = Bed(tmp_path)
    bed.agent.reading.set_exception(error)
    bed.begin(read=False)
    ended = await bed.end()
    assert (ended["detail"], str(error) in ended["error"]["message"]) == ("failed", True)
    assert bed.is_nothing_left()
    assert "migrate-incoming" not in bed.qemu.told


async def test_a_qemu_with_other_memory_gets_nothing(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.opened.reader.head.blocks = [*BLOCKS, Block("vga", 4096)]  # type: ignore[misc]
    bed.begin()
    assert "vga" in (await bed.end())["error"]["message"]
    assert bed.is_nothing_left()
    assert "migrate-incoming" not in bed.qemu.told


async def test_an_image_that_is_changed_after_the_command_looked_ends_the_restore(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    stored = FrozenDisk(path="/nowhere/a.img", format="raw", way="external-snapshot", size_bytes=1, mtime_ns=2)
    bed.opened.disks = (stored,)
    bed.begin()
    ended = await bed.end()
    assert "/nowhere/a.img of the snapshot is not there" in ended["error"]["message"]
    assert bed.is_nothing_left()
    assert not FakeFeed.made


@pytest.mark.proves("S12")
async def test_a_cancel_does_not_wait_for_the_repository(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin(read=False)
    await until_true(lambda: bed.qemu.is_launched)
    bed.attempt.note(F.CANCEL)
    ended = await bed.end()
    assert (ended["detail"], ended["error"]) == ("cancelled", None)
    assert bed.is_nothing_left()


@pytest.mark.proves("S115")
async def test_a_qemu_that_does_not_take_the_guest_is_told_in_its_own_words(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin()
    (await bed.feed()).say(failed=RepositoryError("QEMU did not take it"))
    assert "its last words" in (await bed.end())["error"]["message"]
    assert bed.is_nothing_left()


async def loaded(bed: Bed) -> FakeFeed:
    """A lazy restore whose guest stands ready."""
    bed.begin()
    bed.qemu.state = "paused"
    feed = await bed.feed()
    feed.say(facts={Fact.PACKAGE_LOADED})
    return feed


@pytest.mark.proves("S58")
async def test_a_guest_that_qemu_cannot_start_stands_and_is_never_taken_away(tmp_path: Path) -> None:
    """`cont` that is refused may have been the second one, and the guest may have run."""
    bed = Bed(tmp_path)
    bed.qemu.refuses["cont"] = QmpCommandError("cont", "GenericError", "no lock", peer="QEMU")
    feed = await loaded(bed)
    await bed.until(F.STANDS)
    brief = bed.attempt.brief()
    assert (brief["state"], brief["detail"]) == ("paused", "standing")
    assert "no lock" in brief["reason"]
    assert "vmferry job resume" in brief["reason"]
    assert "web1" in bed.agent.vms, "people see it and can end it"
    assert core.cancel_refusal(bed.attempt.log) is not None
    bed.attempt.note(F.AGAIN, round_no=1)  # what 'job resume' does
    await bed.until(F.RAN)
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"
    assert bed.overlay.exists()


async def test_a_guest_whose_order_to_run_took_effect_late_is_noticed(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.qemu.refuses["cont"] = QmpCommandError("cont", "GenericError", "no lock", peer="QEMU")
    feed = await loaded(bed)
    await bed.until(F.STANDS)
    bed.qemu.resume()
    await bed.until(F.RAN)
    feed.say(facts={Fact.PEER_ACK})
    await bed.end()
    assert bed.qemu.told.count("cont") == 1


@pytest.mark.parametrize("state", ["io-error", "internal-error", "guest-panicked", "paused"])
async def test_a_guest_that_ran_and_stopped_at_once_keeps_its_disk(tmp_path: Path, state: str) -> None:
    """1. cont  2. the guest's first write finds no room  3. query-status says io-error: that is a guest that ran."""
    bed = Bed(tmp_path)
    bed.qemu.state_after = state
    feed = await loaded(bed)
    await bed.until(F.RAN)
    assert state in bed.attempt.wire()["sentence"]
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"
    assert bed.overlay.exists()
    assert not bed.qemu.is_gone


async def test_a_cancel_that_comes_while_the_last_entry_is_written_is_obeyed(tmp_path: Path) -> None:
    """1. STARTING is being written  2. a cancel is accepted  3. no order to run is sent, and RENOUNCED says so before
    anything is taken away."""
    bed = Bed(tmp_path)
    bed.begin()
    bed.qemu.state = "paused"
    bed.agent.at_entry[Entry.STARTING] = lambda: bed.attempt.note(F.CANCEL)
    (await bed.feed()).say(facts={Fact.PACKAGE_LOADED})
    ended = await bed.end()
    assert ended["detail"] == "cancelled"
    assert "cont" not in bed.qemu.told
    kinds = [kind for kind, _ in bed.agent.entries]
    assert kinds[-3:] == [Entry.RENOUNCED, Entry.FORGOTTEN, Entry.ENDED]
    assert bed.is_nothing_left()


async def test_a_file_that_somebody_else_made_is_never_taken_away(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.overlay.write_text("the disk of another guest")
    bed.begin()
    ended = await bed.end()
    assert ended["detail"] == "failed"
    assert "cannot get its name" in ended["error"]["message"]
    assert bed.overlay.read_text() == "the disk of another guest"
    assert [name for name in os.listdir(tmp_path) if name.startswith("web1.qcow2")] == ["web1.qcow2"]


@pytest.mark.parametrize("error", [KeyError("a field"), ValueError("a state"), MemoryError()])
async def test_a_defect_before_the_guest_may_run_ends_the_restore(tmp_path: Path, error: Exception) -> None:
    bed = Bed(tmp_path)
    bed.qemu.refuses["migrate-incoming"] = error
    bed.begin()
    ended = await bed.end()
    assert ended["detail"] == "failed"
    assert "a defect of vmferry" in ended["error"]["message"]
    assert bed.is_nothing_left()


async def test_a_defect_after_the_guest_may_run_is_told_and_leaves_it_be(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.qemu.refuses["cont"] = KeyError("a field")
    feed = await loaded(bed)
    await bed.until(F.RAN)
    assert bed.attempt.error is not None
    assert "a defect" in bed.attempt.error.message
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"


async def test_a_cont_without_an_answer_is_tried_again_and_never_undone(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin()
    bed.qemu.state = "paused"
    bed.qemu.refuses["cont"] = QemuError("no answer")
    feed = await bed.feed()
    feed.say(facts={Fact.PACKAGE_LOADED})
    await bed.until(F.RAN)
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"
    assert bed.qemu.told.count("cont") == 2


@pytest.mark.parametrize("is_whole", [False, True], ids=["lacks-pages", "has-just-got-its-last"])
async def test_the_end_of_a_guest_that_ran_ends_its_restore_and_takes_nothing_away(
    tmp_path: Path, is_whole: bool
) -> None:
    """Nor is it told as a guest that is here, with an exit code of 0."""
    bed = Bed(tmp_path)
    bed.begin()
    bed.qemu.state = "paused"
    (await bed.feed()).say(facts={Fact.PACKAGE_LOADED})
    await bed.until(F.RAN)
    assert bed.qemu.on_gone is not None
    if is_whole:
        FakeFeed.made[0].say(facts={Fact.PEER_ACK})
    bed.qemu.on_gone()
    ended = await bed.end()
    assert (ended["detail"], ended["error"]["guest"]) == ("lost", "lost")
    assert "its QEMU ended" in ended["sentence"]
    assert bed.overlay.exists()
    assert bed.agent.gone == [bed.agent.vms["web1"]]


async def test_a_guest_that_a_person_stopped_does_not_come_back_with_the_end_of_its_restore(tmp_path: Path) -> None:
    """1. `vmferry stop` takes it out of the VMs  2. its restore, which waited for pages, hears that it is gone."""
    bed = Bed(tmp_path)
    bed.begin()
    bed.qemu.state = "paused"
    (await bed.feed()).say(facts={Fact.PACKAGE_LOADED})
    await bed.until(F.RAN)
    assert bed.qemu.on_gone is not None
    del bed.agent.vms["web1"]
    bed.qemu.on_gone()
    assert (await bed.end())["detail"] == "lost"
    assert bed.agent.vms == {}


@pytest.mark.proves("S93", "S94")
async def test_trouble_pauses_the_job_and_its_end_resumes_it(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin()
    bed.qemu.state = "paused"
    feed = await bed.feed()
    feed.say(facts={Fact.PACKAGE_LOADED})
    await bed.until(F.RAN)
    error = RepositoryError("packs/x is damaged", retry="no", hint="verify")
    feed.say(trouble=SimpleNamespace(error=error, guest_waits=True))
    brief = bed.attempt.brief()
    assert (brief["state"], brief["detail"]) == ("paused", "waiting")
    assert "packs/x" in brief["reason"]
    feed.say(trouble=None)
    assert bed.attempt.brief()["state"] == "running"
    feed.say(facts={Fact.PEER_ACK})
    await bed.end()
    states = [data["status"] for name, data in bed.agent.events if name == "JOB_STATUS_CHANGE"]
    assert states == ["created", "running", "paused", "running", "waiting", "pending", "concluded"]


async def test_a_broken_channel_is_joined_again(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin()
    bed.qemu.state = "paused"
    feed = await bed.feed()
    feed.say(facts={Fact.PACKAGE_LOADED})
    await bed.until(F.RAN)
    bed.qemu.refuses["migrate-recover"] = QmpCommandError("migrate-recover", "GenericError", "not yet", peer="QEMU")
    feed.say(lost="the connection broke")
    again = await bed.feed(1)
    assert feed.is_stopped
    assert again.is_broken
    assert bed.attempt.brief()["detail"] == "rejoining"
    again.say(has_rejoined=True)
    await bed.until(F.REJOINED)
    again.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"


@pytest.mark.parametrize(
    ("waits", "runs", "words"),
    [(True, True, "waits for one"), (False, True, "runs until"), (False, False, "has not begun")],
)
def test_what_trouble_means_for_the_guest(waits: bool, runs: bool, words: str) -> None:
    lost = trouble_text(RepositoryError("no answer", retry="yes"), guest_waits=waits, runs=runs)
    assert words in lost
    assert "again and again" in lost
    damaged = trouble_text(RepositoryError("bad", retry="no", hint="look"), guest_waits=waits, runs=runs)
    assert damaged.endswith("look")


def test_blocks_must_fit() -> None:
    assert block_objection(BLOCKS, LINES) == ""
    assert "room for" in block_objection([BLOCKS[0], Block("pc.bios", 1 << 19)], LINES)
    assert "pc.bios" in block_objection(BLOCKS[:1], LINES)
