"""A postcopy breaks while the agents cannot talk, and heals as soon as memory can move again: each side acts alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.qmp.blocking import BlockingClient
from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import (
    AGENT_PORT,
    MIGRATION_PORTS,
    NEWEST,
    OLDEST,
    AgentHost,
    Guests,
    MakePair,
    TwoAgents,
    boot,
    wait_true,
)

pytestmark = pytest.mark.real

HEALS_S = 2.0
"""From the moment in which memory can move again."""
BROKEN_S = 1.0
SLOW = ("--mode", "postcopy", "--postcopy-after-passes", "0",
        "--set", "max-bandwidth=2M", "--set", "max-postcopy-bandwidth=2M")  # fmt: skip


@contextlib.contextmanager
def agents_apart(pair: TwoAgents, *, reset: bool) -> Iterator[None]:
    """No word of one agent reaches the other one, and no new connection."""
    with pair.b.net.drop(port=AGENT_PORT, reset=reset):
        yield


def wait_said(host: AgentHost, words: str, *, since: int = 0) -> None:
    """Until the host's agent has said so, `since` that place of its log."""
    wait_true(lambda: words in host.log()[since:], why=f"{host.name} says {words}")


def heals(pair: TwoAgents, *, unheard: bool = False) -> float:
    """Breaks the stream for a while. How long it takes from its end to two QEMUs that are joined.

    A source's agent that has begun anew cannot say of an old QEMU what the loss of its channel means before it has
    heard of the destination: its row says that it knows of the loss. The destination's QEMU hears of it when it asks
    for a page; one whose guest waits for a page that was asked for asks for none, and hears of it from the source. With
    `unheard` it is made sure that it did."""
    sides = [(host, len(host.log())) for host in (pair.a, pair.b)]
    with pair.b.net.drop(port=MIGRATION_PORTS, reset=True):
        wait_said(pair.a, "-broken outcome=", since=sides[0][1])
        end_s = time.monotonic() + BROKEN_S
        wait_true(lambda: time.monotonic() > end_s)
        assert not any("fact=resume-ack" in host.log()[since:] for host, since in sides)
        assert not (unheard and "fact=link-lost" in pair.b.log()[sides[1][1] :])
        free_s = time.monotonic()
    for host, since in sides:
        wait_said(host, "fact=resume-ack", since=since)
    took_s = time.monotonic() - free_s
    print(f"healed within {took_s * 1000:.0f} ms")
    return took_s


@pytest.mark.parametrize("reset", [True, False], ids=["refused", "silent"])
@pytest.mark.parametrize("clear_text", [False, True], ids=["tls", "clear-text"])
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.proves("S36", "S53", "S121", "S123")
def test_a_postcopy_that_breaks_while_the_agents_cannot_talk_heals(
    version: str, clear_text: bool, reset: bool, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version, clear_text=clear_text)
    boot(pair.a, guests.boot())
    here = pair.a.vm_directory("web1")
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
        wait_true(lambda: "fact=run-acked" in pair.a.log(), why="the guest runs on the destination")
        with agents_apart(pair, reset=reset):
            took_s = heals(pair)
            assert "the source called" in pair.b.log()
            assert "link=down" in pair.a.log()
            assert "command=peer-reconnect" not in pair.a.log()
        ended = follow.end()
    assert took_s < HEALS_S
    assert ended["outcome"] == "destination"
    there = pair.b.vm_directory("web1")
    with pair.b.console("web1") as console:
        console.wait_bytes(3, timeout_s=30)
    assert count_passes(pair.letters(here, there)) >= 4
    assert pair.running_on("web1") == ["host-b"]
    assert pair.a.qemus() == {}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.proves("S26", "S36", "S53", "S121", "S123")
def test_a_linux_guest_loses_nothing_by_it(version: str, make_pair: MakePair, guests: Guests) -> None:
    """Its memory and its disk are checked inside of it; the stream breaks twice, and both agents begin anew between."""
    pair = make_pair(version)
    pair.a.ok("run", guests.linux())
    with pair.a.console("web1") as console:
        console.wait_walks(1, timeout_s=60)
    folders = [pair.a.vm_directory("web1")]
    pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
    wait_true(lambda: "fact=run-acked" in pair.a.log(), why="the guest runs on the destination")
    folders.append(pair.b.vm_directory("web1"))
    with agents_apart(pair, reset=False):
        first_s = heals(pair)
        for host in (pair.b, pair.a):
            host.kill()
            host.restart()
        # A QEMU whose main loop waits for a page takes no new session before the page is there. If the stream broke
        # before, nobody could tell it to recover: out of band is only who was let in by the main loop.
        wait_true(
            lambda: pair.b.status("web1")["run_state"] == "running",
            timeout_s=60,
            why="host-b has its QEMU's monitor again",
        )
        again_s = heals(pair)
    with pair.b.console("web1") as console:
        console.wait_walks(2, timeout_s=120)
    wait_true(lambda: pair.a.qemus() == {}, timeout_s=60, why="the source's QEMU is not needed any more")
    assert pair.running_on("web1") == ["host-b"]
    assert pair.judge(*folders).complaints() == []
    assert max(first_s, again_s) < HEALS_S


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.proves("S36", "S53", "S66", "S123")
def test_a_destination_that_hears_nothing_of_the_break_is_joined_again(
    version: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """Its guest stands, asks for no page, and so its QEMU sends nothing that could be refused."""
    monitors = tmp_path / "monitors"
    monitors.mkdir()
    pair = make_pair(version, clear_text=True, monitors=monitors)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
        wait_true(lambda: "fact=run-acked" in pair.a.log(), why="the guest runs on the destination")
        (qemu,) = pair.b.qemus()
        with contextlib.closing(BlockingClient(str(monitors / f"{qemu}.sock"))) as monitor:
            monitor.execute("stop", deadline_s=20)
            with agents_apart(pair, reset=True):
                took_s = heals(pair, unheard=True)
                assert "the source called" in pair.b.log()
            monitor.execute("cont", deadline_s=20)
        ended = follow.end()
    assert took_s < HEALS_S
    assert ended["outcome"] == "destination"
    assert pair.running_on("web1") == ["host-b"]


@pytest.mark.proves("S36", "S53", "S123")
def test_a_recovery_that_needs_several_connections(make_pair: MakePair, guests: Guests) -> None:
    """With preempt QEMU listens by itself; the word says where."""
    pair = make_pair(NEWEST, clear_text=True)
    boot(pair.a, guests.boot())
    here = pair.a.vm_directory("web1")
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW, "--set", "postcopy-preempt=on")
        wait_true(lambda: "fact=run-acked" in pair.a.log(), why="the guest runs on the destination")
        with agents_apart(pair, reset=True):
            took_s = heals(pair)
            assert "the source called" in pair.b.log()
        ended = follow.end()
    assert took_s < HEALS_S
    assert ended["outcome"] == "destination"
    assert count_passes(pair.letters(here, pair.b.vm_directory("web1"))) >= 2
    assert pair.running_on("web1") == ["host-b"]


def test_nothing_listens_before_and_after(make_pair: MakePair, guests: Guests) -> None:
    """The door is open while pages are missing, at one port, and no longer."""
    pair = make_pair(OLDEST)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
        wait_true(lambda: "fact=run-acked" in pair.a.log(), why="the guest runs on the destination")
        doors = wait_true(lambda: pair.b.listening() - {AGENT_PORT}, why="the door is open")
        assert len(doors) == 1
        assert MIGRATION_PORTS[0] <= min(doors) <= MIGRATION_PORTS[1]
        follow.end()
    assert pair.b.listening() == {AGENT_PORT}
