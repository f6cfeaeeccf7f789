"""What sends a snapshot into a QEMU, and its end at any moment."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.restore_beds import BLOCKS
from vmferry.agent.restore_feed import PAGE_BYTES, Feed
from vmferry.engine.frozen import FrozenState
from vmferry.wire.events import Configuration


class Zeros:
    """A snapshot with nothing but zeros."""

    head = SimpleNamespace(blocks=BLOCKS)

    def is_zero(self, block: str) -> Any:
        return np.ones({each.name: each.size_bytes for each in BLOCKS}[block] // PAGE_BYTES, np.bool_)


def feed(*, lazy: bool, broken: bool) -> Feed:
    state = FrozenState(Configuration("pc-q35-7.2"), (), None, True, 2)
    reader: Any = Zeros()
    return Feed(
        reader, state, lazy=lazy, page_bytes={}, broken=broken, name="feed", loop=asyncio.get_running_loop(),
        on_news=lambda: None,
    )  # fmt: skip


@pytest.mark.parametrize("moment", ["made", "begun", "over"])
@pytest.mark.parametrize(("lazy", "broken"), [(True, False), (False, False), (True, True)])
async def test_it_may_be_stopped_at_any_moment(moment: str, lazy: bool, broken: bool) -> None:
    threads = set(threading.enumerate())
    made = feed(lazy=lazy, broken=broken)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if moment != "made":
            (made.rejoin if broken else made.start)(ours)
        if moment == "over":
            theirs.close()
            await asyncio.to_thread(made.outgoing._thread.join)  # type: ignore[union-attr]
        await made.stop()
        await made.stop()
    assert not made.image.blocks, "its memory is given back"
    left = {each.name for each in set(threading.enumerate()) - threads}
    assert not {each for each in left if each.startswith("feed")}
