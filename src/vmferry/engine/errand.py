"""An errand: one connection, one thread, one job on it, and an outcome. The frame of all stand-ins.

Theory of operation
-------------------
Whoever needs an errand makes one for a connected socket and calls `start`; a thread of its own then does the work. It
ends by itself, or because it was cut, or because the other side was silent for too long. How it ended is a value.

Which thread touches what: the errand's thread alone reads and writes the wire and the counters; `cut`, `wait` and
`stop` may be called from any thread. In flight at most: one slab.

Rule 1: an errand never ends with an exception; trouble is in `outcome`.
Rule 2: no errand waits without an end: each wait is bounded by `silence_s`.
"""

from __future__ import annotations

import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vmferry import limits
from vmferry.clock import Clock, SystemClock
from vmferry.engine.wires import Gone, Waker, Wire, view_of
from vmferry.errors import MigrationFailed, VmferryError
from vmferry.wire import encode
from vmferry.wire.events import Event


@dataclass(frozen=True, slots=True)
class ErrandOutcome:
    """How an errand ended, or stands. `is_complete`: everything was done and told to the other side.

    `is_acknowledged`: the other side was told to go on with a recovery (or has told it), so a failure after that
    leaves it in postcopy-paused, where it can be tried again, on every QEMU.
    """

    is_over: bool
    is_complete: bool
    is_acknowledged: bool
    error: VmferryError | None
    bytes: int
    pages: int
    thread_left: str = ""
    """The thread's name if it could not be joined."""


class Errand(ABC):
    """See the module's text. The socket belongs to it from now on."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str,
        tls: ssl.SSLContext | None = None,
        server_side: bool = True,
        server_name: str | None = None,
        silence_s: float = limits.ENGINE_STAND_IN_SILENCE_S,
        clock: Clock | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._silence_s = silence_s
        self._on_end = on_end
        self._wire = Wire(sock, tls=tls, server_side=server_side, server_name=server_name, clock=self._clock)
        self._waker = Waker()
        self._out: deque[memoryview] = deque()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._over = threading.Event()
        self._is_cut = self._is_closed = False
        self._heard_s = self._clock.now_s()
        self._error: VmferryError | None = None
        self._is_complete = self._is_acknowledged = False
        self._bytes = self._pages = 0

    # --- for everybody --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins. Once."""
        self._heard_s = self._clock.now_s()
        self._thread.start()

    def cut(self) -> None:
        """Ends the connection now; the thread ends by itself."""
        self._is_cut = True
        self._wire.cut()
        self._waker.wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once it is over."""
        return self._over.wait(timeout_s)

    def outcome(self) -> ErrandOutcome:
        """How things stand now."""
        return ErrandOutcome(
            self._over.is_set(), self._is_complete, self._is_acknowledged, self._error, self._bytes, self._pages
        )

    def stop(self, *, timeout_s: float = limits.ENGINE_STOP_S) -> ErrandOutcome:
        """Cuts the connection if it is not over, and joins the thread. May be called twice."""
        if not self._is_closed:
            self.cut()
            if self._thread.ident is None:  # it was never started
                self._close()
                self._over.set()
            else:
                self._thread.join(timeout_s)
            if self._thread.is_alive():
                found = self.outcome()
                return ErrandOutcome(
                    found.is_over, found.is_complete, found.is_acknowledged, found.error, found.bytes, found.pages,
                    self._thread.name,
                )  # fmt: skip
            self._is_closed = True
            self._waker.close()
        return self.outcome()

    # --- the thread -----------------------------------------------------------------------------------------

    @abstractmethod
    def _work(self) -> None:
        """The job. Sets `_is_complete` when it is done. Raises Gone or a VmferryError."""

    def _close(self) -> None:
        self._wire.close()

    def _run(self) -> None:
        try:
            self._wire.handshake(timeout_s=self._silence_s, waker=self._waker)
            self._work()
        except Gone as error:
            if not self._is_complete:
                text = "it was cut from this side" if self._is_cut else str(error) or "the connection broke"
                self._error = MigrationFailed(f"{self._thread.name}: {text}", guest="paused", retry="yes")
        except VmferryError as error:
            self._error = error
        except (MemoryError, OSError) as error:
            self._error = VmferryError(f"{self._thread.name}: {error}", guest="paused", retry="yes", cause=error)
        finally:
            self._close()
            self._over.set()
            if self._on_end is not None:
                self._on_end()

    def _read(self, slab: memoryview) -> int:
        """The next bytes; 0 when the other side has closed. Writes what is to be said meanwhile. Raises Gone."""
        while True:
            self._write_some()
            count = self._wire.read_into(slab)
            if count is not None:
                self._bytes += count
                self._heard_s = self._clock.now_s()
                return count
            self._pause(readable=True)

    def _pause(self, *, readable: bool = False) -> None:
        """Waits for the connection, not longer than silence is allowed. Raises Gone."""
        if self._is_cut:
            raise Gone("it was cut")
        left_s = self._heard_s + self._silence_s - self._clock.now_s()
        if left_s <= 0:
            raise Gone(f"the other side was silent for {self._silence_s:g} s")
        self._wire.wait(readable=readable, writable=bool(self._out), timeout_s=left_s, waker=self._waker)

    def _say(self, *events: Event) -> None:
        """Puts messages into the queue; `_read` and `_flush` write it."""
        for event in events:
            self._out.extend(view_of(part) for part in encode.encode(event))

    def _flush(self) -> None:
        """Until everything is written. Raises Gone."""
        self._write_some()
        while self._out:
            self._pause()
            self._write_some()

    def _write_some(self) -> None:
        while self._out:
            count = self._wire.write_some([self._out[0]])
            if count == 0:
                return
            self._heard_s = self._clock.now_s()
            left = self._out.popleft()[count:]
            if len(left):
                self._out.appendleft(left)
