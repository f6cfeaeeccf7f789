"""Other processes' sockets: which they hold, and a descriptor of one without their help.

Rule 1: a process is named by a pidfd once found, so a reused process id can never be meant by mistake.
Rule 2: a socket is named by its inode number, which the kernel gives to no other socket while it lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket

_SYSCALL_PIDFD_GETFD = 438  # the same number on every architecture; glibc 2.31 and Python have no name for it
_libc = ctypes.CDLL(None, use_errno=True)


def socket_descriptors(pid: int) -> dict[int, int]:
    """The sockets that process `pid` holds: inode number -> one of its descriptors. Empty once it is dead.

    Costs about 0.1 ms for a QEMU. Raises PermissionError when this user may not look.
    """
    found: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since the directory was read
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    found[int(target[len("socket:[") : -1])] = int(entry.name)
    return found


def fetch_socket(pidfd: int, pid: int, inode: int) -> socket.socket | None:
    """A descriptor of our own of the socket that the process holds; None when it does not (any more).

    It works whatever the process is doing, even stopped. Raises OSError (EPERM, ENOSYS) when this user or
    kernel may not: it takes the right to trace the process. The caller closes what it got, and only that.
    """
    number = socket_descriptors(pid).get(inode)
    if number is None:
        return None
    copied = _libc.syscall(_SYSCALL_PIDFD_GETFD, pidfd, number, 0)
    if copied < 0:
        error = ctypes.get_errno()
        if error in (errno.EBADF, errno.ESRCH):  # it was closed, or the process died, since we looked
            return None
        raise OSError(error, os.strerror(error))
    if os.fstat(copied).st_ino != inode:  # the number was given to something else since we looked
        os.close(copied)
        return None
    return socket.socket(fileno=copied)
