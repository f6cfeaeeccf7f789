"""What a place for objects must do. Six methods; `testing/store_contract.py` proves them of every implementation.

Theory of operation
-------------------
An object is bytes under a name. It is written once, whole, and never changed afterwards: names of objects that are
made anew are random, so nobody overwrites anybody, and what was read once stays true. Everything that the repository
promises rests on four properties:

Rule 1: `put` is atomic: until it returns, others see nothing or all of the object; after it returned, the object
        survives a crash of the host. It never replaces an object: `ObjectExists`.
Rule 2: a `put` that raised StoreTransient may have happened. Again with the same bytes: done, or `ObjectExists`, which
        is as durable. After StorePermanent it has not, unless the error says that it `may_have_happened`.
Rule 3: what `put` or `delete` did is seen by every later call of anybody (strong consistency: local file systems, NFS
        with `sync` and no attribute cache, S3 since 2020).
Rule 4: what a broken `put` leaves behind is seen under `tmp/` or is not there at all, and may be deleted by anybody.
Rule 5: a place that is gone as a whole (a folder that is not mounted) is StoreTransient, never a store without objects.

Errors: `ObjectMissing`; `StoreTransient`: try again; `StorePermanent`: somebody must mend something first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from vmferry.limits import STORE_NAME_CHARACTERS_MAX
from vmferry.store.errors import StoreTransient

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*(?:/[a-z0-9][a-z0-9_-]*)*")

_TRIES: Final = 3
T = TypeVar("T")

LEFTOVERS: Final = "tmp/"
"""Rule 4's place. Nothing in it is part of anything."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object as a listing shows it. `modified_s` is the store's own clock: compare it only with the store's."""

    name: str
    size_bytes: int
    modified_s: float


class Backend(Protocol):
    """A place for objects. Threads may call at the same time."""

    def put(self, name: str, data: bytes) -> None:
        """Writes a new object; it is durable when this returns. Raises ObjectExists, and then changed nothing."""
        ...

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Exactly these bytes, by default to the object's end. Raises ObjectMissing; Damaged when it ends before."""
        ...

    def size(self, name: str) -> int:
        """The object's bytes. Raises ObjectMissing."""
        ...

    def list(self, prefix: str) -> list[Entry]:
        """Every object below a prefix that is empty or ends in a slash, sorted by name.

        All of them, or an error: what deletes goes by what is not listed. What has no name of ours is nobody's object
        (`.nfs0000a1`, `.DS_Store`): it is not shown, as nothing could be done with it."""
        ...

    def delete(self, name: str) -> None:
        """The object is gone for good when this returns; one that is not there is fine."""
        ...

    def close(self) -> None:
        """Gives back what the implementation holds. Nothing may be called afterwards."""
        ...


def again(call: Callable[[], T]) -> T:
    """Calls what may be done twice without harm, up to three times. For answers that got lost: an outage lasts longer,
    and is the caller's to wait for."""
    for _ in range(_TRIES - 1):
        try:
            return call()
        except StoreTransient:
            continue
    return call()


def is_name(name: str) -> bool:
    """Whether an object can have this name. For what a listing shows: others put things into folders, too."""
    return len(name) <= STORE_NAME_CHARACTERS_MAX and _NAME.fullmatch(name) is not None


def checked_name(name: str) -> str:
    """The name, if it is one. An assertion: names come from this room, never from a user or a repository's content."""
    assert len(name) <= STORE_NAME_CHARACTERS_MAX, "a name is short"
    assert _NAME.fullmatch(name), f"{name!r} is not an object's name"
    return name


def checked_prefix(prefix: str) -> str:
    """The prefix, if it is one."""
    assert prefix == "" or prefix.endswith("/"), f"{prefix!r} is not a prefix"
    if prefix:
        checked_name(prefix[:-1])
    return prefix
