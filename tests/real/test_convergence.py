"""What helps a migration to end: auto-converge, shown while it works and gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.testing.hosts import NEWEST, OLDEST, AgentHost, Guests, MakePair, boot, wait_true

pytestmark = pytest.mark.real


def job(host: AgentHost) -> dict[str, Any]:
    return dict(host.execute("job-status", vm="web1"))


@pytest.mark.proves("S110", "S112")
@pytest.mark.parametrize("qemu", [OLDEST, NEWEST])
def test_auto_converge_is_visible_and_off_after_a_cancel(qemu: str, make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(qemu, qemu)
    boot(pair.a, guests.boot(delay=0))
    slow = ("--set", "max-bandwidth=8M", "--set", "auto-converge=on", "--set", "downtime-limit=1ms")
    pair.a.ok("migrate", "web1", "host-b", "--mode", "precopy", "--detach", *slow)
    seen = wait_true(lambda: job(pair.a) if (job(pair.a)["throttle_percent"] or 0) > 0 else None, timeout_s=60)
    assert 0 < seen["throttle_percent"] <= 99
    assert seen["remaining_by_source"]["ram"] == seen["remaining_bytes"]
    pair.a.ok("cancel", "web1")
    ended = job(pair.a)
    assert (ended["status"], ended["outcome"]) == ("cancelled", "source")
    with pair.a.console("web1") as console:
        # Slowed to a few percent, the guest would need minutes for so many passes over its memory.
        written = len(b"".join(chunk.data for chunk in console.chunks()))
        console.wait_bytes(written + 20, timeout_s=20)
    again = pair.a.ok("migrate", "web1", "host-b", "--mode", "precopy")
    assert again["throttle_percent"] in (0, None)
