"""What every store keeps to: `check_backend` proves it of an implementation. `store` is empty at the beginning."""

from __future__ import annotations

import os
import threading
from typing import Final

from vmferry.errors import RepositoryError
from vmferry.store.backend import Backend
from vmferry.store.errors import Damaged, ObjectExists, ObjectMissing

_BEYOND: Final[tuple[tuple[int, int | None], ...]] = (
    (0, 4097), (4096, 1), (5000, 1), (5000, 0), (4000, 97), (5000, None),
)  # fmt: skip


def check_backend(store: Backend) -> None:
    """Raises AssertionError naming what the implementation does not keep."""
    _check_absence(store)
    _check_objects(store)
    _check_ranges(store)
    _check_listing(store)
    _check_one_winner(store)
    for entry in store.list(""):
        store.delete(entry.name)
    assert store.list("") == [], "what was deleted is gone"


def _check_absence(store: Backend) -> None:
    assert store.list("") == [], "a new store is empty"
    assert store.list("packs/") == [], "also below a prefix"
    for call in (lambda: store.get("packs/a"), lambda: store.get("packs/a", 1, 1), lambda: store.size("packs/a")):
        assert isinstance(_error(call), ObjectMissing), "what is not there is missing, not broken"
    store.delete("packs/a")  # is fine


def _check_objects(store: Backend) -> None:
    big = os.urandom(1 << 20) * 17  # beyond what stores send in one piece by default
    contents = {"config": b"c", "empty": b"", "packs/00/a": b"x" * 5000, "packs/01/b": big}
    for name, data in contents.items():
        store.put(name, data)
        assert isinstance(_error(lambda name=name: store.put(name, b"other")), ObjectExists), "never replaced"
    for name, data in contents.items():
        assert store.get(name) == data, f"{name} is what was put"
        assert store.size(name) == len(data)
    store.delete("config")
    assert isinstance(_error(lambda: store.get("config")), ObjectMissing)
    store.put("config", b"again")
    assert store.get("config") == b"again", "a name is free after its object was deleted"


def _check_ranges(store: Backend) -> None:
    data = bytes(range(256)) * 16
    store.put("ranges", data)
    for offset, length in ((0, 1), (0, 4096), (4095, 1), (100, 200), (0, 0), (4096, 0)):
        assert store.get("ranges", offset, length) == data[offset : offset + length], (offset, length)
    assert store.get("ranges", 4000) == data[4000:]
    assert store.get("ranges", 4096) == b""
    for start, wanted in _BEYOND:
        error = _error(lambda start=start, wanted=wanted: store.get("ranges", start, wanted))
        assert isinstance(error, Damaged), f"fewer bytes than asked for are damage: {start}, {wanted}"
        assert error.name == "ranges", "damage has a name"


def _check_listing(store: Backend) -> None:
    everything = store.list("")
    assert [entry.name for entry in everything] == ["config", "empty", "packs/00/a", "packs/01/b", "ranges"]
    assert [entry.size_bytes for entry in everything] == [5, 0, 5000, 17 << 20, 4096]
    assert [entry.name for entry in store.list("packs/")] == ["packs/00/a", "packs/01/b"]
    assert [entry.name for entry in store.list("packs/01/")] == ["packs/01/b"]
    assert store.list("pack/") == [], "a prefix is folders, not letters"
    store.put("locks/late", b"")
    # S3 counts whole seconds, so equal is fine.
    assert store.list("locks/")[0].modified_s >= everything[0].modified_s - 1, "the store has one clock"


def _check_one_winner(store: Backend) -> None:
    """Of many that put one name at the same time one wins, and its object is the one that is there."""
    won: list[bytes] = []
    ready = threading.Barrier(6)

    def contend(number: int) -> None:
        mine = bytes([number]) * 100_000
        ready.wait()
        if _error(lambda: store.put("contended", mine)) is None:
            won.append(mine)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1, f"{len(won)} of 6 were told that their object is there"
    assert store.get("contended") == won[0]


def _error(call: object) -> RepositoryError | None:
    assert callable(call)
    try:
        call()
    except RepositoryError as error:
        return error
    return None
