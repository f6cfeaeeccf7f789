"""Threads of another process, stopped from outside and let go again."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmferry.errors import QemuError
from vmferry.vm.freeze import Freezer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="tracing needs the right to trace"),
    pytest.mark.proves("S119", "S124", "S127"),
]

COUNTERS = 3
DEADLINE_S = 10.0
COUNTING = """
import mmap, struct, sys, threading
file = open(sys.argv[1], "r+b")
shared = mmap.mmap(file.fileno(), 0)
def count(place):
    struct.pack_into("q", shared, 64 * place + 8, threading.get_native_id())
    while True:
        struct.pack_into("q", shared, 64 * place, struct.unpack_from("q", shared, 64 * place)[0] + 1)
for place in range(1, 3):
    threading.Thread(target=count, args=(place,), daemon=True).start()
count(0)
"""


class Counting:
    """A process whose three threads count, each for itself."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(64 * COUNTERS))
        self.process = subprocess.Popen([sys.executable, "-c", COUNTING, str(path)])
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 0)
        self.until(lambda: all(self.count(place) > 0 for place in range(COUNTERS)))

    def count(self, place: int) -> int:
        return int(struct.unpack_from("q", self._shared, 64 * place)[0])

    def thread(self, place: int) -> int:
        return int(struct.unpack_from("q", self._shared, 64 * place + 8)[0])

    def until(self, holds: Callable[[], bool]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < end_s, [self.count(place) for place in range(COUNTERS)]

    def until_counted(self, place: int, more: int = 1000) -> None:
        begun = self.count(place)
        self.until(lambda: self.count(place) >= begun + more)


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Counting]:
    made = Counting(tmp_path / "counters")
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


async def test_only_the_threads_that_were_named_stand_still_until_they_are_let_go(counting: Counting) -> None:
    # The kernel says what a thread does: one stopped with Python's lock in its hands keeps the others waiting.
    freezer = Freezer(counting.process.pid)
    try:
        await freezer.freeze([counting.thread(1), counting.thread(2)])
        assert freezer.is_frozen
        assert [_state(counting, place) for place in (1, 2)] == ["t", "t"]
        assert _state(counting, 0) != "t"
        before = [counting.count(place) for place in (1, 2)]
        await freezer.freeze([counting.thread(1)])  # frozen already: nothing changes
        assert [counting.count(place) for place in (1, 2)] == before
        await freezer.thaw()
        assert not freezer.is_frozen
        for place in range(COUNTERS):
            counting.until_counted(place)
        await freezer.thaw()  # nothing to do
    finally:
        await freezer.close()


async def test_all_or_none(counting: Counting) -> None:
    freezer = Freezer(counting.process.pid)
    try:
        with pytest.raises(QemuError, match="cannot be stopped from outside") as told:
            await freezer.freeze([counting.thread(1), 2**22 - 1])
        assert told.value.guest == "running-on-destination"
        assert not freezer.is_frozen
        for place in range(COUNTERS):
            counting.until_counted(place)
    finally:
        await freezer.close()


async def test_close_lets_them_go_and_may_be_used_again(counting: Counting) -> None:
    freezer = Freezer(counting.process.pid)
    await freezer.freeze([counting.thread(2)])
    await freezer.close()
    counting.until_counted(2)
    await freezer.freeze([counting.thread(2)])
    assert _state(counting, 2) == "t"
    await freezer.close()
    counting.until_counted(2)


async def test_a_process_that_ended_meanwhile_needs_nothing(counting: Counting) -> None:
    freezer = Freezer(counting.process.pid)
    await freezer.freeze([counting.thread(1)])
    counting.process.kill()
    await freezer.close()
    assert counting.process.wait() == -9
    with pytest.raises(QemuError, match="has no thread"):
        await freezer.freeze([counting.process.pid])
    await freezer.close()


def test_who_traces_may_die_and_the_threads_go_on(counting: Counting) -> None:
    """As when the agent is killed: nothing is stopped for good."""
    holding = (
        "import asyncio, sys\n"
        "from vmferry.vm.freeze import Freezer\n"
        "async def hold():\n"
        "    freezer = Freezer(int(sys.argv[1]))\n"
        "    await freezer.freeze([int(sys.argv[2])])\n"
        "    print('frozen', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "    await freezer.close()\n"  # it lives until here: with the thread that traces would go what it holds
        "asyncio.run(hold())\n"
    )
    command = [sys.executable, "-c", holding, str(counting.process.pid), str(counting.thread(1))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "frozen\n"
            assert _state(counting, 1) == "t"
        finally:
            holder.kill()
    counting.until_counted(1)


def _state(counting: Counting, place: int) -> str:
    """The kernel's letter for the thread: t is stopped by a tracer."""
    stat = Path(f"/proc/{counting.process.pid}/task/{counting.thread(place)}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]
