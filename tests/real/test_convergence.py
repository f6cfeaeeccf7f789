"""What helps a migration to end: auto-converge, shown while it works and gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.testing.hosts import NEWEST, OLDEST, AgentHost, Guests, MakePair, boot, wait_true

pytestmark = pytest.mark.real


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


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


@pytest.mark.proves("S90")
@pytest.mark.parametrize("machine", ["pc-q35-7.2", "q35"])
@pytest.mark.skipif(version_of(NEWEST) < (8, 1), reason="needs QEMU 8.1")
def test_devices_are_asked_before_the_switchover(machine: str, make_pair: MakePair, guests: Guests) -> None:
    """An old machine type has the destination agree in any case, a new one only for devices that have a say."""
    pair = make_pair(NEWEST, NEWEST)
    boot(pair.a, guests.boot(more=f'machine = "{machine}"'))
    wire = pair.a.ok("migrate", "web1", "host-b", "--mode", "precopy", "--set", "switchover-ack=on")
    told = [row["what"] for row in wire["timeline"]]
    assert told.index("switchover-ack") < told.index("devices-ready") < told.index("continue")
    assert (wire["outcome"], wire["waits_for_devices"]) == ("destination", False)


@pytest.mark.proves("S90")
@pytest.mark.skipif(version_of(OLDEST) >= (8, 1), reason="needs a QEMU before 8.1")
def test_a_qemu_that_cannot_ask_its_devices_is_named_before_the_start(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(OLDEST, OLDEST)
    boot(pair.a, guests.boot())
    error = pair.a.refused("migrate", "web1", "host-b", "--set", "switchover-ack=on", code=8)
    assert "does not know switchover-ack" in error["message"]
    assert pair.b.qemus() == {}
