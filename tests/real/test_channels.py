"""The channels under load, and an agent that answers whatever its QEMU is doing."""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import Any

import pytest

from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import NEWEST, OLDEST, AgentHost, Guests, MakePair, boot, wait_true

pytestmark = pytest.mark.real

SLOW = ("--mode", "precopy", "--set", "max-bandwidth=4M", "--set", "downtime-limit=1ms")


def job(host: AgentHost) -> dict[str, Any]:
    return dict(host.execute("job-status", vm="web1"))


@pytest.mark.proves("S65", "S89")
@pytest.mark.parametrize("qemu", [OLDEST, NEWEST])
def test_a_destination_that_reads_nothing_holds_the_source_back_and_no_agent(
    qemu: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(qemu, qemu)
    boot(pair.a, guests.boot(delay=0))
    here = pair.a.vm_directory("web1")
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
        follow.status("active")
        wait_true(lambda: (job(pair.a)["transferred_bytes"] or 0) > 1 << 20, timeout_s=30)
        pid = next(iter(pair.b.qemus()))
        os.kill(pid, signal.SIGSTOP)
        try:
            # What the sockets hold still goes; then the source's QEMU stands still with it.
            sent: list[int] = []

            def stands_still() -> bool:
                sent.append(job(pair.a)["transferred_bytes"])
                return len(sent) > 8 and sent[-1] == sent[-6]

            wait_true(stands_still)
            took_ms = []
            asked: list[tuple[AgentHost, str, dict[str, Any]]] = [
                (pair.b, "agent-status", {}),
                (pair.b, "vm-list", {"local": True}),
                (pair.a, "job-status", {"vm": "web1"}),
            ]
            for host, command, arguments in asked * 5:
                begun_s = time.monotonic()
                host.execute(command, **arguments)
                took_ms.append((time.monotonic() - begun_s) * 1000)
            assert statistics.median(took_ms) < 100, took_ms
        finally:
            os.kill(pid, signal.SIGCONT)
        pair.a.ok("set", "web1", "max-bandwidth=10G", "downtime-limit=2s")
        wire = follow.end()
    assert (wire["status"], wire["outcome"]) == ("completed", "destination")
    with pair.b.console("web1") as console:
        console.wait_bytes(4, timeout_s=30)
    assert count_passes(pair.letters(here, pair.b.vm_directory("web1"))) > 3


@pytest.mark.proves("S88")
def test_postcopy_with_a_channel_of_its_own_for_urgent_pages(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(NEWEST, NEWEST)
    boot(pair.a, guests.boot(delay=500))
    here = pair.a.vm_directory("web1")
    words = ("--mode", "postcopy", "--set", "postcopy-preempt=on", "--postcopy-after-passes", "0")
    wire = pair.a.ok("migrate", "web1", "host-b", *words)
    assert (wire["mode"], wire["status"], wire["outcome"]) == ("postcopy", "completed", "destination")
    with pair.b.console("web1") as console:
        console.wait_bytes(4, timeout_s=30)
    assert count_passes(pair.letters(here, pair.b.vm_directory("web1"))) > 3
    assert pair.a.qemus() == {}
