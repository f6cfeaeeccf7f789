"""What is done in trouble, as the user's policy says: disks that the destination cannot take, postcopies that break."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import NEWEST, OLDEST, AgentHost, Guests, MakePair, TwoAgents, boot, wait_true
from vmferry.vm.image_locks import FORBIDS_BASE, PERMISSIONS, image_locks

pytestmark = pytest.mark.real

VERSIONS = sorted({OLDEST, NEWEST})
MODES = ("precopy", "postcopy")
SLOW = ("--mode", "postcopy", "--set", "max-bandwidth=2M", "--set", "max-postcopy-bandwidth=2M")
FIRST_PORT = 49152
AT_ONCE = ("--postcopy-after-passes", "0")


class Thief:
    """Forbids others to write to an image, from now on. QEMU looks at others' locks only when it takes its own: who
    has the image keeps it, and nobody gets it any more."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        byte = FORBIDS_BASE + PERMISSIONS.index("write")
        wish = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, wish)

    def let_go(self) -> None:
        self._file.close()

    def __enter__(self) -> Thief:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()


def own_command() -> str:
    return Path("/proc/self/comm").read_text().strip()


def words(mode: str) -> tuple[str, ...]:
    return ("--mode", mode, *(AT_ONCE if mode == "postcopy" else ()))


def refused_there(pair: TwoAgents) -> bool:
    return "fact=start-refused" in pair.a.log()


def seconds_between(log: str, first: str, second: str) -> float:
    """Between two lines of an agent's log, by their own times."""
    times = []
    for needle in (first, second):
        line = next(line for line in log.splitlines() if needle in line)
        hours, minutes, seconds = line.split()[1].replace(",", ".").split(":")
        times.append(int(hours) * 3600 + int(minutes) * 60 + float(seconds))
    return times[1] - times[0]


@pytest.mark.proves("S40", "S41", "S45", "S47", "S48", "S50", "S52", "S53", "S62")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_guest_whose_disk_is_taken_by_somebody_else_goes_back_by_itself(
    version: str, mode: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    here = pair.a.vm_directory("web1")
    with Thief(guests.folder / "web1.img") as thief, pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", *words(mode))
        wait_true(lambda: refused_there(pair), why="the destination cannot take the disk")
        thief.let_go()
        ended = follow.end()
    assert (ended["outcome"], ended["error"]["guest"]) == ("source", "unharmed")
    assert "lock" in ended["error"]["message"]
    assert pair.running_on("web1") == ["host-a"]
    before = count_passes((here / "serial.log").read_bytes())
    wait_true(lambda: count_passes((here / "serial.log").read_bytes()) > before + 1, why="the guest goes on")
    assert pair.b.qemus() == {}


@pytest.mark.proves("S47", "S50", "S56", "S61")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_policy_of_hold_tries_the_start_until_the_disk_is_free(
    version: str, mode: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    with Thief(guests.folder / "web1.img") as thief, pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", "--on-storage-error", "hold", *words(mode))
        wait_true(lambda: pair.a.log().count("fact=start-refused") > 1, why="the start is tried again")
        # Not known to be refused in the moment of each further try.
        wait_true(lambda: pair.a.ok("inspect", "web1")["outcome"] == "held", why="a refused start holds the guest")
        thief.let_go()
        ended = follow.end()
    assert ended["outcome"] == "destination"
    assert pair.running_on("web1") == ["host-b"]


@pytest.mark.proves("S47", "S48", "S50", "S61")
@pytest.mark.parametrize("mode", MODES)
def test_a_disk_that_was_taken_before_another_was_refused_is_given_back(
    mode: str, make_pair: MakePair, guests: Guests
) -> None:
    """Where QEMU can; an older one has it until it ends."""
    pair = make_pair(NEWEST)
    data = guests.folder / "data.img"
    data.write_bytes(bytes(1 << 20))
    boot(pair.a, guests.boot(more=f'[[disk]]\npath = "{data}"\n'))
    with Thief(guests.folder / "web1.img") as thief, pair.a.follow() as follow:
        assert len(image_locks(str(data)).writers) == 1
        pair.a.ok("migrate", "web1", "host-b", "--detach", "--on-storage-error", "hold", *words(mode))
        wait_true(lambda: refused_there(pair), why="one disk is refused")
        wait_true(lambda: image_locks(str(data)).writers == (), why="the other one is given back")
        thief.let_go()
        assert follow.end()["outcome"] == "destination"
    (writer,) = image_locks(str(data)).writers
    assert writer.pid == pair.b.status("web1")["pid"]


@pytest.mark.proves("S41", "S47", "S54", "S58", "S61")
@pytest.mark.parametrize(("version", "mode", "answer"), [
    (OLDEST, "precopy", "recover"), (NEWEST, "postcopy", "recover"),
    (NEWEST, "precopy", "cancel"), (OLDEST, "postcopy", "cancel"), (NEWEST, "postcopy", "cancel"),
])  # fmt: skip
def test_a_policy_of_ask_keeps_both_sides_whole_until_a_person_says_what(
    version: str, mode: str, answer: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    image = guests.folder / "web1.img"
    with Thief(image) as thief, pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", "--on-storage-error", "ask", *words(mode))
        wait_true(lambda: pair.a.ok("inspect", "web1")["row"] == "G-ask-person", why="a person is asked")
        seen = pair.a.ok("inspect", "web1")
        assert (seen["outcome"], seen["remedy"]) == ("held", "try-again")
        assert f"vmferry {answer} web1" in seen["action"]
        disk = seen["source"]["disks"][0]
        assert disk["path"] == str(image)
        assert disk["forbidden_by"] == [{"pid": os.getpid(), "command": own_command()}]  # it is said who has it
        thief.let_go()
        done = pair.a.cli(answer, "web1")
        ended = follow.end()
    assert ended["outcome"] == ("destination" if answer == "recover" else "source")
    assert done.code == 0, done.err
    assert pair.running_on("web1") == ["host-b" if answer == "recover" else "host-a"]


@contextlib.contextmanager
def broken_postcopy(pair: TwoAgents, *flags: str) -> Iterator[AgentHost]:
    """The guest runs on host-b, pages are missing, and no stream gets through while the context lasts."""
    pair.a.ok("migrate", "web1", "host-b", "--detach", *AT_ONCE, *SLOW, *flags)
    wait_true(lambda: "fact=run-acked" in pair.a.log(), why="the guest runs on the destination")
    with contextlib.ExitStack() as rules:
        for port in range(FIRST_PORT, FIRST_PORT + 8):
            rules.enter_context(pair.b.net.drop(port=port, reset=True))
        wait_true(lambda: "fact=link-lost" in pair.b.log(), why="the destination has lost the channel")
        yield pair.b


def thread_states(pid: int) -> list[str]:
    """Of the guest's CPUs, as the kernel has them."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("CPU"):
            found.append((task / "stat").read_text().rsplit(")", 1)[1].split()[0])
    return found


@pytest.mark.proves("S117", "S118", "S119", "S124", "S127", "S128")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_policy_of_pause_freezes_the_guest_until_the_channel_is_back(
    version: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    with broken_postcopy(pair, "--on-postcopy-failure", "pause") as there:
        qemu = there.qemu_pid("web1")
        wait_true(lambda: "fact=frozen" in there.log(), why="the CPUs are stopped from outside")
        assert set(thread_states(qemu)) == {"t"}
        took_s = seconds_between(there.log(), "fact=link-lost", "fact=frozen")
        assert took_s < 1.0, took_s
        log = (there.vm_directory("web1") / "serial.log").read_bytes()
        began_s = time.monotonic()
        wait_true(lambda: time.monotonic() - began_s > 1.0, why="a second passes")
        assert (there.vm_directory("web1") / "serial.log").read_bytes() == log
        assert pair.a.ok("inspect", "web1")["destination"]["frozen"] is True  # and QMP answers all the while
    ended = follow_end(pair)
    assert ended["outcome"] == "destination"
    assert set(thread_states(pair.b.qemu_pid("web1"))) != {"t"}
    with pair.b.console("web1") as console:
        console.wait_bytes(2, timeout_s=30)


def follow_end(pair: TwoAgents) -> dict[str, Any]:
    found: dict[str, Any] = wait_true(
        lambda: (w := pair.a.execute("job-status", vm="web1"))["over"] and w, timeout_s=60, why="the job is over"
    )
    return found


@pytest.mark.proves("S60", "S117", "S118", "S120")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_broken_postcopy_is_held_for_a_person_after_the_time_that_the_policy_gives(
    version: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    with broken_postcopy(pair, "--retry-for", "1s"):
        wait_true(lambda: pair.a.ok("inspect", "web1")["row"] == "G-ran-broken-hold", why="a person is asked")
        seen = pair.a.ok("inspect", "web1")
        assert (seen["outcome"], seen["complete"]) == ("degraded", "both-needed")
        assert "vmferry recover web1" in seen["action"]
    done = pair.a.cli("recover", "web1")
    assert done.code == 0, done.err
    assert pair.running_on("web1") == ["host-b"]


@pytest.mark.proves("S60", "S113", "S118")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_broken_postcopy_goes_on_over_another_address(version: str, make_pair: MakePair, guests: Guests) -> None:
    """The first one is dead for guests' memory from then on; agents talk on."""
    pair = make_pair(version)
    net = pair.b.net
    assert net.address6 is not None, "hosts that are namespaces have two addresses"
    pair.b.kill()
    pair.b.flags += ["--migration-address", f"{net.address},{net.address6}"]
    pair.b.restart()
    boot(pair.a, guests.boot())
    pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
    wait_true(lambda: "fact=run-acked" in pair.a.log(), why="the guest runs there")
    refuse = "type filter hook input priority 0; }; add rule ip dead in tcp dport 49152-49167 reject with tcp reset"
    net.run(["nft", f"add table ip dead; add chain ip dead in {{ {refuse}"])
    wait_true(lambda: "fact=resume-ack" in pair.a.log(), why="the channel is back")
    pair.a.ok("set", "web1", "max-postcopy-bandwidth=1G")
    assert follow_end(pair)["outcome"] == "destination"
    assert pair.running_on("web1") == ["host-b"]


@pytest.mark.proves("S118")
def test_policies_can_be_changed_while_the_migration_runs(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(NEWEST)
    boot(pair.a, guests.boot())
    pair.a.ok("migrate", "web1", "host-b", "--detach", "--mode", "precopy", "--set", "max-bandwidth=1M")
    done = pair.a.ok("set", "web1", "on-postcopy-failure=pause", "retry-for=10m", "on-storage-error=ask")
    assert done["set"] == {"on_postcopy_failure": "pause", "retry_for_ms": 600_000, "on_storage_error": "ask"}
    assert "on-postcopy-failure" in pair.a.refused("set", "web1", "on-postcopy-failure=perhaps", code=2)["message"]
    pair.a.ok("cancel", "web1")
