"""Indexes: rows, frames and packs count as written, and an object that contradicts itself is damage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmferry.store import index as module
from vmferry.store.envelope import INDEX, PREFIX, seal_object
from vmferry.store.errors import Damaged
from vmferry.store.index import Index, PackFacts, index_name, of_packs, read_index, write_index
from vmferry.store.pack import Frames
from vmferry.store.page_ids import Ids
from vmferry.store.seal import OpenSeal, SecretSeal

SEAL = OpenSeal(b"k" * 16)
INDEX_ID = b"i" * 16
FRAME = st.tuples(st.integers(1, 9000), st.integers(0, 3), st.integers(1, 8))
PACKS = st.lists(st.lists(FRAME, min_size=1, max_size=5), max_size=4)


def numbered(count: int, start: int) -> Ids:
    return np.arange(start, start + 2 * count, dtype="<u8").view(np.uint8).reshape(-1, 16)


def made(shape: list[list[tuple[int, int, int]]]) -> Index:
    packs, row = [], 0
    for number, each in enumerate(shape):
        lengths, kinds, counts = (np.array(column) for column in zip(*each, strict=True))
        lengths = np.minimum(lengths, counts * 4096)
        bases = numbered(int(counts[kinds & 2 != 0].sum()), 1 << 40 | row)
        frames = Frames(lengths.astype(np.uint32), kinds.astype(np.uint8), counts.astype(np.uint8), bases)
        packs.append(PackFacts(bytes([number]) * 16, 1000 + number, frames, numbered(frames.pages, row * 2)))
        row += frames.pages
    return of_packs(INDEX_ID, packs)


@given(st.sampled_from([SEAL, SecretSeal(b"m" * 32)]), PACKS)
@example(SEAL, [])
@example(SEAL, [[(100, 1, 8), (50, 3, 2)], [(4096, 0, 1)]])
def test_there_and_back(seal: OpenSeal | SecretSeal, shape: list[list[tuple[int, int, int]]]) -> None:
    index = made(shape)
    found = read_index(seal, INDEX_ID, write_index(seal, index))
    assert found.rows == index.rows == sum(count for pack in shape for _, _, count in pack)
    assert found.pack_ids == index.pack_ids
    assert np.array_equal(found.ids, index.ids)
    assert found.frames.to_bytes() == index.frames.to_bytes()
    every = np.arange(len(index.frames.lengths))
    assert found.places(every) == [found.place(each) for each in every.tolist()]
    row = base = frame_number = 0
    for number, pack in enumerate(shape):
        offset = PREFIX.size
        for place_number, (_, kind, count) in enumerate(pack):
            length = int(index.frames.lengths[frame_number])
            rows = np.arange(row, row + count)
            assert (
                found.frames_of(rows).tolist()
                == [frame_number] * count
                == [found.frame_of(each) for each in rows.tolist()]
            )
            assert found.packs_of(found.frames_of(rows)).tolist() == [number] * count
            place = found.place(frame_number)
            assert (place.pack, place.number, place.offset, place.length) == (number, place_number, offset, length)
            assert (place.kind, place.first_row, place.pages) == (kind, row, count)
            assert found.are_differences(rows).tolist() == [bool(kind & 2)] * count
            if kind & 2:
                assert np.array_equal(found.bases_of(rows), index.frames.bases[base : base + count])
                base += count
            row, offset, frame_number = row + count, offset + length, frame_number + 1
        first, end = found.pack_rows()[number : number + 2]
        assert end - first == sum(count for _, _, count in pack)
        first, end = found.first_frames[number : number + 2]
        assert len(found.frames_between(slice(int(first), int(end))).lengths) == len(pack)
    other = found.with_ids(found.ids ^ np.uint8(1))
    assert np.array_equal(other.ids ^ np.uint8(1), found.ids)


SHAPE = [[(100, 1, 8), (50, 3, 2)], [(4096, 0, 1)]]


def rewritten(change: Callable[[dict[str, int], list[bytearray]], None]) -> bytes:
    """The object of SHAPE with other numbers, sealed as if it were right."""
    index = made(SHAPE)
    head = {"packs": 2, "frames": 3, "rows": 11, "bases": 2}
    table = np.zeros(2, module._PACK)
    table["size"], table["frames"], table["bases"] = [1000, 1001], [2, 1], [2, 0]
    sections = [bytearray(table.tobytes()), bytearray(index.frames.to_bytes()), bytearray(index.ids.tobytes())]
    change(head, sections)
    return seal_object(SEAL, index_name(INDEX_ID), INDEX, head, [bytes(each) for each in sections])


def change_head(**numbers: int) -> Callable[[dict[str, int], list[bytearray]], None]:
    return lambda head, sections: head.update(numbers)


def change_byte(section: int, at: int, value: int) -> Callable[[dict[str, int], list[bytearray]], None]:
    return lambda head, sections: sections[section].__setitem__(at, value)


def test_the_unchanged_one_is_right() -> None:
    assert read_index(SEAL, INDEX_ID, rewritten(lambda head, sections: None)).rows == 11


@pytest.mark.parametrize(
    "change",
    [
        change_head(rows=10), change_head(frames=2), change_head(packs=1), change_head(bases=1), change_head(rows=-1),
        change_head(rows=1 << 40), lambda head, sections: head.pop("rows"), lambda head, sections: sections.pop(),
        lambda head, sections: sections[2].pop(),
        change_byte(0, 24, 1),  # a pack with one frame fewer
        change_byte(1, 16, 7),  # a frame with one page fewer
        change_byte(0, 28, 1),  # a pack with one base fewer
        change_byte(1, 12, 2),  # a frame of differences more
    ],
)  # fmt: skip
def test_an_index_that_contradicts_itself_is_damaged(
    change: Callable[[dict[str, int], list[bytearray]], None],
) -> None:
    with pytest.raises(Damaged, match=INDEX_ID.hex()):
        read_index(SEAL, INDEX_ID, rewritten(change))


def test_bases_that_belong_to_another_pack_are_damage() -> None:
    def swap(head: dict[str, int], sections: list[bytearray]) -> None:
        sections[0][28], sections[0][60] = 0, 2

    with pytest.raises(Damaged, match="bases"):
        read_index(SEAL, INDEX_ID, rewritten(swap))
