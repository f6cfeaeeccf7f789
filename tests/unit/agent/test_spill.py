"""Pages that are set aside come back as they were, and lie in clear only where the repository has them so, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmferry import limits
from vmferry.agent import spill
from vmferry.agent.snapshot_sink import SnapshotSink
from vmferry.agent.spill import Spill
from vmferry.errors import RepositoryError
from vmferry.store.config import KeyFile
from vmferry.store.memory import MemoryStore
from vmferry.store.repository import Repository

MARK = b"the guest's secret"


def on_disk(found: Spill) -> bytes:
    """What somebody reads who gets at the disk."""
    found._file.flush()
    return Path(f"/proc/self/fd/{found._file.fileno()}").read_bytes()


@pytest.mark.parametrize("is_secret", [True, False])
def test_it_comes_back_in_pieces_of_any_size(tmp_path: Path, is_secret: bool) -> None:
    written = [MARK * 300, b"", bytes(4096), MARK * 5]
    found = Spill(tmp_path / "spill", is_secret=is_secret)
    for piece in written:
        found.write(memoryview(piece))
    whole = b"".join(written)
    assert len(on_disk(found)) == len(whole)
    assert (MARK in on_disk(found)) != is_secret
    for sizes in ((7, len(whole)), (4096, 4096, len(whole))):
        found.rewind()
        assert b"".join(found.read(size) for size in sizes) == whole
    assert list((tmp_path / "spill").iterdir()) == [], "it has no name"
    found.close()
    found.close()


def test_no_two_files_have_one_key(tmp_path: Path) -> None:
    first, second = (Spill(tmp_path, is_secret=True) for _ in range(2))
    for each in (first, second):
        each.write(memoryview(bytes(4096)))
    assert on_disk(first) != on_disk(second)
    for each in (first, second):
        each.close()


def test_it_leaves_room_for_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SAVE_SPILL_LEAVES_BYTES", 1 << 60)
    found = Spill(tmp_path, is_secret=True)
    with pytest.raises(RepositoryError, match="no room for the guest's last pages"):
        found.write(memoryview(bytes(4096)))
    found.close()


@pytest.mark.parametrize("key", [KeyFile(bytes(range(32))), None], ids=["encrypted", "open"])
def test_a_save_into_an_encrypted_repository_leaves_nothing_in_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: KeyFile | None
) -> None:
    made: list[bool] = []

    def noted(folder: Path, *, is_secret: bool) -> Any:
        made.append(is_secret)
        return spill.Spill(folder, is_secret=is_secret)

    monkeypatch.setattr("vmferry.agent.snapshot_sink.Spill", noted)
    sink = SnapshotSink(Repository.create(MemoryStore(), key=key), spill_folder=tmp_path / "spill")
    sink.spill()
    sink.put("pc.ram", np.arange(1), np.ones((1, 4096), np.uint8))
    assert made == [key is not None]
    sink.abort()
