"""One connection of a migration, plain or under TLS, and the event that wakes its thread.

Rule 1: a wire has one owner, the thread that reads and writes it. CPython's TLS objects may not be used by two
        threads at once, and with one owner nothing needs a lock. Only `cut` may be called from elsewhere.
Rule 2: nothing here blocks but `wait` and `handshake`, and both have a deadline and hear the waker.
Rule 3: TCP_NODELAY is always on: without it a switchover waits 40 ms for an acknowledgement.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
from collections.abc import Sequence

import numpy as np

from vmferry.clock import Clock, SystemClock
from vmferry.wire.events import Encoded

POLL_IN, POLL_OUT = select.POLLIN, select.POLLOUT
_HANGUP = select.POLLRDHUP | select.POLLHUP | select.POLLERR
_SNDBUF_FORCE = 32  # SO_SNDBUFFORCE, which the socket module has no name for
IOVECS_MAX = 512
"""Buffers in one write; the kernel takes 1024."""


def view_of(part: Encoded) -> memoryview:
    """The bytes of a part of an encoded event, for `Wire.write_some`."""
    return (part.data if isinstance(part, np.ndarray) else memoryview(part)).cast("B")


class Gone(Exception):
    """The connection is not there any more: the peer closed or reset it, or somebody cut it."""


class Waker:
    """Wakes a thread that waits in `Wire.wait`. `wake` may be called from any thread, also from a signal handler."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """Ends the present wait, or the next one."""
        with contextlib.suppress(OSError, ValueError):
            os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Forgets what woke the thread; call it before looking for the reason."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Closes the descriptor; a `wake` that comes later does nothing. Not while another thread may be in `wake`."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        """An endpoint that nobody stopped: nobody has it any more, nor its threads, so nobody calls `wake`."""
        if getattr(self, "fd", -1) >= 0:
            self.close()


class Wire:
    """A connected stream socket. It belongs to the wire from now on.

    `tls`: the context of this side; `server_side` as in the ssl module (a migration's source is the TLS client).
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        tls: ssl.SSLContext | None = None,
        server_side: bool = False,
        server_name: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # `cut` shuts the connection down through a descriptor of its own, whatever the owner does meanwhile.
        self._cutter = socket.socket(fileno=os.dup(sock.fileno()))
        self._clock = clock or SystemClock()
        self._plain = sock
        self._sock: socket.socket | ssl.SSLSocket = sock
        self._tls: ssl.SSLSocket | None = None
        if tls is not None:
            try:
                self._tls = self._sock = tls.wrap_socket(
                    sock, server_side=server_side, server_hostname=server_name, do_handshake_on_connect=False
                )
            except BaseException:
                self._cutter.close()
                raise
        self._poll = select.poll()
        self._registered = 0
        self._waker_fd: int | None = None
        self._is_open = True
        self._is_blocking = False
        self.is_cut = False
        """Somebody called `cut`."""

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self._tls is not None

    def limit_unsent(self, count_bytes: int) -> None:
        """Keeps about so many bytes at most in the kernel: what is written then does not wait behind much."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, count_bytes)  # TLS took the plain one over

    def allow_unsent(self, count_bytes: int) -> None:
        """Lets the kernel of a local connection take more than usual, so that both ends have work all the time.

        TCP finds its own size, and would lose it by being told one.
        """
        if self._sock.family == socket.AF_UNIX:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, _SNDBUF_FORCE, count_bytes)
            except PermissionError:  # only root goes beyond the system's limit
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, count_bytes)

    def wait_with(self, other: Wire, *, writable: bool, waker: Waker) -> int:
        """Until something is to be read here, there is room at `other` (or here, if `writable`), or the waker was
        called (it is cleared). What is ready here, as `wait` says it."""
        if self._tls is not None and self._tls.pending():
            return POLL_IN
        poll = select.poll()
        poll.register(self._sock.fileno(), POLL_IN | (POLL_OUT if writable else 0))
        poll.register(other._sock.fileno(), POLL_OUT)
        poll.register(waker.fd, POLL_IN)
        here = 0
        for ready, what in poll.poll():
            if ready == waker.fd:
                waker.clear()
            elif ready == self._sock.fileno():
                here = what
        return here

    def handshake(self, *, timeout_s: float, waker: Waker | None = None) -> None:
        """TLS's handshake; nothing without TLS. Raises Gone, with what went wrong."""
        if self._tls is None:
            return
        until_s = self._clock.now_s() + timeout_s
        while True:
            left_s = until_s - self._clock.now_s()
            if left_s <= 0:
                raise Gone("no TLS handshake in time")
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.wait(readable=True, timeout_s=left_s, waker=waker)
            except ssl.SSLWantWriteError:
                self.wait(writable=True, timeout_s=left_s, waker=waker)
            except (OSError, ValueError) as error:
                raise Gone(str(error)) from error
            else:
                return

    def read_into(self, view: memoryview, *, flags: int = 0) -> int | None:
        """Bytes read; 0: the peer has closed; None: nothing is there now. Raises Gone."""
        try:
            return self._sock.recv_into(view, 0, flags)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except ssl.SSLEOFError:
            return 0  # a source may end without a goodbye
        except (OSError, ValueError) as error:
            raise Gone(str(error)) from error

    def block(self) -> None:
        """From now on reads wait, for an owner that does nothing else; a cut ends them. Not under TLS."""
        assert self._tls is None
        self._plain.setblocking(True)
        self._is_blocking = True

    def read_whole(self, view: memoryview) -> int:
        """Fills the view; after `block` in one call, without the interpreter. Fewer bytes: the connection has ended.

        Raises Gone."""
        done = 0
        while done < len(view):
            got = self.read_into(view[done:], flags=0 if self._tls is not None else socket.MSG_WAITALL)
            if got is None:
                self.wait(readable=True)
            elif got == 0:
                break
            else:
                done += got
        return done

    def read_much(self, view: memoryview) -> int | None:
        """As `read_into`, but goes on until nothing is there any more or the view is full. After `block`: the same."""
        count = self.read_into(view)
        if not count or self._is_blocking:
            return count
        while count < len(view):
            try:
                more = self.read_into(view[count:])
            except Gone:
                break  # what came before the break counts; the next read tells of it
            if not more:
                break
            count += more
        return count

    def write_some(self, buffers: Sequence[memoryview]) -> int:
        """Bytes written of these buffers, 0 while there is no room. Raises Gone."""
        try:
            if self._tls is not None:
                return self._tls.send(buffers[0])
            if len(buffers) == 1:
                return self._plain.send(buffers[0])
            return self._plain.sendmsg(buffers[:IOVECS_MAX])
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except (OSError, ValueError) as error:
            raise Gone(str(error)) from error

    def wait(
        self,
        *,
        readable: bool = False,
        writable: bool = False,
        timeout_s: float | None = None,
        waker: Waker | None = None,
    ) -> int:
        """Until the connection is ready, the waker was called (it is cleared), or the time is over.

        Returns what the connection is ready for: 0, or POLL_OUT, or something else, which only a read tells.
        Who wants neither to read nor to write waits for the waker alone, also when the connection has ended.
        """
        if readable and self._tls is not None and self._tls.pending():
            return POLL_IN
        wanted = (POLL_IN if readable else 0) | (POLL_OUT if writable else 0)
        fd = self._sock.fileno()
        if fd < 0:
            raise Gone("it was closed")
        self._want(fd, wanted)
        if waker is not None and self._waker_fd is None:
            self._waker_fd = waker.fd
            self._poll.register(waker.fd, POLL_IN)
        here = 0
        for ready, what in self._poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000):
            if ready == fd:
                here = what
            elif waker is not None:
                waker.clear()
        return here

    def is_hung_up(self) -> bool:
        """Whether the peer has closed; what it said before may still be there to read."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLRDHUP)
        return any(what & _HANGUP for _, what in poll.poll(0))

    def wait_for_hangup(self, waker: Waker, *, is_known: bool, timeout_s: float | None = None) -> None:
        """Until the waker was called (it is cleared), the time is over, or the peer has closed.

        `is_known`: the caller has seen that it has (`is_hung_up`). It is so for ever then and would end every wait.
        Asked here, the answer could be newer than the caller's: a close in between would be waited for in vain.
        """
        poll = select.poll()
        poll.register(waker.fd, POLL_IN)
        if not is_known:
            poll.register(self._sock.fileno(), select.POLLRDHUP)
        for ready, _ in poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000):
            if ready == waker.fd:
                waker.clear()

    def _want(self, fd: int, wanted: int) -> None:
        if wanted == self._registered:
            return
        if wanted:
            self._poll.register(fd, wanted)
        else:  # a closed connection is always ready, whatever it is asked for
            self._poll.unregister(fd)
        self._registered = wanted

    def cut(self) -> None:
        """Ends the connection now, from any thread; its owner reads the end or gets Gone."""
        self.is_cut = True
        with contextlib.suppress(OSError):
            self._cutter.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Says goodbye where TLS has one (a multifd receiver of QEMU 10.0 and newer wants it), without waiting."""
        if self._tls is not None:
            with contextlib.suppress(OSError, ValueError):
                self._tls.unwrap()

    def close(self) -> None:
        """Closes everything; by the owner."""
        if self._is_open:
            self._is_open = False
            self._sock.close()
            self._cutter.close()
