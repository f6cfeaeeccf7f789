"""What sends a snapshot into a QEMU: the engine's threads on one side, the agent's event loop on the other.

Rule 1: whatever a thread has to say reaches the loop as one call of `on_news`; the loop then looks at what is so.
Rule 2: `numpy` and the rooms that need it are imported here only when a feed is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.errors import RepositoryError, VmferryError
from vmferry.vm.ram_blocks import RamBlockLine

if TYPE_CHECKING:
    from vmferry.agent.open_snapshots import HeldSnapshot
    from vmferry.engine.frozen import FrozenState
    from vmferry.engine.lazy import Touches, Trouble
    from vmferry.engine.outgoing import OutgoingOutcome
    from vmferry.store.manifest import Block

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is."""

    pages: int
    pages_whole: int


def block_objection(blocks: Sequence[Block], lines: Sequence[RamBlockLine]) -> str:
    """Why a QEMU with these RAM blocks cannot take the snapshot's; '' if it can."""
    there = {line.name: line for line in lines}
    stored = {block.name: block for block in blocks}
    if set(stored) != set(there):
        odd = ", ".join(sorted(set(stored) ^ set(there)))
        return f"the snapshot and the QEMU that was started for it have different RAM blocks: {odd}"
    for name, block in stored.items():
        # Some blocks of firmware tables have room to grow, and get their length with the stream.
        if block.size_bytes > there[name].total_bytes:
            return (
                f"the RAM block {name} has {block.size_bytes} bytes in the snapshot, and its QEMU has room for "
                f"{there[name].total_bytes}"
            )
    return ""


class Feed:
    """One connection's worth of sending. Made in a thread, because five maps of a guest's pages take their time (0.1 s
    for 64 GiB); all else on the loop: `start` or `rejoin` once, then `stop`."""

    def __init__(
        self,
        reader: HeldSnapshot,
        state: FrozenState,
        *,
        lazy: bool,
        page_bytes: dict[str, int],
        order: Touches | None = None,
        broken: bool = False,
        name: str,
        loop: asyncio.AbstractEventLoop,
        on_news: Callable[[], None],
    ) -> None:
        from vmferry.engine import lazy as engine_lazy
        from vmferry.engine.outgoing import Outgoing
        from vmferry.engine.sender import OutgoingOptions
        from vmferry.wire.events import RamBlock

        self._loop = loop
        self._on_news = on_news
        self.is_lazy, self._is_broken = lazy, broken
        blocks = [
            RamBlock(each.name, each.size_bytes, size if (size := page_bytes.get(each.name, PAGE_BYTES)) != PAGE_BYTES
                     else None)
            for each in reader.head.blocks
        ]  # fmt: skip
        self.image = engine_lazy.image_of(blocks, reader, is_lazy=lazy)
        state.fill(self.image)
        self.source = engine_lazy.LazySource(
            self.image,
            reader,
            order=order,
            readers=1,
            run_pages=limits.RESTORE_LAZY_RUN_PAGES if lazy else limits.RESTORE_FULL_RUN_PAGES,
            on_trouble=self._hear_trouble,
            name=name,
        )
        options = OutgoingOptions(
            postcopy="at-once" if lazy else "never", result_s=limits.RESTORE_RESULT_S,
            near_pages=limits.RESTORE_NEAR_PAGES,
        )  # fmt: skip
        make = Outgoing.broken if broken else Outgoing
        self.outgoing = make(
            self.image, options=options, on_absent=self.source.on_absent, on_request=self.source.on_request, name=name
        )
        self._whole = sum(block.count for block in self.image)

    def start(self, sock: socket.socket) -> None:
        """Sends everything into this connection, which is the feed's from now on."""
        assert not self._is_broken
        self.outgoing.ledger.listen(self._hear_fact)
        self.source.start()
        if not self.is_lazy:
            self.source.go()
        self.outgoing.start(lambda: sock)

    def rejoin(self, sock: socket.socket) -> None:
        """Sends what the other side of a broken postcopy lacks."""
        assert self._is_broken
        self.outgoing.ledger.listen(self._hear_rejoined)
        self.source.start()
        self.outgoing.recover(lambda: sock)

    @property
    def touches(self) -> Touches:
        """What the guest asked for over this connection."""
        return self.source.touches

    @property
    def trouble(self) -> Trouble | None:
        """Why pages do not come, if that is so."""
        return self.source.trouble or self.source.stalled()

    def has(self, fact: Fact) -> bool:
        """Whether the endpoint has recorded it."""
        return fact in self.outgoing.ledger.log

    @property
    def has_rejoined(self) -> bool:
        """The other side of a broken postcopy goes on."""
        return self.outgoing.ledger.log.last_round(Fact.RESUME_ACK) > 0

    @property
    def lost(self) -> str | None:
        """Why the connection broke after the other side had the device state; None: it did not."""
        log = self.outgoing.ledger.log
        newest = log.last_round(Fact.LINK_LOST)
        if newest <= (1 if self._is_broken else 0):
            return None
        entry = log.entry(Fact.LINK_LOST, newest)
        return entry.text if entry is not None else "the connection broke"

    @property
    def failed(self) -> VmferryError | None:
        """Why it ended before the other side had the device state, or all of it."""
        log = self.outgoing.ledger.log
        if Fact.ERROR not in log:
            return None
        return self.outgoing.error or RepositoryError("QEMU did not take the snapshot")

    def progress(self) -> Progress:
        """Looks at the mark of every page: 25 µs per GiB."""
        import numpy as np

        return Progress(sum(int(np.count_nonzero(block.sent)) for block in self.image), self._whole)

    def outcome(self) -> OutgoingOutcome:
        """The endpoint's numbers."""
        return self.outgoing.outcome()

    async def stop(self) -> None:
        """Ends the threads, begun or not; again is fine. One that hangs in a read of the repository ends with that."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        outcome = self.outgoing.stop()
        left = self.source.stop()
        if not outcome.threads_left and not left:
            self.image.close()

    # --- on the engine's threads --------------------------------------------------------------------------

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._on_news)

    def _hear_fact(self, fact: Fact) -> None:
        # Not before: the guest waits for its device state, and what is read ahead takes turns with that.
        if fact is Fact.PACKAGE_LOADED and self.is_lazy:
            self.source.go()
        self._tell()

    def _hear_rejoined(self, fact: Fact) -> None:
        if fact is Fact.RESUME_ACK:
            self.source.go()
        self._tell()

    def _hear_trouble(self, _: Trouble | None) -> None:
        # Threads may tell in another order than it was: what is so is asked of the source.
        self._tell()
