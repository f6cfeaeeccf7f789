"""A lazy restore whose channel breaks, or whose agent is another one: it is joined again as it was."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.restore_beds import LINES, Bed, FakeFeed, use_fakes
from vmferry.agent.restore_feed import Feed
from vmferry.core.facts import Fact
from vmferry.core.restore import RestoreFact as F
from vmferry.engine.lazy import Touches
from vmferry.qmp.errors import QmpCommandError
from vmferry.store.manifest import Block
from vmferry.vm.ram_blocks import RamBlockLine


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch)


async def joined_again(bed: Bed, feed: FakeFeed, *, restarts: bool) -> FakeFeed:
    """After a break, by the same agent or the next one."""
    if restarts:
        bed.task.cancel()
        await asyncio.wait({bed.task})
        await feed.stop()
        await bed.take_up()
    else:
        feed.say(lost="the connection broke")
    return await bed.feed(1)


async def test_a_broken_channel_is_joined_again(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    feed = await bed.ran()
    bed.qemu.refuses["migrate-recover"] = QmpCommandError("migrate-recover", "GenericError", "not yet", peer="QEMU")
    feed.say(lost="the connection broke")
    again = await bed.feed(1)
    assert feed.is_stopped
    assert again.is_broken
    assert bed.attempt.brief()["detail"] == "rejoining"
    again.say(has_rejoined=True)
    await bed.until(F.REJOINED)
    again.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"


@pytest.mark.parametrize("restarts", [False, True], ids=["same-agent", "next-agent"])
async def test_huge_pages_are_sent_whole_after_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: bool
) -> None:
    """QEMU takes a page of 2 MiB in one piece, or not at all."""
    huge = (dataclasses.replace(LINES[0], page_bytes=2 << 20), LINES[1])

    async def lines(machine: Any) -> tuple[RamBlockLine, ...]:
        return huge

    monkeypatch.setattr("vmferry.agent.guest_memory.block_lines", lines)
    bed = Bed(tmp_path)
    feed = await bed.ran()
    assert feed.given["page_bytes"]["pc.ram"] == 2 << 20
    again = await joined_again(bed, feed, restarts=restarts)
    assert again.given["page_bytes"]["pc.ram"] == 2 << 20
    again.say(has_rejoined=True)
    again.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"


@pytest.mark.parametrize("known", [None, Touches(["pc.ram"], np.array([5], np.uint64))], ids=["none", "known"])
@pytest.mark.parametrize("restarts", [False, True], ids=["same-agent", "next-agent"])
async def test_the_order_of_first_touches_survives_a_break(
    tmp_path: Path, restarts: bool, known: Touches | None
) -> None:
    """A known order is read ahead in after it too; what is recorded is all that the guest asked for, or nothing."""
    bed = Bed(tmp_path)
    bed.opened.order = known
    feed = await bed.ran()
    assert feed.given["order"] is known
    feed.touches.add("pc.ram", 7, 2)
    again = await joined_again(bed, feed, restarts=restarts)
    assert again.given["order"] is known
    again.touches.add("pc.ram", 3, 1)
    again.touches.add("pc.ram", 7, 1)
    again.say(has_rejoined=True)
    again.say(facts={Fact.PEER_ACK})
    await bed.end()
    expected = [] if restarts or known else [[7, 8, 3]]
    assert [each.codes.tolist() for each in bed.agent.remembered] == expected


async def test_a_feed_sends_in_the_pages_that_it_is_told() -> None:
    blocks = [Block("pc.ram", 4 << 20), Block("pc.bios", 1 << 18)]
    reader: Any = SimpleNamespace(
        head=SimpleNamespace(blocks=blocks),
        is_zero=lambda name: np.zeros({each.name: each.pages for each in blocks}[name], bool),
    )
    state: Any = SimpleNamespace(fill=lambda image: None)
    feed = await asyncio.to_thread(
        Feed, reader, state, lazy=True, page_bytes={"pc.ram": 2 << 20}, broken=True, name="restore",
        loop=asyncio.get_running_loop(), on_news=lambda: None,
    )  # fmt: skip
    assert {block.name: block.host_page_pages for block in feed.image} == {"pc.ram": 512, "pc.bios": 1}
    feed.image.close()
