"""Manifests: what a snapshot is. Writing one is the only commit of a save. Pure.

Theory of operation
-------------------
The head has what a listing shows and what is small: name, time, blocks, disks, the owner's own words. Sections: device
state, then one page table per block.

A page table says for each page its *number*: the rows of the indexes that the head lists, counted through in that
order; or ZERO. It is stored as differences of neighbours, because most pages follow each other in packs as they do in
memory: a table of a million pages takes some kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from vmferry.limits import (
    STORE_BLOCKS_MAX,
    STORE_CREATED_S_MAX,
    STORE_DEVICE_STATE_BYTES_MAX,
    STORE_INDEX_PAGES_MAX,
    STORE_MANIFEST_BYTES_MAX,
    STORE_SNAPSHOT_PAGES_MAX,
)
from vmferry.store.envelope import MANIFEST, Opened, seal_object
from vmferry.store.errors import Damaged
from vmferry.store.page_ids import PAGE_BYTES
from vmferry.store.seal import Seal

ZERO: Final = 0xFFFFFFFF
UNSET: Final = 0xFFFFFFFE
"""While a snapshot is written: this page has not come yet. Never stored."""
Table = npt.NDArray[np.uint32]


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One RAM block. `page_bytes` is the host page of the guest's owner: what travels together in a postcopy."""

    name: str
    size_bytes: int
    page_bytes: int = PAGE_BYTES

    @property
    def pages(self) -> int:
        """How many pages of PAGE_BYTES it has."""
        return self.size_bytes // PAGE_BYTES


class IndexUse(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One index that page tables speak of, and how many rows of numbers it takes."""

    index: str
    rows: int


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What saving it cost, for people."""

    pages: int = 0
    zero: int = 0
    known: int = 0
    """Of those that are not zero: here before, or twice in this snapshot."""
    differences: int = 0
    stored_bytes: int = 0
    """Packs that were written for it."""


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest without its large parts."""

    name: str
    created_s: float
    blocks: list[Block]
    indexes: list[IndexUse]
    counts: Counts
    disks: list[dict[str, Any]]
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of it."""

    head: Head
    device_state: bytes
    tables: list[Table] = field(default_factory=list)


def manifest_name(snapshot: str) -> str:
    """The object's name."""
    return f"snapshots/{snapshot}"


def write_manifest(seal: Seal, snapshot: str, head: Head, device_state: bytes, tables: Sequence[Table]) -> bytes:
    """The manifest as an object."""
    assert [len(table) for table in tables] == [block.pages for block in head.blocks], "one table per block"
    assert not any(np.any(table == UNSET) for table in tables), "every page has come"
    sections = [device_state, *(_differences(table) for table in tables)]
    return seal_object(seal, manifest_name(snapshot), MANIFEST, msgspec.to_builtins(head), sections)


def read_head(seal: Seal, snapshot: str, data: bytes, size_bytes: int) -> tuple[Head, Opened]:
    """The head, from the object or from its beginning: also that the object is no larger than what it describes. Raises
    Damaged."""
    name = manifest_name(snapshot)
    opened = Opened(seal, name, MANIFEST, data, size_bytes)
    try:
        head = msgspec.convert(opened.head, Head)
        uses = [(len(bytes.fromhex(use.index)), use.rows) for use in head.indexes]
    except (msgspec.ValidationError, ValueError) as error:
        raise Damaged(name, f"its head is not a manifest's: {error}") from None
    sizes = [(block.size_bytes, block.page_bytes) for block in head.blocks]
    is_possible = (
        len(sizes) <= STORE_BLOCKS_MAX
        and all(size > 0 and size % PAGE_BYTES == 0 and page > 0 and page % PAGE_BYTES == 0 for size, page in sizes)
        and sum(block.pages for block in head.blocks) <= STORE_SNAPSHOT_PAGES_MAX
        and len({block.name for block in head.blocks}) == len(sizes)
        and all(length == 16 and 0 <= rows <= STORE_INDEX_PAGES_MAX for length, rows in uses)
        and sum(rows for _, rows in uses) < UNSET
        and opened.count == len(sizes) + 1
        and all(opened.plain_bytes(number) == block.pages * 4 for number, block in enumerate(head.blocks, 1))
        and opened.plain_bytes(0) <= STORE_DEVICE_STATE_BYTES_MAX
        and all(opened.is_tight(number) for number in range(opened.count))
    )
    if not is_possible:
        raise Damaged(name, "its blocks, indexes and tables do not fit together")
    if not 0 <= head.created_s <= STORE_CREATED_S_MAX:
        raise Damaged(name, "it was made at a time that is none")
    return head, opened


def read_manifest(seal: Seal, snapshot: str, data: bytes) -> Manifest:
    """The reverse of `write_manifest`. Raises Damaged, also for one that is larger than any can be."""
    name = manifest_name(snapshot)
    if len(data) > STORE_MANIFEST_BYTES_MAX:
        raise Damaged(name, f"it has {len(data)} bytes, more than {STORE_MANIFEST_BYTES_MAX}")
    head, opened = read_head(seal, snapshot, data, len(data))
    rows = sum(use.rows for use in head.indexes)
    tables = []
    for number, block in enumerate(head.blocks, 1):
        table = np.cumsum(np.frombuffer(opened.section(number, block.pages * 4), "<u4"), dtype=np.uint32)
        if np.any((table >= rows) & (table != ZERO)):
            raise Damaged(name, f"block {block.name} speaks of pages that no index has")
        tables.append(table)
    return Manifest(head, opened.section(0, STORE_DEVICE_STATE_BYTES_MAX), tables)


def _differences(table: Table) -> bytes:
    """Neighbours subtracted, wrapping around."""
    return np.diff(table, prepend=np.zeros(1, np.uint32)).astype("<u4").tobytes()
