"""A channel whose bytes go through the agent, for a QEMU that can take no descriptor.

Theory of operation
-------------------
A QEMU whose main loop waits for a page of the guest carries no `getfd` out; but it does carry out `migrate-recover`
with a `unix:` address, out of band, and accepts there in the thread of its monitor. So the source's connection ends
here, and two threads pass its bytes on to that address and back, as they are: TLS is between the two QEMUs.

    source's QEMU == TCP == [from the source] -> unix socket -> QEMU of this host
                            [to the source]   <-

Rule 1: QEMU is connected to when the source has said something, not before. Its monitor's thread reads the first
        bytes of a connection, and the whole handshake of TLS, by waiting for them, and serves no out-of-band command
        meanwhile. And a connection that ends without a byte would be a recovery that broke half-way, which a QEMU
        before 8.0 never leaves.
Rule 2: an end that one side makes is made at the other one; a break is made on both. No thread outlives the
        connection by more than `limits.RELAY_LINGER_S`, nor waits for a first byte beyond `limits.RELAY_FIRST_BYTE_S`.
Rule 3: with the agent goes the relay: both QEMUs then see a broken channel, and are joined again by the next agent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading

from vmferry import limits
from vmferry.agent.channel import ChannelEnd

log = logging.getLogger("vmferry.agent")


class RelayedChannel:
    """A channel's end as attempts use it. Takes the connection of `channel` over; `path` is where QEMU listens.

    Used from the loop; its threads share nothing with it but the two sockets, which only `_connect` and `_break`
    change the state of."""

    def __init__(self, channel: ChannelEnd, path: str) -> None:
        self.name = channel.name
        self._path = path
        self._outer = socket.socket(fileno=os.dup(channel.fileno()))
        channel.close()
        self._outer.settimeout(limits.RELAY_FIRST_BYTE_S)
        self._inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lock = threading.Lock()
        self._is_cut = False
        self._is_connected = False
        self._ended = (threading.Event(), threading.Event())
        """From the source, to the source."""
        self._thread = threading.Thread(target=self._run, name=f"relay-{self.name}", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """There is no descriptor to hand out."""
        return -1

    @property
    def is_entrusted(self) -> bool:
        """Nobody has to watch whether QEMU let go: its end of the relay ends, and the relay with it."""
        return True

    @property
    def is_cut(self) -> bool:
        """Has it been ended from here, or by its own limits?"""
        return self._is_cut

    def entrust(self, pid: int) -> bool:
        """It is in QEMU's hands already, as far as it can be."""
        return True

    def is_held_by(self, pid: int) -> bool:
        """Whether bytes still pass."""
        return self._thread.is_alive()

    async def spoken(self, *, deadline_s: float) -> bool:
        """It connects to QEMU when the first byte is there."""
        return True

    def cut(self) -> None:
        """Ends it for both QEMUs at once. Never raises."""
        self._break()

    def close(self) -> None:
        """The attempt is over: what QEMU still has to say arrives, and the relay ends with its connection."""
        with self._lock:
            is_connected = self._is_connected
        if not is_connected:
            self._break()

    def wait_over(self, timeout_s: float) -> bool:
        """Whether the threads have ended within that time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the threads ---

    def _run(self) -> None:
        back = threading.Thread(target=self._pass_back, name=f"relay-back-{self.name}", daemon=True)
        try:
            first = self._outer.recv(limits.RELAY_CHUNK_BYTES)
            if first and self._connect():
                back.start()
                self._inner.sendall(first)
                self._pass(self._outer, self._inner, *self._ended)
        except OSError as error:
            log.info("channel=%s relay=from-source result=%s", self.name, error)
        finally:
            self._ended[0].set()
            self._break()
            if back.ident is not None:
                back.join()
            self._outer.close()
            self._inner.close()

    def _pass_back(self) -> None:
        self._pass(self._inner, self._outer, *reversed(self._ended))

    def _pass(self, giver: socket.socket, taker: socket.socket, mine: threading.Event, other: threading.Event) -> None:
        """Until the giver has ended; then the other direction has a while to end too."""
        buffer = memoryview(bytearray(limits.RELAY_CHUNK_BYTES))
        try:
            while count := giver.recv_into(buffer):
                taker.sendall(buffer[:count])
            taker.shutdown(socket.SHUT_WR)
        except OSError as error:
            log.info("channel=%s relay=broken result=%s", self.name, error)
            self._break()
        mine.set()
        if not other.wait(limits.RELAY_LINGER_S):
            self._break()

    def _connect(self) -> bool:
        """Connects to QEMU, unless somebody has cut the channel. Raises OSError."""
        with self._lock:
            if self._is_cut:
                return False
            self._inner.connect(self._path)
            self._is_connected = True
        self._outer.settimeout(None)
        self._forget_path()
        return True

    def _break(self) -> None:
        with self._lock:
            self._is_cut = True
            for sock in (self._outer, self._inner):
                with contextlib.suppress(OSError):  # it is gone, or was never connected
                    sock.shutdown(socket.SHUT_RDWR)
        self._forget_path()

    def _forget_path(self) -> None:
        """QEMU takes its name away when it stops listening; a QEMU that died, or still waits, left it there."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
