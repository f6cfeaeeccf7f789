"""A cancel ends in `cancelled` from every phase before the commit, and the guest runs where it was."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import (
    MIGRATION_PORTS,
    NEWEST,
    PAIRS,
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

LIMIT_S = 5.0
SLOW = ("--set", "max-bandwidth=2M")
NEVER_DONE = ("--set", "max-bandwidth=40M", "--set", "downtime-limit=1ms")


def begin(pair: TwoAgents, *words: str) -> str:
    return str(pair.a.ok("migrate", "web1", "host-b", "--mode", "precopy", "--detach", *words)["job"])


def cancel(pair: TwoAgents, host: AgentHost | None = None) -> dict[str, Any]:
    """`vmferry cancel`: exit code 0, `cancelled`, within the limit."""
    began_s = time.monotonic()
    wire = (host or pair.a).ok("cancel", "web1")
    took_s = time.monotonic() - began_s
    assert (wire["status"], wire["outcome"], wire["over"]) == ("cancelled", "source", True)
    assert wire["error"]["code"] == "cancelled"
    assert wire["error"]["exit_code"] == 12
    assert took_s < LIMIT_S, f"the cancel took {took_s:.1f} s"
    return wire


def still_runs(pair: TwoAgents) -> None:
    """The guest makes progress on the source, and nowhere else."""
    with pair.a.console("web1") as console:
        console.wait_bytes(len(b"".join(c.data for c in console.chunks())) + 2, timeout_s=20)
    assert pair.running_on("web1") == ["host-a"]
    wait_true(lambda: not pair.b.qemus(), why="the destination's QEMU is gone")


def moves_at_once(pair: TwoAgents) -> None:
    """The next migration starts at once and succeeds, and the guest has lived one life."""
    here = pair.a.vm_directory("web1")
    wire = pair.a.ok("migrate", "web1", "host-b", "--mode", "precopy")
    assert wire["outcome"] == "destination"
    with pair.b.console("web1") as console:
        console.wait_bytes(3, timeout_s=30)
    assert count_passes(pair.letters(here, pair.b.vm_directory("web1"))) > 2
    assert pair.a.qemus() == {}


@pytest.mark.proves("S10", "S11", "S13")
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_while_memory_moves(source: str, destination: str, make_pair: MakePair, guests: Guests) -> None:
    """Also: a second cancel changes nothing, the other host's command line can do it, no failure is told."""
    pair = make_pair(source, destination)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        begin(pair, *SLOW)
        follow.status("active")
        wire = cancel(pair, pair.b)
        follow.end()
        assert follow.statuses() == ["setup", "active", "cancelling", "cancelled"]
    assert wire["error"]["cause"] is None
    again = pair.a.ok("cancel", "web1")
    assert (again["job"], again["status"]) == (wire["job"], "cancelled")
    still_runs(pair)
    moves_at_once(pair)


@pytest.mark.proves("S12", "S13")
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_while_the_destination_reads_nothing(
    source: str, destination: str, make_pair: MakePair, guests: Guests
) -> None:
    """Its QEMU is stopped in the middle of memory: the source's is stuck in a send."""
    pair = make_pair(source, destination)
    boot(pair.a, guests.boot(delay=500))
    with pair.a.follow() as follow:
        begin(pair, *NEVER_DONE)
        follow.status("active")
        with stopped(pair.b.qemu_pid("web1")):
            wait_true(lambda: queue_bytes(pair) > 100_000, why="the send queue is full")
            cancel(pair)
    still_runs(pair)
    moves_at_once(pair)


def queue_bytes(pair: TwoAgents) -> int:
    """What waits to be sent on the migration's connection at the source."""
    lines = pair.hosts.a.run(["ss", "-Htn", "state", "established"]).splitlines()
    words = [line.split() for line in lines if line.strip()]
    queued = [int(w[1]) for w in words if MIGRATION_PORTS[0] <= int(w[3].rpartition(":")[2]) <= MIGRATION_PORTS[1]]
    return max(queued, default=0)


@pytest.mark.proves("S12", "S13")
def test_while_the_channel_cannot_be_opened(make_pair: MakePair, guests: Guests) -> None:
    """The migration ports are dead: the source's agent dials and hears nothing."""
    pair = make_pair()
    boot(pair.a, guests.boot())
    if pair.hosts.kind != "netns":
        pytest.skip("loopback addresses have no cable")
    with pair.hosts.b.drop(port=MIGRATION_PORTS[0]), pair.a.follow() as follow:
        begin(pair)
        follow.until(lambda e: e.name == "JOB_CHANGE" and e.data["row"] == "P-start")
        cancel(pair)
    still_runs(pair)
    moves_at_once(pair)


@pytest.mark.proves("S13")
def test_before_the_destination_has_answered(make_pair: MakePair, guests: Guests) -> None:
    """Its agent is stopped, so the plan waits for it; the place that was never made is no hindrance later."""
    pair = make_pair()
    boot(pair.a, guests.boot())
    assert pair.a.ok("plan", "web1", "host-b")["possible"]  # the link between the agents is up
    assert pair.b.process is not None
    with stopped(pair.b.process.pid):
        begin(pair)
        cancel(pair)
    still_runs(pair)
    moves_at_once(pair)


@pytest.mark.proves("S12", "S13", "S36")
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_in_the_pause_before_the_switchover(source: str, destination: str, make_pair: MakePair, guests: Guests) -> None:
    """The destination's agent is stopped, so nobody gives the leave to hand over."""
    pair = make_pair(source, destination)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        begin(pair, *SLOW)
        follow.status("active")
        assert pair.b.process is not None
        with stopped(pair.b.process.pid):
            pair.a.ok("set", "web1", "max-bandwidth=1G")
            follow.status("pre-switchover")
            cancel(pair)
        assert "device" not in follow.statuses()
    still_runs(pair)
    moves_at_once(pair)


def hold_in_device(pair: TwoAgents, follow: Follower) -> int:
    """Stops the destination's QEMU in the pause before the switchover, so that device state goes nowhere."""
    begin(pair, *SLOW)
    follow.status("active")
    assert pair.b.process is not None
    qemu = pair.b.qemu_pid("web1")
    with stopped(pair.b.process.pid):
        pair.a.ok("set", "web1", "max-bandwidth=1G")
        follow.status("pre-switchover")
        os.kill(qemu, signal.SIGSTOP)
        wait_true(lambda: process_state(qemu) == "T", why="the destination's QEMU is stopped")
    follow.status("device")
    return qemu


@pytest.mark.proves("S12", "S13", "S36", "S66")
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_while_device_state_is_stuck(source: str, destination: str, make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(source, destination)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        hold_in_device(pair, follow)
        cancel(pair)
    still_runs(pair)
    moves_at_once(pair)


@pytest.mark.proves("S13", "S34")
def test_after_the_commit_it_is_refused_in_words(make_pair: MakePair, guests: Guests) -> None:
    """Postcopy with a crawling background: the guest runs there and both sides are needed."""
    pair = make_pair(NEWEST)
    boot(pair.a, guests.boot(delay=500))
    with pair.a.follow() as follow:
        pair.a.ok(
            "migrate", "web1", "host-b", "--mode", "postcopy", "--detach", *NEVER_DONE,
            "--set", "max-postcopy-bandwidth=1M",
        )  # fmt: skip
        follow.until(lambda e: e.name == "JOB_CHANGE" and e.data["outcome"] == "destination")
        for host in (pair.a, pair.b):
            error = host.refused("cancel", "web1", code=18)
            assert "the migration goes forward" in error["message"]
        pair.a.ok("set", "web1", "max-postcopy-bandwidth=1G")
        wire = follow.end()
    assert wire["outcome"] == "destination"
    over = pair.a.cli("cancel", "web1", "--json")  # after the end it changes nothing, and does not say that it did
    assert (over.code, over.error["guest"]) == (18, "running-on-destination")
    assert (over.json["status"], over.json["outcome"]) == ("completed", "destination")


@pytest.mark.proves("S14", "S15")
def test_an_error_before_the_cancel_is_kept_and_shown(make_pair: MakePair, guests: Guests) -> None:
    """The destination's QEMU dies; while the agent cleans that up, somebody cancels."""
    pair = make_pair()
    boot(pair.a, guests.boot())
    assert pair.b.process is not None
    with pair.a.follow() as follow:
        begin(pair, *SLOW)
        follow.status("active")
        with stopped(pair.b.process.pid):  # it cannot confirm, so `failing` lasts until its limit
            os.kill(pair.b.qemu_pid("web1"), signal.SIGKILL)
            follow.status("failing")
            wire = cancel(pair)
        follow.end()
        assert follow.statuses() == ["setup", "active", "failing", "cancelling", "cancelled"]
    assert wire["error"]["cause"]["code"] == "failed"
    facts = [row["what"] for row in wire["timeline"]]
    assert facts.index("error") < facts.index("cancel")
    still_runs(pair)
    moves_at_once(pair)


@pytest.mark.proves("S14", "S20")
def test_a_cancel_after_a_failure_changes_nothing(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        begin(pair, *SLOW)
        follow.status("active")
        os.kill(pair.b.qemu_pid("web1"), signal.SIGKILL)
        failed = follow.end()
    assert failed["status"] == "failed"
    after = pair.a.cli("cancel", "web1", "--json")
    assert after.code == 11
    assert (after.json["status"], after.json["error"]) == ("failed", failed["error"])


@pytest.mark.proves("S22", "S30", "S53")
@pytest.mark.parametrize("phase", ["active", "device"])
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_a_destination_that_dies_is_a_failure_and_the_guest_runs_on(
    phase: str, source: str, destination: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(source, destination)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        if phase == "active":
            begin(pair, *SLOW)
            follow.status("active")
            os.kill(pair.b.qemu_pid("web1"), signal.SIGKILL)
        else:
            os.kill(hold_in_device(pair, follow), signal.SIGKILL)
        wire = follow.end()
        told = follow.statuses()
        assert told[-2:] == ["failing", "failed"]
        assert "cancelled" not in told
    assert (wire["outcome"], wire["error"]["code"], wire["error"]["exit_code"]) == ("source", "failed", 11)
    assert (wire["error"]["side"], wire["error"]["guest"]) == ("destination", "unharmed")
    still_runs(pair)
    moves_at_once(pair)


def test_nothing_to_cancel(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot())
    error = pair.b.refused("cancel", "web1", code=2)
    assert "web1 has no migration to cancel" in error["message"]
    assert pair.a.refused("cancel", "web9", code=4)["code"] == "unknown-vm"
