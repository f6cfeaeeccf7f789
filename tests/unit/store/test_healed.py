"""What was damaged and was brought back from a copy is read right again, by whoever has it open already."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit.store.conftest import RAM, ManualClock, Store, new_store, touched
from vmferry.limits import STORE_LOOK_AGAIN_S
from vmferry.store.errors import Damaged
from vmferry.store.local import LocalFolder
from vmferry.store.page_ids import PAGE_BYTES
from vmferry.store.reader import SnapshotReader
from vmferry.store.verify import verify
from vmferry.testing.failing_store import FailingStore

PAGES = np.random.default_rng(4).integers(0, 256, (16, PAGE_BYTES), dtype=np.uint8)
"""Nothing of it can be compressed, so where frames have no check a flipped bit damages one page and not its frame."""
FIRST_FRAME = 16


def in_place(pack: Path, data: bytes) -> None:
    """The file stays the same."""
    with pack.open("r+b") as file:
        file.write(data)


def by_rename(pack: Path, data: bytes) -> None:
    """Another file takes its name, as when a copy is brought back."""
    other = pack.with_name("new")
    other.write_bytes(data)
    os.replace(other, pack)


@pytest.fixture(params=[True, False], ids=["frames have checks", "pages have ids only"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Store:
    return new_store(clock, backend=LocalFolder(tmp_path / "store"), has_frame_check=request.param)


def look_at_a_neighbour(folder: Store, reader: SnapshotReader, number: int) -> None:
    """A page that was not damaged, in a frame that was: right where it can be told, and its frame is kept for it."""
    if folder.repository.seal.proves_frames:
        with pytest.raises(Damaged):
            reader.page(RAM, number)
    else:
        assert np.array_equal(reader.page(RAM, number), PAGES[number])


def pack_of(store: Store) -> Path:
    assert isinstance(store.backend, LocalFolder)
    (name,) = store.names("packs/")
    return store.backend.root / name


def flipped(data: bytes, page: int) -> bytes:
    damaged = bytearray(data)
    damaged[FIRST_FRAME + page * PAGE_BYTES + 7] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize("change", [in_place, by_rename])
def test_a_page_that_was_read_as_damaged_is_right_again_when_its_pack_is(
    folder: Store, change: Callable[[Path, bytes], None]
) -> None:
    snapshot = folder.save(PAGES)
    pack = pack_of(folder)
    whole = pack.read_bytes()
    change(pack, flipped(whole, 5))
    five = np.array([5])
    with SnapshotReader(folder.repository, snapshot) as reader:
        with pytest.raises(Damaged):
            reader.page(RAM, 5)
        with pytest.raises(Damaged):
            reader.read_some(RAM, five)
        look_at_a_neighbour(folder, reader, 4)
        change(pack, whole)
        assert np.array_equal(reader.page(RAM, 5), PAGES[5]), "not out of the frame that was kept"
        assert np.array_equal(reader.read_some(RAM, five)[0], PAGES[5])


def test_a_run_does_not_go_by_a_frame_that_was_kept_while_it_was_damaged(folder: Store) -> None:
    snapshot = folder.save(PAGES)
    pack = pack_of(folder)
    whole = pack.read_bytes()
    in_place(pack, flipped(whole, 5))
    with SnapshotReader(folder.repository, snapshot) as reader:
        look_at_a_neighbour(folder, reader, 4)
        in_place(pack, whole)
        assert np.array_equal(reader.read(RAM, 0, 8), PAGES[:8])
        in_place(pack, flipped(whole, 5))
        look_at_a_neighbour(folder, reader, 4)
        with pytest.raises(Damaged):
            reader.read(RAM, 0, 8)


def test_a_difference_is_right_again_when_its_base_is(folder: Store) -> None:
    first = folder.save(PAGES)
    pack = pack_of(folder)
    whole = pack.read_bytes()
    second = folder.later(first, touched(PAGES, 16))
    with SnapshotReader(folder.repository, second) as reader:
        in_place(pack, flipped(whole, 3))
        with pytest.raises(Damaged):
            reader.page(RAM, 3)
        if not folder.repository.seal.proves_frames:
            reader.page(RAM, 2)
        in_place(pack, whole)
        assert np.array_equal(reader.page(RAM, 3), folder.saved[second][3])
    folder.check()


def test_a_base_whose_pack_was_missing_is_found_when_it_is_back(folder: Store, clock: ManualClock) -> None:
    """The pages of a snapshot are there and it opens; what they are differences to is missed as they are read."""
    first = folder.save(PAGES)
    pack = pack_of(folder)
    second = folder.later(first, touched(PAGES, 16))
    away = pack.with_name("away")
    pack.rename(away)
    failing = FailingStore(folder.backend, lambda call: None)
    folder.repository.backend = failing
    with SnapshotReader(folder.repository, second) as reader:
        for _ in range(20):
            with pytest.raises(Damaged, match="base"):
                reader.read(RAM, 0, 16)
            with pytest.raises(Damaged, match="base"):
                reader.page(RAM, 3)
        assert len([call for call in failing.calls if call.method == "list"]) < 6, "not a look for each page"
        away.rename(pack)
        clock.at_s += STORE_LOOK_AGAIN_S
        assert np.array_equal(reader.read(RAM, 0, 16), folder.saved[second])
        assert np.array_equal(reader.page(RAM, 3), folder.saved[second][3])


def test_a_pack_that_a_damaged_one_was_put_in_place_of_is_found_damaged(folder: Store) -> None:
    """An agent that runs for months has its packs open: what it verifies is what is under their names now."""
    folder.save(PAGES)
    folder.check()
    assert verify(folder.repository).problems == ()
    pack = pack_of(folder)
    by_rename(pack, flipped(pack.read_bytes(), 5))
    assert [problem.name for problem in verify(folder.repository).problems] == [folder.names("packs/")[0]]


def test_a_file_that_is_deleted_can_still_be_read_by_whoever_has_it_open(folder: Store) -> None:
    folder.save(PAGES)
    (name,) = folder.names("packs/")
    whole = folder.backend.get(name)
    pack_of(folder).unlink()
    assert folder.backend.get(name) == whole
