"""Another process's socket: borrowed exactly when it is still that socket."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterator

import pytest

from vmferry.agent import descriptors


class Libc:
    """Answers the system call as told."""

    def __init__(self, result: int, error: int = 0) -> None:
        self.result, self.error = result, error

    def syscall(self, *_: int) -> int:
        ctypes.set_errno(self.error)
        return self.result


@pytest.fixture
def held() -> Iterator[tuple[int, int]]:
    """A pidfd of this process and the inode of a socket that it holds."""
    pidfd = os.pidfd_open(os.getpid())
    with socket.socket() as mine:
        yield pidfd, os.fstat(mine.fileno()).st_ino
    os.close(pidfd)


def test_a_socket_is_borrowed_and_given_back(held: tuple[int, int]) -> None:
    borrowed = descriptors.fetch_socket(held[0], os.getpid(), held[1])
    assert borrowed is not None
    assert os.fstat(borrowed.fileno()).st_ino == held[1]
    borrowed.close()
    assert held[1] in descriptors.socket_descriptors(os.getpid())


@pytest.mark.parametrize("error", [errno.EBADF, errno.ESRCH])
def test_what_is_gone_since_we_looked_is_none(
    held: tuple[int, int], error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "_libc", Libc(-1, error))
    assert descriptors.fetch_socket(held[0], os.getpid(), held[1]) is None


def test_what_is_forbidden_is_an_error(held: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "_libc", Libc(-1, errno.EPERM))
    with pytest.raises(PermissionError):
        descriptors.fetch_socket(held[0], os.getpid(), held[1])


def test_a_number_that_now_means_something_else_is_none(held: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(descriptors, "_libc", Libc(other))
    assert descriptors.fetch_socket(held[0], os.getpid(), held[1]) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(other)


def test_a_dead_process_holds_nothing() -> None:
    assert descriptors.socket_descriptors(2**22 + 1) == {}
