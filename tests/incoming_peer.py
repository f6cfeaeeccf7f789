"""The other end of an incoming endpoint, for tests: a source of recorded or made-up bytes over real sockets."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.wire_streams import BLOCK, ROM, SIZE, devices_of_a_pc, join, opening, pages, part
from vmferry.core.facts import Fact
from vmferry.engine.image import Image
from vmferry.engine.incoming import Incoming, IncomingOutcome
from vmferry.engine.shared import IncomingOptions
from vmferry.wire.encode import encode_package
from vmferry.wire.events import (
    NEED_DATA,
    Discard,
    EndOfSections,
    Event,
    PageRun,
    Ping,
    PostcopyListen,
    PostcopyRun,
    SwitchoverStart,
)
from vmferry.wire.return_path import ReturnPathDecoder

WAIT_S = 10.0
DISCARDS = (Discard("pc.ram", ((0, 64 * SIZE),)), Discard("pc.rom", ((0, 4 * SIZE),)))


class Source:
    """One connection's far end. What it says leaves by a thread, so that nothing here ever waits for the endpoint."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.heard: list[Any] = []
        self._decoder = ReturnPathDecoder()
        self._senders: list[threading.Thread] = []

    def send(self, data: bytes) -> None:
        """Behind everything that was sent before."""
        before = self._senders[-1] if self._senders else None
        self._senders.append(threading.Thread(target=self._send, args=(data, before), daemon=True))
        self._senders[-1].start()

    def _send(self, data: bytes, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        with contextlib.suppress(OSError):  # the endpoint has closed; tests look at what it says of that
            self.sock.sendall(data)

    def flush(self) -> None:
        """Until all of it has left."""
        for each in self._senders:
            each.join(WAIT_S)
            assert not each.is_alive()

    def hear(self, wanted: Event | type) -> Any:
        """The first message, heard already or to come, that is wanted. AssertionError when the endpoint closes."""
        looked = 0
        while True:
            for each in self.heard[looked:]:
                looked += 1
                if each == wanted or (isinstance(wanted, type) and isinstance(each, wanted)):
                    return each
            assert self.listen(), f"the endpoint closed without {wanted}; it said {self.heard}"

    def listen(self) -> bool:
        """Takes what comes next; False at the end."""
        # Never by a timeout of the socket: that makes it non-blocking for the thread that sends, too.
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        assert poll.poll(WAIT_S * 1000), f"the endpoint says nothing; it said {self.heard}"
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            return False
        self._decoder.feed(data)
        while (event := self._decoder.next()) is not NEED_DATA:
            self.heard.append(event)
        return bool(data)

    def listen_to_end(self) -> list[Any]:
        """Everything until the endpoint closes."""
        while self.listen():
            pass
        return self.heard

    def close(self) -> None:
        """Everything that was sent leaves first."""
        self.flush()
        self.sock.close()

    def break_off(self) -> None:
        """Ends the connection now, whatever waits to be sent."""
        self.sock.shutdown(socket.SHUT_RDWR)
        self.close()


class Rig:
    """An endpoint and its sources."""

    def __init__(self, **options: Any) -> None:
        self.image = Image()
        self.incoming = Incoming(self.image, options=IncomingOptions(**options))
        self.sources: list[Source] = []

    def connect(self, data: bytes = b"") -> Source:
        """A connection of the source's; the endpoint takes it."""
        near, far = socket.socketpair()
        source = Source(far)
        self.sources.append(source)
        self.incoming.take(near)
        if data:
            source.send(data)
        return source

    def wait(self, *facts: Fact, round_no: int = 0) -> Fact:
        """Until one of these is there."""
        found = self.incoming.ledger.wait(*facts, timeout_s=WAIT_S, round_no=round_no)
        assert found is not None, [each.fact.value for each in self.incoming.ledger.log]
        return found

    def until(self, is_so: Callable[[], bool]) -> None:
        """Until something is so that no fact tells of."""
        until_s = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < until_s
            time.sleep(0.002)

    def facts(self) -> list[str]:
        """All facts so far."""
        return [each.fact.value for each in self.incoming.ledger.log]

    def stop(self) -> IncomingOutcome:
        """Ends it; no thread may be left."""
        outcome = self.incoming.stop()
        assert outcome.threads_left == ()
        return outcome

    def numbers(self, block: str = "pc.ram") -> list[int]:
        """The first byte of each page."""
        return [int(each) for each in self.image.blocks[block].pages[:, 0]]


@contextmanager
def rig(**options: Any) -> Iterator[Rig]:
    """A rig that leaves nothing behind: no thread, no descriptor, no memory file."""
    threads, descriptors, files = set(threading.enumerate()), _descriptors(), _memory_files()
    made = Rig(**options)
    try:
        yield made
    finally:
        made.incoming.stop()
        made.image.close()
        for source in made.sources:
            source.sock.close()
            source.flush()
    left = [each.name for each in threading.enumerate() if each not in threads]
    assert left == []
    # Fewer: what an earlier test had left to the garbage collector went meanwhile.
    assert _descriptors() <= descriptors
    assert _memory_files() <= files


def _descriptors() -> set[str]:
    """Those that are open. Listing them needs one that is closed again by the time it is looked at."""
    return {name for name in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{name}").exists()}


def _memory_files() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:vmferry")


# --- what sources say ----------------------------------------------------------------------------------------


def package_bytes(*, proof: bool = True) -> bytes:
    """The switchover package of a newer source, or of an older one."""
    events = [PostcopyListen(), *devices_of_a_pc(), Ping(3), *([Ping(0x42)] if proof else []), PostcopyRun()]
    return b"".join(bytes(each) for each in encode_package(events))


def to_postcopy(*, proof: bool = True, machine: str = "pc-i440fx-11.1") -> bytes:
    """From the header to the package: four pages have come and are taken back with all others."""
    before = [*opening(machine, advise=True), *part(pages(range(4))), SwitchoverStart(), *DISCARDS, Ping(2)]
    return join(before) + package_bytes(proof=proof) + join([Ping(4)])


def rest_of_postcopy(first: int = 0) -> bytes:
    """Every page from `first` on, and the end."""
    return join([*part(pages(range(first, 64))), *part(pages(range(4), block=ROM)), *part(last=True), EndOfSections()])


def page_run(numbers: list[int], fill: int) -> PageRun:
    """Pages of pc.ram that hold one value."""
    run = pages(numbers)
    filled = run.pages.copy()
    filled[:] = fill
    return PageRun(BLOCK, run.offsets, filled, named=True)
