"""What a person may call a snapshot: its name, its id, or the beginning of its id."""

from __future__ import annotations

import numpy as np
import pytest

from vmferry.agent import snapshot_sink
from vmferry.errors import RepositoryError
from vmferry.store.errors import UnknownSnapshot
from vmferry.store.manifest import Block, manifest_name
from vmferry.store.memory import MemoryStore
from vmferry.store.repository import Repository
from vmferry.store.writer import SnapshotWriter

IDS = ("0123456789abcdef" * 2, "01234567" + "f" * 24, "ab" * 16)


@pytest.fixture
def repository() -> Repository:
    """Three snapshots: two of their ids begin in the same way, and one is named as the third one's id begins."""
    found = Repository.create(MemoryStore())
    for snapshot, name in zip(IDS, ("first", "abababab", "third"), strict=True):
        with SnapshotWriter(found, [Block("pc.ram", 4096)]) as made:
            made.snapshot = snapshot
            made.put_zeros("pc.ram", np.arange(1))
            made.commit(name, device_state=b"", disks=[], metadata={})
    return found


@pytest.mark.parametrize(
    ("word", "expected"),
    [("first", 0), (IDS[0], 0), ("012345678", 0), (IDS[1][:12], 1), (IDS[1][:31], 1), ("ababababab", 2), (IDS[2], 2)],
)
def test_the_beginning_of_an_id_is_enough(repository: Repository, word: str, expected: int) -> None:
    assert snapshot_sink.find(repository, word).snapshot == IDS[expected]


def test_a_name_wins_over_the_beginning_of_an_id(repository: Repository) -> None:
    assert IDS[2].startswith("abababab")
    assert snapshot_sink.find(repository, "abababab").snapshot == IDS[1]


def test_a_beginning_that_two_have_is_refused_with_both(repository: Repository) -> None:
    with pytest.raises(RepositoryError, match="2 snapshots have an id that begins with 01234567") as caught:
        snapshot_sink.find(repository, "01234567")
    assert all(snapshot in caught.value.message for snapshot in IDS[:2])
    assert IDS[2] not in caught.value.message


@pytest.mark.parametrize("word", ["0123456", "ABABABABAB", "ababababac", "", "abababab*", IDS[0] + "0"])
def test_what_is_too_short_or_nobodys_names_nothing(repository: Repository, word: str) -> None:
    with pytest.raises(UnknownSnapshot):
        snapshot_sink.find(repository, word)


def test_a_damaged_one_has_no_other_name(repository: Repository) -> None:
    name = manifest_name(IDS[0])
    repository.backend.delete(name)
    repository.backend.put(name, b"x" * 100)
    found = snapshot_sink.find(repository, IDS[0][:12])
    assert (found.snapshot, found.head) == (IDS[0], None)
