"""Rounds of a disk that goes back: what is due, by what the source's QEMU says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmferry import limits
from vmferry.agent import source_rounds
from vmferry.agent.source_disks import Copying
from vmferry.agent.wants import Mirror
from vmferry.core.facts import FactLog
from vmferry.qmp.errors import QmpCommandError

MIRROR = Mirror(
    "disk0", "/d/a.img", "g0", "job0", "t0", 1, size_bytes=1 << 30, since="vmferry-since:j:host-a", format="raw"
)


class Qemu:
    """Bitmaps by node and name, and what was asked for."""

    def __init__(self, **bitmaps: int) -> None:
        self.bitmaps = {"g0": {source_rounds.fresh(MIRROR): bitmaps.pop("fresh", 0)}, "t0r": dict(bitmaps)}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refuses = ""

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        self.asked.append((command, arguments or {}))
        if command == self.refuses:
            raise QmpCommandError(command, "GenericError", "the sizes differ", peer="qemu")
        listed = {node: [{"name": n, "count": c} for n, c in found.items()] for node, found in self.bitmaps.items()}
        match command:
            case "query-named-block-nodes":
                return [{"node-name": node, "dirty-bitmaps": found} for node, found in listed.items()]
            case "block-dirty-bitmap-merge":
                (each,) = (arguments or {})["bitmaps"]
                self.bitmaps["g0"][source_rounds.fresh(MIRROR)] += self.bitmaps[each["node"]][each["name"]]
            case "block-dirty-bitmap-remove":
                assert arguments is not None
                del self.bitmaps[arguments["node"]][arguments["name"]]
        return {}

    def began(self) -> list[dict[str, Any]]:
        return [arguments for command, arguments in self.asked if command == "blockdev-backup"]


def attempt_with(qemu: Qemu, *, speed: int = 0) -> Any:
    copying = Copying(speed=speed)
    return SimpleNamespace(machine=qemu, mirrors=(MIRROR,), facts=FactLog(), copying=copying, job="j", vm="web1")


async def looks(qemu: Qemu, *jobs: dict[str, Any], at_pause: bool = False) -> dict[str, Any]:
    (seen,) = await source_rounds.look(attempt_with(qemu), jobs, at_pause=at_pause)
    assert seen["id"] == MIRROR.job
    return seen


@pytest.mark.proves("S96", "S114", "S123")
async def test_a_round_that_was_taken_and_not_sent_is_still_to_be_sent() -> None:
    """1. what changed is moved to a round  2. the agent dies before the job  3. the next one looks: nothing is new, and
    everything is left."""
    qemu = Qemu(round=100 << 20)
    seen = await looks(qemu)
    assert (seen["status"], seen["total-progress"]) == ("running", 100 << 20)
    assert len(qemu.began()) == 1


async def test_little_is_ready_and_the_next_round_waits_until_that_is_known() -> None:
    qemu = Qemu(fresh=limits.DISK_ROUND_READY_BYTES)
    assert (await looks(qemu))["status"] == "ready"
    assert qemu.began() == []


async def test_more_than_fits_into_a_pause_ends_the_copy_at_once() -> None:
    qemu = Qemu(fresh=limits.DISK_ROUND_PAUSE_BYTES + 1)
    seen = await looks(qemu, at_pause=True)
    assert (seen["status"], "faster than its disk" in seen["error"]) == ("concluded", True)
    assert (await looks(Qemu(fresh=limits.DISK_ROUND_PAUSE_BYTES), at_pause=True))["status"] == "ready"


async def test_a_round_that_qemu_refuses_is_the_disks_failure() -> None:
    qemu = Qemu(fresh=100 << 20)
    qemu.refuses = "blockdev-backup"
    seen = await looks(qemu)
    assert (seen["status"], "the sizes differ" in seen["error"]) == ("concluded", True)


async def test_a_bitmap_that_somebody_took_away_proves_nothing() -> None:
    qemu = Qemu()
    qemu.bitmaps["g0"].clear()
    seen = await looks(qemu)
    assert (seen["status"], "not counted any more" in seen["error"]) == ("concluded", True)


async def test_only_the_last_round_concludes_and_it_is_not_slowed() -> None:
    qemu = Qemu(round=5)
    ended = {"id": MIRROR.job, "type": "backup", "status": "concluded", "current-progress": 5, "total-progress": 5}
    assert (await looks(qemu, ended))["status"] == "ready", "a round that is over is not the end"
    last = {**ended, "id": source_rounds.last_job(MIRROR)}
    assert (await looks(qemu, last, at_pause=True))["status"] == "concluded"
    attempt = attempt_with(qemu, speed=1 << 20)
    await source_rounds.begin_last(attempt, MIRROR)
    assert "speed" not in qemu.began()[-1]
    assert qemu.began()[-1]["auto-finalize"] is False
