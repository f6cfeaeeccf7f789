"""Pair P19: a postcopy breaks, and the destination's QEMU answers nothing more, as its main loop waits for a page."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.errors import QmpTimeout
from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import NEWEST, OLDEST, Guests, MakePair, TwoAgents, boot, wait_true

pytestmark = pytest.mark.real

FIRST_PORT = 49152
SLOW = ("--mode", "postcopy", "--postcopy-after-passes", "0",
        "--set", "max-bandwidth=2M", "--set", "max-postcopy-bandwidth=2M")  # fmt: skip
MIB = 1 << 20
SILENCE_S = 1.0


@pytest.fixture
def monitors() -> Iterator[Path]:
    """Not in the test's own folder: a socket's path is short."""
    with tempfile.TemporaryDirectory(prefix="vfm-", dir="/tmp") as folder:
        yield Path(folder)


def waits_for_a_page(pid: int) -> bool:
    """Whether a CPU of this QEMU does, by the kernel's word."""
    found = False
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found |= (task / "wchan").read_text() == "handle_userfault"
    return found


@contextlib.contextmanager
def broken_postcopy(pair: TwoAgents) -> Iterator[int]:
    """The guest runs on host-b, a CPU waits for a page, and no stream gets through while the context lasts. The QEMU's
    process."""
    pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
    wait_true(lambda: "fact=run-acked" in pair.a.log(), why="the guest runs on the destination")
    qemu = pair.b.qemu_pid("web1")
    with contextlib.ExitStack() as rules:
        for port in range(FIRST_PORT, FIRST_PORT + 8):
            rules.enter_context(pair.b.net.drop(port=port, reset=True))
        wait_true(lambda: "fact=link-lost" in pair.b.log(), why="the destination has lost the channel")
        wait_true(lambda: waits_for_a_page(qemu), why="a CPU waits for a page")
        yield qemu


def make_it_hang(monitor: BlockingClient, how: str, folder: Path) -> None:
    """QEMU's main loop waits for a page from here on, which is shown."""
    arguments = {"val": MIB, "size": 15 * MIB, "filename": str(folder / "memory")} if how == "pmemsave" else None
    with pytest.raises(QmpTimeout):
        monitor.execute(how, arguments, deadline_s=SILENCE_S)
    with pytest.raises(QmpTimeout):
        monitor.execute("query-status", deadline_s=SILENCE_S)
    assert {"type": "migration"} in monitor.execute("query-yank", oob=True, deadline_s=SILENCE_S)


@pytest.mark.parametrize(
    ("version", "clear_text", "how"),
    [
        (OLDEST, False, "stop"),  # waits for a CPU that waits for a page
        (NEWEST, False, "stop"),
        (NEWEST, True, "stop"),
        (OLDEST, True, "pmemsave"),  # waits itself, with QEMU's big lock, as a device does; refused by a newer one
        (OLDEST, False, "pmemsave"),
    ],
)
@pytest.mark.proves("S36", "S53", "S66", "S123")
def test_a_destination_that_hangs_for_want_of_a_page_is_joined_again(
    version: str, clear_text: bool, how: str, make_pair: MakePair, guests: Guests, monitors: Path
) -> None:
    pair = make_pair(version, clear_text=clear_text, monitors=monitors)
    boot(pair.a, guests.boot())
    here = pair.a.vm_directory("web1")
    with pair.a.follow() as follow:
        with broken_postcopy(pair) as qemu:
            monitor = BlockingClient(str(monitors / f"{qemu}.sock"))
            make_it_hang(monitor, how, monitors)
            assert "fact=resume-ack" not in pair.b.log()
        ended = follow.end()
    assert ended["outcome"] == "destination"
    assert "it is recovered out of band" in pair.b.log()
    assert "fact=resume-ack" in pair.b.log()
    state = monitor.execute("query-status", deadline_s=10)["status"]
    assert state == ("paused" if how == "stop" else "running")  # what was asked for was done in the end
    monitor.execute("cont")
    monitor.close()
    there = pair.b.vm_directory("web1")
    with pair.b.console("web1") as console:
        console.wait_bytes(3, timeout_s=30)
    assert count_passes(pair.letters(here, there)) >= 4
    assert pair.running_on("web1") == ["host-b"]
    assert not list(there.glob("rec*"))
