"""The fences: one contract, three implementations; and the source's use of them with a silent destination."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from vmferry.agent import fences
from vmferry.agent.fences import Fence, GenerationFence, LocksFence, PersonFence, Verdict, busy_image, stamps
from vmferry.errors import HostUnreachable, QemuError
from vmferry.testing.fence_contract import FenceWorld, check_fence
from vmferry.vm.image_locks import WriteLock


class SharedDisks:
    """Two images that another process may have."""

    def __init__(self, directory: Path) -> None:
        self.paths = [str(directory / name) for name in ("a.img", "b.img")]
        for path in self.paths:
            Path(path).write_bytes(bytes(4096))
        self._other: WriteLock | None = None
        self._is_silent = False

    def free(self) -> None:
        self._give_back()

    def runs(self) -> None:
        self._give_back()
        self._other = WriteLock.take(self.paths[1])
        assert self._other is not None

    def silent(self) -> None:
        self._give_back()
        self._is_silent = True

    def write(self, data: bytes) -> None:
        Path(self.paths[0]).write_bytes(data)

    def _give_back(self) -> None:
        self._is_silent = False
        if self._other is not None:
            self._other.release()
            self._other = None

    async def tries_to_start(self) -> bool:
        taken = [WriteLock.take(path) for path in self.paths]
        for lock in taken:
            if lock is not None:
                lock.release()
        return all(taken)

    def fence(self) -> Fence:
        return LocksFence({} if self._is_silent else stamps(self.paths))


class OtherAgent:
    """An agent that has renounced, says that the guest runs, or does not answer."""

    def __init__(self) -> None:
        self._says: dict[str, Any] | Exception = {}

    def free(self) -> None:
        self._says = {"gone": True}

    def runs(self) -> None:
        self._says = {"ran": True}

    def silent(self) -> None:
        self._says = HostUnreachable("host-b does not answer")

    async def tries_to_start(self) -> bool:
        return self._says != {"gone": True}

    def fence(self) -> Fence:
        return GenerationFence(cast(Any, self), {"job": "j1"})

    async def call(self, command: str, arguments: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        assert (command, arguments) == ("peer-target", {"job": "j1"})
        if isinstance(self._says, Exception):
            raise self._says
        return self._says


class Person:
    """Somebody who went and looked."""

    def __init__(self) -> None:
        self._dead, self._against = False, ""

    def free(self) -> None:
        self._dead, self._against = True, ""

    def runs(self) -> None:
        self._dead, self._against = True, "its disk is in use"

    def silent(self) -> None:
        self._dead, self._against = False, ""

    async def tries_to_start(self) -> bool:
        return not self._dead

    def fence(self) -> Fence:
        return PersonFence(says_dead=self._dead, against=self._against)


@pytest.mark.proves("S36", "S55", "S57", "S131")
@pytest.mark.parametrize("kind", ["locks", "generation", "person"])
async def test_every_fence_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    worlds: dict[str, FenceWorld] = {"locks": SharedDisks(tmp_path), "generation": OtherAgent(), "person": Person()}
    assert worlds[kind].fence().name == kind
    await check_fence(worlds[kind])


@pytest.mark.proves("S57")
async def test_an_image_that_was_written_since_proves_nothing_although_its_locks_are_free(tmp_path: Path) -> None:
    disks = SharedDisks(tmp_path)
    fence = disks.fence()
    disks.write(bytes(8192))
    found = await fence.ask()
    assert found.verdict is Verdict.UNKNOWN
    assert "was changed" in found.text
    assert await disks.tries_to_start(), "what was taken in part is given back"


@pytest.mark.proves("S54")
async def test_a_fence_that_is_taken_in_part_is_given_back(tmp_path: Path) -> None:
    disks = SharedDisks(tmp_path)
    disks.runs()
    assert (await disks.fence().ask()).verdict is Verdict.RUNS
    first = WriteLock.take(disks.paths[0])
    assert first is not None
    first.release()


async def test_what_is_taken_too_late_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. an image hangs, so the fence says that it does not know  2. it comes back, and the thread takes its lock."""
    disks = SharedDisks(tmp_path)
    hangs, taken, given_back, take = threading.Event(), threading.Event(), threading.Event(), WriteLock.take

    def slow(path: str) -> WriteLock | None:
        assert hangs.wait(10)
        lock = take(path)
        if path == disks.paths[-1]:
            taken.set()
        return lock

    monkeypatch.setattr(fences, "ASK_S", 0.01)
    fence = disks.fence()
    release = fence.release

    def releasing() -> None:
        release()
        if taken.is_set():
            given_back.set()

    monkeypatch.setattr(fence, "release", releasing)
    monkeypatch.setattr(WriteLock, "take", slow)
    assert (await fence.ask()).verdict is Verdict.UNKNOWN
    hangs.set()
    assert await asyncio.to_thread(given_back.wait, 10)
    monkeypatch.setattr(WriteLock, "take", take)
    assert await disks.tries_to_start()


async def test_an_answer_that_decides_nothing_and_an_error_are_unknown() -> None:
    other = OtherAgent()
    assert (await other.fence().ask()).verdict is Verdict.UNKNOWN
    other._says = QemuError("whatever")
    assert (await other.fence().ask()).verdict is Verdict.UNKNOWN


def test_what_cannot_be_looked_at_has_no_stamp_and_no_holder(tmp_path: Path) -> None:
    assert stamps([str(tmp_path / "not there")]) == {}
    assert busy_image([str(tmp_path / "not there")]) == ""
    path = tmp_path / "a.img"
    path.write_bytes(b"x")
    assert busy_image([str(path)]) == ""
    held = WriteLock.take(str(path))
    assert held is not None
    assert str(path) in busy_image([str(path)])
    held.release()
    assert fences.ImageStamp.of(str(path)).size_bytes == 1
