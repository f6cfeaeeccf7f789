"""Locks: many who save or read, or one who prunes.

Theory of operation
-------------------
A lock is an object under `locks/`, with its kind in its name. Who wants one puts it first and looks at the others then;
if one is in the way he takes his back. Of two who do that at the same time at least one sees the other.

A lock of a process of this host that is gone does not count. Apart from that, a lock that was not renewed for
`stale_s` belongs to somebody who is dead, or stalled. Ages are differences between
times of the store's own clock, so hosts' clocks do not matter. Whoever goes on in spite of a stale lock deletes it
*first*, so its owner, if he wakes up, learns it from the store:

    writer                                              pruner
    1. looks up old pages, is stopped for an hour
                                                        2. finds the stale lock, deletes it
                                                        3. lists the snapshots, deletes pages that none of them uses
    4. wakes up, puts its manifest
    5. looks for its lock: gone → deletes the manifest, LockLost

Had 4 come before 3, the pruner would have seen the manifest. If the writer finds its lock in 5, then 2 has not been,
so 3 will see the manifest. A pruner looks for its own lock before every single delete, for the same reason.

Rule 1: renewing is a new object and then the end of the old one; one that finds the old one gone gives up, and one that
        does not find out has the old one still.
Rule 2: no threads: owners call `renew_if_due` as they work.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from vmferry.clock import Clock
from vmferry.errors import RepositoryError
from vmferry.limits import STORE_LOCK_RENEW_S, STORE_LOCK_STALE_S
from vmferry.store.backend import Backend, Entry, again
from vmferry.store.errors import Damaged, LockLost, ObjectMissing, RepositoryBusy, StoreTransient

LOCKS: Final = "locks/"
_NOTE_BYTES_MAX: Final = 4096


class Kind(StrEnum):
    """What a lock lets its owner do."""

    SHARED = "shared"
    """Save, read: any number of owners."""
    EXCLUSIVE = "exclusive"
    """Take away: one owner, and nobody else."""


class Note(msgspec.Struct, frozen=True):
    """What others read in a lock."""

    host: str
    boot: str
    """Which boot of the host, and which set of processes there: only within one do process numbers mean anything."""
    process: int
    what: str
    forgets: str = ""
    """The snapshot whose manifest its owner is about to take away: see `pins`."""

    def is_of_the_dead(self) -> bool:
        """Whether its owner was a process of this host, and is not there any more."""
        if (self.host, self.boot) != _here() or self.process <= 0:
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _here() -> tuple[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname(), f"{boot} {os.readlink('/proc/self/ns/pid')}"


class Lock:
    """A lock of this process. Use `take`; `release` when done, whatever happened."""

    def __init__(
        self,
        backend: Backend,
        clock: Clock,
        random: Callable[[int], bytes],
        kind: Kind,
        what: str,
        stale_s: float,
        forgets: str = "",
    ) -> None:
        self._backend, self._clock, self._random = backend, clock, random
        self._kind, self._stale_s = kind, stale_s
        self._note = msgspec.json.encode(Note(*_here(), os.getpid(), what, forgets))
        self._name = ""
        self._renewed_s = 0.0
        self.taken_s = 0.0
        """When it was taken, by the store's clock."""

    def renew_if_due(self) -> None:
        """Renews the lock if it is time. Raises LockLost when somebody took it away: give up and commit nothing."""
        if not self._name:
            raise self._lost()
        if self._clock.now_s() - self._renewed_s < min(STORE_LOCK_RENEW_S, self._stale_s / 10):
            return
        old, renewed_s = self._name, self._renewed_s
        self._put()
        new = self._name
        try:
            again(lambda: self._backend.size(old))
        except RepositoryError as error:
            # The new one proves nothing: 1. the old one is taken away, and pages are deleted  2. the new one is put
            # 3. nobody answers whether the old one is there  4. the commit looks for its lock, and finds the new one
            is_gone = isinstance(error, ObjectMissing)
            self._name, self._renewed_s = ("" if is_gone else old), renewed_s
            with contextlib.suppress(RepositoryError):  # it gets stale by itself
                again(lambda: self._backend.delete(new))
            if is_gone:
                raise self._lost() from None
            raise
        again(lambda: self._backend.delete(old))

    def check(self) -> None:
        """Raises LockLost when the lock is not there any more."""
        if not self._name:
            raise self._lost()
        try:
            again(lambda: self._backend.size(self._name))
        except ObjectMissing:
            raise self._lost() from None

    def release(self) -> None:
        """Takes the lock away. Again is fine."""
        if self._name:
            again(lambda: self._backend.delete(self._name))
            self._name = ""

    def take(self) -> None:
        """Raises RepositoryBusy, naming who is in the way; then there is no lock."""
        self._put()
        try:
            entries = {entry.name: entry for entry in again(lambda: self._backend.list(LOCKS))}
            mine = entries.pop(self._name, None)
            if mine is None:
                raise self._lost()
            self.taken_s = mine.modified_s
            others = [entry for entry in entries.values() if self._excludes(entry)]
            for entry in others:
                note = _note_of(self._backend, entry)
                if not _is_over(entry, note, mine.modified_s, self._stale_s):
                    raise RepositoryBusy(f"the repository is in use: {_whose(note)}{entry.name}")
            for entry in others:
                again(lambda entry=entry: self._backend.delete(entry.name))  # type: ignore[misc]
        except Exception:
            self.release()
            raise

    def _put(self) -> None:
        name = f"{LOCKS}{self._kind.value}-{self._random(16).hex()}"
        try:
            self._backend.put(name, self._note)
        except StoreTransient:
            with contextlib.suppress(RepositoryError):  # it may be there, and would be in the way until it is stale
                self._backend.delete(name)
            raise
        self._name, self._renewed_s = name, self._clock.now_s()

    def _excludes(self, other: Entry) -> bool:
        """A name of no known kind counts as exclusive: some later version's."""
        return self._kind is Kind.EXCLUSIVE or not other.name.startswith(f"{LOCKS}{Kind.SHARED.value}-")

    def _lost(self) -> LockLost:
        return LockLost("this lock of the repository was taken away: it had not been renewed in time")


def _note_of(backend: Backend, other: Entry) -> Note | None:
    try:
        size = min(again(lambda: backend.size(other.name)), _NOTE_BYTES_MAX)
        return msgspec.json.decode(again(lambda: backend.get(other.name, 0, size)), type=Note)
    except (ObjectMissing, Damaged, msgspec.DecodeError):
        return None


def _is_over(entry: Entry, note: Note | None, now_s: float, stale_s: float) -> bool:
    """Whether a lock does not count any more. `now_s` is the store's."""
    return now_s - entry.modified_s > stale_s or (note is not None and note.is_of_the_dead())


def _whose(note: Note | None) -> str:
    return f"{note.what} by process {note.process} on {note.host}, " if note else ""


def require_not_forgotten(backend: Backend, snapshot: str, now_s: float) -> None:
    """Raises RepositoryBusy while somebody is about to forget this snapshot. `now_s` is the store's.

    A lock that does not count any more is deleted first, so its owner, if he wakes up, takes nothing away."""
    for entry in again(lambda: backend.list(LOCKS)):
        note = _note_of(backend, entry)
        if note is None or note.forgets != snapshot:
            continue
        if not _is_over(entry, note, now_s, STORE_LOCK_STALE_S):
            raise RepositoryBusy(f"the snapshot is being taken away: {_whose(note)}{entry.name}")
        again(lambda entry=entry: backend.delete(entry.name))  # type: ignore[misc]


def take(
    backend: Backend,
    clock: Clock,
    random: Callable[[int], bytes],
    kind: Kind,
    what: str,
    *,
    stale_s: float = STORE_LOCK_STALE_S,
    forgets: str = "",
) -> Lock:
    """A lock for `what` (words for people). Raises RepositoryBusy when somebody is in the way."""
    lock = Lock(backend, clock, random, kind, what, stale_s, forgets)
    lock.take()
    return lock
