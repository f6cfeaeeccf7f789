"""Pins: guests that run and whose memory is still in the repository.

Theory of operation
-------------------
A lock says that a process is at work, and counts for nothing when that is dead. A guest of a lazy restore outlives the
process that reads for it, and needs its snapshot until it has every page. A pin is an object under `pins/` for it:

    1. a reader has a shared lock      2. the pin is put      3. the guest may run      4. it is whole, or ended
    5. the pin is taken away

A pin counts whatever its age: as long as there is one nothing is pruned, nor is its snapshot forgotten. One that was
left behind (its host is lost for good) is taken away by a person, by name.

Who forgets a snapshot has a shared lock as well, for saves and restores of others go on meanwhile. It says which
snapshot he is about to take away, so one of two who do both at the same time sees the other:

    restore                                             forget
    a. opens the snapshot under its lock                1. puts a lock that says so
    b. puts its pin                                     2. looks for pins of it: one → refused
    c. looks for a lock that says so: one → the pin     3. looks whether its lock is still there, deletes the manifest
       is taken back, RepositoryBusy                    4. gives the lock back
    d. looks whether the manifest is there: gone → as c
If b is before 2, 2 sees the pin. If not, 1 was before b, so c sees the lock, or 4 was before c, and d finds it gone.

Rule 1: a pin is put under a shared lock, so a prune that is at work excludes it, and one that begins later sees it.
Rule 2: what cannot be read counts as a pin of everything: nothing is taken away because a note is damaged.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import msgspec

from vmferry.errors import RepositoryError
from vmferry.store.backend import again
from vmferry.store.errors import ObjectExists, ObjectMissing, RepositoryBusy, UnknownSnapshot
from vmferry.store.lock import require_not_forgotten

if TYPE_CHECKING:
    from vmferry.store.repository import Repository

PINS: Final = "pins/"
_ID: Final = re.compile(r"[0-9a-f]{32}")
_NOTE_BYTES_MAX: Final = 4096


class Pin(msgspec.Struct, frozen=True):
    """What others read in a pin."""

    job: str
    snapshot: str
    host: str
    vm: str


def put(repository: Repository, pin: Pin) -> None:
    """Again is fine. The caller has a shared lock, and the snapshot open.

    Raises RepositoryBusy, UnknownSnapshot: somebody takes the snapshot away, or has, and there is no pin; any other
    RepositoryError: there may be one."""
    name = _name(pin.job)
    try:
        again(lambda: repository.backend.size(name))
    except ObjectMissing:
        pass
    else:
        return  # whoever forgets has seen it, or will
    with contextlib.suppress(ObjectExists):  # of the same job, in other words: it is there
        repository.put_new(name, msgspec.json.encode(pin))
    try:
        times = {entry.name: entry.modified_s for entry in again(lambda: repository.backend.list(PINS))}
        if name not in times:
            raise RepositoryBusy("somebody took the guest's pin away as it was put")
        require_not_forgotten(repository.backend, pin.snapshot, times[name])
        repository.require_snapshot(pin.snapshot)
    except (RepositoryBusy, UnknownSnapshot):
        remove(repository, pin.job)
        raise


def remove(repository: Repository, job: str) -> None:
    """The guest needs the snapshot no more. Again is fine. Raises RepositoryError."""
    try:
        again(lambda: repository.backend.delete(_name(job)))
    except ObjectMissing:
        return


def all_pins(repository: Repository) -> list[Pin]:
    """Every pin; one that cannot be read pins the snapshot ''. Raises RepositoryError."""
    found = []
    for entry in again(lambda: repository.backend.list(PINS)):
        job = entry.name.removeprefix(PINS)
        if _ID.fullmatch(job):
            found.append(_read(repository, entry.name, job, entry.size_bytes))
    return found


def drop(repository: Repository, host: str) -> list[Pin]:
    """Takes away the pins of a host whose guests are known to be gone. Raises RepositoryError."""
    dropped = [pin for pin in all_pins(repository) if pin.host == host]
    for pin in dropped:
        remove(repository, pin.job)
    return dropped


def require_free(
    repository: Repository, snapshot: str | None = None, *, but_jobs: Collection[str] = frozenset()
) -> None:
    """Raises RepositoryBusy while a guest needs this snapshot, or, for None, any; but for guests of these jobs."""
    for pin in all_pins(repository):
        if pin.job not in but_jobs and (snapshot is None or pin.snapshot in (snapshot, "")):
            raise RepositoryBusy(
                f"{pin.vm or 'a guest'} on {pin.host or 'an unknown host'} was restored from {pin.snapshot or 'it'} "
                "and still has memory in the repository",
                hint="wait until it is whole; of a host that is lost for good: 'vmferry prune --drop-pins HOST'",
            )


def _name(job: str) -> str:
    assert _ID.fullmatch(job), "ids of jobs are checked where they come from"
    return f"{PINS}{job}"


def _read(repository: Repository, name: str, job: str, size: int) -> Pin:
    try:
        data = again(lambda: repository.backend.get(name, 0, min(size, _NOTE_BYTES_MAX)))
        return msgspec.json.decode(data, type=Pin)
    except (RepositoryError, msgspec.DecodeError):
        return Pin(job, "", "", "")
