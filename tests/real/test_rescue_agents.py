"""`vmferry rescue` between two agents: the table holds a guest, one command leads it out, the table does the rest."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import (
    NEWEST,
    OLDEST,
    AgentHost,
    Follower,
    Guests,
    MakePair,
    TwoAgents,
    boot,
    process_state,
    stopped,
    wait_true,
)

pytestmark = pytest.mark.real

VERSIONS = sorted({OLDEST, NEWEST})
SLOW = ("--mode", "postcopy", "--set", "max-bandwidth=2M", "--set", "max-postcopy-bandwidth=2M")
SHARED = '[memory_backend]\nkind = "memfd"\nshared = true\n'


def job(host: AgentHost) -> dict[str, Any]:
    return dict(host.execute("job-status", vm="web1"))


def switch_with_a_destination_that_hangs(pair: TwoAgents, follow: Follower) -> int:
    """Everything is sent, and the destination's QEMU, which is stopped, has not loaded it. Its process."""
    assert pair.b.process is not None
    pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
    follow.status("active")
    qemu = pair.b.qemu_pid("web1")
    with stopped(pair.b.process.pid):
        pair.a.ok("postcopy", "web1")
        follow.status("pre-switchover")
        os.kill(qemu, signal.SIGSTOP)
        wait_true(lambda: process_state(qemu) == "T", why="the destination's QEMU is stopped")
    return qemu


@pytest.mark.proves("S36", "S41", "S52", "S59")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_guest_that_left_in_postcopy_and_never_arrived_is_brought_back(
    version: str, make_pair: MakePair, guests: Guests
) -> None:
    """Under TLS. The destination's QEMU loads, and dies before anybody told it to run."""
    pair = make_pair(version)
    assert pair.b.process is not None
    boot(pair.a, guests.boot())
    here = pair.a.vm_directory("web1")
    with pair.a.follow() as follow:
        qemu = switch_with_a_destination_that_hangs(pair, follow)
        follow.status("postcopy-device")
        with stopped(pair.b.process.pid):
            os.kill(qemu, signal.SIGCONT)
            if version != OLDEST:  # there only the destination's agent could say so, and that is stopped
                follow.status("postcopy-active")
            refused = pair.a.refused("rescue", "web1", "bring-back", code=21)  # it might still be started
            assert refused["guest"] == "paused"
            assert pair.a.refused("rescue", "web1", "throw-away", code=21)["code"] == "rescue-refused"
            os.kill(qemu, signal.SIGKILL)
        ended = follow.end()
    assert "fact=brought-back" in pair.a.log()  # nobody had to ask for it
    assert (ended["outcome"], ended["error"]["guest"]) == ("source", "unharmed")
    assert pair.a.status("web1")["run_state"] == "running"
    log = here / "serial.log"
    before = count_passes(log.read_bytes())
    wait_true(lambda: count_passes(log.read_bytes()) > before + 1, why="the guest goes on")
    assert pair.b.qemus() == {}
    # And it is an ordinary guest again, which may try once more.
    assert pair.a.ok("migrate", "web1", "host-b")["outcome"] == "destination"


@pytest.mark.proves("S53")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_guest_whose_source_died_in_postcopy_is_fed_from_what_it_left_behind(
    version: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot(more=SHARED))
    here = pair.a.vm_directory("web1")
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", "--postcopy-after-passes", "0", *SLOW)
        wait_true(lambda: "effect=remember-memory" in pair.a.log(), why="the agent remembers")
        assert pair.a.refused("rescue", "web1", "feed", code=21)["retry"] == "no"  # QEMU serves it well
        os.kill(pair.a.qemu_pid("web1"), signal.SIGKILL)
        follow.until(lambda e: e.name == "JOB_CHANGE" and e.data["outcome"] == "degraded")
        letters = (here / "serial.log").read_bytes()
        done = pair.a.cli("rescue", "web1", "feed")
        assert done.code == 0, done.err
        assert "every page" in done.out
        ended = follow.end()
    assert ended["outcome"] == "destination"
    there = pair.b.vm_directory("web1")
    with pair.b.console("web1") as console:
        console.wait_bytes(4, timeout_s=30)
    assert count_passes(letters + (there / "serial.log").read_bytes()) > 3
    assert pair.b.status("web1")["run_state"] == "running"
    assert pair.a.qemus() == {}


def test_what_cannot_be_rescued_is_said_in_five_answers(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(NEWEST)
    boot(pair.a, guests.boot())
    for words, text in (
        (("bring-back",), "nothing proves"),
        (("bring-back", "--never-ran"), "its migration is in none"),
        (("throw-away", "--never-ran", "--run"), "its migration is in none"),
        (("feed",), "no migration"),
    ):
        error = pair.a.refused("rescue", "web1", *words, code=21)
        assert text in error["message"]
        assert all(error[each] for each in ("side", "guest", "retry"))
    assert pair.a.refused("rescue", "web1", "feed", "--run", code=2)["code"] == "usage"
    assert pair.a.refused("rescue", "nobody", "bring-back", code=4)["code"] == "unknown-vm"
    assert pair.a.status("web1")["run_state"] == "running"
