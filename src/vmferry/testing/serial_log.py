"""Reads a guest's serial console while it runs and notes when each piece arrived.

Threads: one per reader, named after the log. It alone touches the source of bytes; chunks and lines are
shared under one condition. It ends, and is joined, in `close`. An error in it is raised by the owner's next
call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from vmferry.testing.guest_report import Chunk, GuestReport, Line, LineCutter, Tick, analyse, tick_of

__all__ = ["Chunk", "GuestReport", "Line", "SerialReader", "SerialTimeoutError", "Tick", "analyse"]

_READ_BYTES = 65536
# QEMU writes each byte on its own. Waiting this long after each read makes one chunk of a whole tick, and
# bounds the error of the time of arrival.
_GATHER_MS = 1
_IN_MODIFY, _IN_CLOEXEC, _IN_NONBLOCK = 0x2, 0o2000000, 0o4000


class SerialTimeoutError(AssertionError):
    """The guest did not say in time what the test waited for; the message holds the end of what it said."""


class _Source(Protocol):
    """Where bytes come from: `fd` becomes readable when `read` may have something; None means the end."""

    @property
    def fd(self) -> int: ...

    def read(self) -> bytes | None: ...

    def close(self) -> None: ...


class SerialReader:
    """Collects one console. Use `follow`, `listen` or `connect` to make one, and `close` or `with` to end it.

    A console over a socket must be read all the time: QEMU throws bytes away while nobody reads.
    """

    def __init__(self, source: _Source, name: str) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._chunks: list[Chunk] = []
        self._lines: list[Line] = []
        self._failure: BaseException | None = None
        self._ended = False
        self._wake_fd, self._stop_fd = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"serial {name}", daemon=True)
        self._thread.start()

    @classmethod
    def follow(cls, path: Path) -> Self:
        """Reads a file as it grows (`-serial file:…`); it may not exist yet. What is in it already counts."""
        return cls(_GrowingFile(path), path.name)

    @classmethod
    def listen(cls, path: Path) -> Self:
        """Makes a Unix socket that QEMU connects to (`-chardev socket,path=…`): nothing is missed."""
        return cls(_ListeningSocket(path), path.name)

    @classmethod
    def connect(cls, path: Path) -> Self:
        """Connects to a socket of QEMU (`server=on,wait=off`); what was said before is lost."""
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(path))
        return cls(_ConnectedSocket(link), path.name)

    def chunks(self) -> list[Chunk]:
        """Everything so far, for `analyse`."""
        with self._changed:
            self._check()
            return list(self._chunks)

    def lines(self) -> list[Line]:
        """The whole lines so far."""
        with self._changed:
            self._check()
            return list(self._lines)

    def ticks(self) -> list[Tick]:
        """The ticks so far."""
        return [tick for tick in map(tick_of, self.lines()) if tick is not None]

    def wait_for(self, wanted: Callable[[Line], bool], *, timeout_s: float, after: int = 0) -> int:
        """Waits for a line that satisfies `wanted`, among lines from index `after` on; returns its index + 1.

        The result is the `after` of the next wait. Raises SerialTimeoutError.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._check()
                for index in range(after, len(self._lines)):
                    if wanted(self._lines[index]):
                        return index + 1
                after = max(after, len(self._lines))
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or self._ended:
                    why = "the log ended" if self._ended else f"not within {timeout_s} s"
                    last = "".join(f"\n  {line.text}" for line in self._lines[-8:])
                    raise SerialTimeoutError(f"{self._thread.name}: {why}; the last lines were:{last}")
                self._changed.wait(left_s)

    def wait_ready(self, *, timeout_s: float = 30) -> int:
        """Waits until the guest's program has started."""
        return self.wait_for(lambda line: line.kind == "READY", timeout_s=timeout_s)

    def wait_ticks(self, count: int, *, timeout_s: float, after: int = 0) -> int:
        """Waits for `count` more ticks."""
        for _ in range(count):
            after = self.wait_for(lambda line: line.kind == "T", timeout_s=timeout_s, after=after)
        return after

    def wait_walks(self, count: int, *, timeout_s: float, region: str = "memory", after: int = 0) -> int:
        """Waits for `count` more full checks of "memory" or "disk"; 2 include one from start to end."""
        for _ in range(count):
            after = self.wait_for(lambda line: line.words[:2] == ("W", region), timeout_s=timeout_s, after=after)
        return after

    def wait_bytes(self, count: int, *, timeout_s: float) -> bytes:
        """Waits until `count` bytes have come in all, for guests without lines; returns all bytes."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._check()
                data = b"".join(chunk.data for chunk in self._chunks)
                left_s = deadline_s - time.monotonic()
                if len(data) >= count:
                    return data
                if left_s <= 0 or self._ended:
                    raise SerialTimeoutError(f"{self._thread.name}: {len(data)} of {count} bytes in {timeout_s} s")
                self._changed.wait(left_s)

    def close(self) -> None:
        """Ends and joins the thread; chunks and lines stay readable."""
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1
            self._thread.join()
            os.close(self._wake_fd)
            self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"{self._thread.name} failed") from self._failure

    def _run(self) -> None:
        try:
            self._collect()
        except BaseException as error:  # noqa: BLE001  the owner gets it from the next call
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _collect(self) -> None:
        cutter = LineCutter()
        stop = select.poll()
        stop.register(self._wake_fd, select.POLLIN)
        stopping = False
        while True:
            last = stopping  # one more reading after the owner's wish: what was written before it is kept
            data = self._source.read()
            if data is None:
                return
            if data:
                chunk = Chunk(time.monotonic(), data)
                with self._changed:
                    self._chunks.append(chunk)
                    self._lines += cutter.feed(chunk)
                    self._changed.notify_all()
            if last:
                return
            stopping = bool(stop.poll(_GATHER_MS)) if data else self._sleep()

    def _sleep(self) -> bool:
        """Until there may be something to read; True if the owner wants the thread to end."""
        either = select.poll()
        either.register(self._wake_fd, select.POLLIN)
        either.register(self._source.fd, select.POLLIN)
        return any(fd == self._wake_fd for fd, _ in either.poll())


class _GrowingFile:
    """A file and the kernel's notice that it was written to (inotify); begins anew if it is truncated."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(path), _IN_MODIFY) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot watch {path}: {os.strerror(number)}")

    def read(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, _READ_BYTES)  # first the notices, then the bytes: so no notice is overlooked
        if os.fstat(self._file).st_size < os.lseek(self._file, 0, os.SEEK_CUR):
            os.lseek(self._file, 0, os.SEEK_SET)
        return os.read(self._file, _READ_BYTES)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._file)


class _ConnectedSocket:
    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._link.setblocking(False)

    @property
    def fd(self) -> int:
        return self._link.fileno()

    def read(self) -> bytes | None:
        try:
            return self._link.recv(_READ_BYTES) or None
        except BlockingIOError:
            return b""
        except ConnectionResetError:
            return None

    def close(self) -> None:
        self._link.close()


class _ListeningSocket:
    """Waits for one peer after the other, so that a QEMU which is started anew goes into the same log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.unlink(missing_ok=True)
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(path))
        self._door.listen(1)
        self._door.setblocking(False)
        self._peer: _ConnectedSocket | None = None

    @property
    def fd(self) -> int:
        return self._peer.fd if self._peer is not None else self._door.fileno()

    def read(self) -> bytes:
        if self._peer is None:
            try:
                self._peer = _ConnectedSocket(self._door.accept()[0])
            except BlockingIOError:
                return b""
        data = self._peer.read()
        if data is None:
            self._peer.close()
            self._peer = None
        return data or b""

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
        self._door.close()
        self._path.unlink(missing_ok=True)
