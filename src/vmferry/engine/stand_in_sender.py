"""The stand-in for a source: feeds a destination in postcopy-paused out of memory that outlived its QEMU.

Theory of operation
-------------------
The pages come from an `Image` whose blocks are another process's memory or a RAM file (`image.ForeignMemory`); the
protocol is that of `Outgoing` in a recovery. What is added here is what only a stand-in needs: blocks that are out of
reach, and the number of RAM's section, which the dead source knew and nobody else.

    stand-in                                destination
    RECV_BITMAP for every block         ->
                                        <-  which pages it has
    POSTCOPY_RESUME                     ->
                                        <-  RESUME_ACK, requests of pages that its guest waits for
    is a page missing that is out of reach?  then cut; it pauses again
    requested pages first, then the rest; END, end of sections
                                        <-  SHUT 0: it has everything

Rule 1: a block that is out of reach is asked for like the others: only its bitmap tells whether that matters.
Rule 2: nothing is sent to a destination that lacks a page which cannot be had: its guest would run on until it
        touches that page, and then never again.
Rule 3: a destination whose stand-in dies is in postcopy-paused as before, with the pages that came meanwhile.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Mapping

import numpy as np

from vmferry.core.facts import Fact
from vmferry.engine.errand import ErrandOutcome
from vmferry.engine.image import ForeignMemory, Image, ImageBlock
from vmferry.engine.outgoing import Dial, Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.errors import MigrationFailed, VmferryError
from vmferry.wire.events import Configuration, RamBlock

RAM_SECTION_SINCE_9_1, RAM_SECTION_BEFORE_9_1 = 1, 2
"""The number of RAM's section in a stream of QEMU: sections are numbered as they are registered, and until 9.1 block
migration came between the timers and RAM (migration/block.c, removed in 9.1). Seen: 7.2 has 2, 11.1 has 1."""


def add_absent_block(image: Image, name: str, used_bytes: int) -> None:
    """A block none of whose pages can be had."""
    store = ForeignMemory(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), 0)
    image.blocks[name] = ImageBlock(RamBlock(name, used_bytes), store)


class StandInSender:
    """See the module's text. It borrows the image; `dial` makes a connection to the waiting destination.

    `machine`: the guest's machine type if known (it tells when a preempt channel is opened).
    """

    def __init__(
        self,
        image: Image,
        *,
        ram_section: int,
        preempt: bool = False,
        machine: str = "",
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
        name: str = "stand-in-sender",
        on_end: Callable[[], None] | None = None,
    ) -> None:
        image.ram_section_id = ram_section
        if machine:
            image.configuration = Configuration(machine)
        self._image, self._on_end = image, on_end
        self._over = threading.Event()
        self._refusal: VmferryError | None = None
        self._due = 0
        options = OutgoingOptions(postcopy="at-once", preempt=preempt)
        self._outgoing = Outgoing.broken(image, options=options, tls=tls, server_name=server_name, name=name)
        self._outgoing.ledger.listen(self._on_fact)

    def start(self, dial: Dial) -> None:
        """Begins; `dial` is called from the endpoint's thread, and may raise OSError."""
        self._outgoing.recover(dial)

    def cut(self) -> None:
        """Ends the connection now."""
        self._outgoing.cut()

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once it is over."""
        return self._over.wait(timeout_s)

    def outcome(self) -> ErrandOutcome:
        """How things stand now. `pages`: how many have left that the destination lacked."""
        log = self._outgoing.ledger.log
        is_complete = Fact.PEER_ACK in log
        found = self._outgoing.outcome()
        error = None if is_complete else self._refusal or found.error
        if error is None and not is_complete and self._over.is_set():
            lost = log.entry(Fact.LINK_LOST, log.last_round(Fact.LINK_LOST))
            error = MigrationFailed(
                f"the destination did not take everything: {lost.text if lost is not None else 'it was cut'}",
                side="destination",
                guest="paused",
                retry="yes",
            )
        is_acknowledged = log.stamp(Fact.RESUME_ACK, 1) is not None
        pages = max(0, self._due - self._unsent()) if is_acknowledged else 0
        return ErrandOutcome(
            self._over.is_set(), is_complete, is_acknowledged, error, found.bytes, pages, "".join(found.threads_left)
        )

    def stop(self) -> ErrandOutcome:
        """Ends everything, in whatever state it is, and joins the thread."""
        self._outgoing.stop()
        self._over.set()
        return self.outcome()

    # --- the endpoint's thread ------------------------------------------------------------------------------

    def _on_fact(self, fact: Fact) -> None:
        if fact is Fact.RESUME_ACK:
            self._due = self._unsent()
            lacking = self._lacking()
            if lacking:
                told = ", ".join(f"{count} of {name}" for name, count in lacking.items())
                self._refusal = MigrationFailed(
                    f"the destination lacks pages that are out of reach: {told}",
                    side="source",
                    guest="paused",
                    retry="no",
                )
                self._outgoing.cut()
        elif fact in (Fact.PEER_ACK, Fact.LINK_LOST, Fact.ERROR):
            self._over.set()
            if self._on_end is not None:
                self._on_end()

    def _unsent(self) -> int:
        return sum(block.count - int(np.count_nonzero(block.sent)) for block in self._image)

    def _lacking(self) -> Mapping[str, int]:
        counts = {block.name: int(np.count_nonzero(~block.have & ~block.sent)) for block in self._image}
        return {name: count for name, count in counts.items() if count}
