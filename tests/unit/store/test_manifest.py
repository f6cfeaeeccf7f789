"""Manifests: golden bytes, tables that come back, and heads that cannot be."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmferry.store import manifest as module
from vmferry.store.compression import Compressor
from vmferry.store.envelope import MANIFEST, seal_object
from vmferry.store.errors import Damaged
from vmferry.store.manifest import (
    ZERO,
    Block,
    Counts,
    Head,
    IndexUse,
    manifest_name,
    read_head,
    read_manifest,
    write_manifest,
)
from vmferry.store.seal import OpenSeal, SecretSeal

SEAL = OpenSeal(b"k" * 16)
SNAPSHOT = "ab" * 16
ROWS = 1000


def head(*pages: int, rows: int = ROWS) -> Head:
    blocks = [Block(f"block{number}", count * 4096) for number, count in enumerate(pages)]
    uses = [IndexUse("11" * 16, rows - 1), IndexUse("22" * 16, 1)]
    return Head("web1 before", 12.5, blocks, uses, Counts(pages=sum(pages)), [{"node": "disk0"}], {"why": ["x", 1]})


TABLE = st.lists(st.one_of(st.integers(0, ROWS - 1), st.just(ZERO)), min_size=1, max_size=60)


@given(st.sampled_from([SEAL, SecretSeal(b"m" * 32)]), st.lists(TABLE, max_size=3), st.binary(max_size=100))
@example(SEAL, [[7], [0, int(ZERO)]], b"state")
def test_there_and_back(seal: OpenSeal | SecretSeal, lists: list[list[int]], state: bytes) -> None:
    tables = [np.array(each, np.uint32) for each in lists]
    written = head(*(len(each) for each in lists))
    data = write_manifest(seal, SNAPSHOT, written, state, tables)
    found = read_manifest(seal, SNAPSHOT, data)
    assert found.head == written
    assert found.device_state == state
    assert [table.tolist() for table in found.tables] == lists
    assert read_head(seal, SNAPSHOT, data, len(data))[0] == written


def test_golden_bytes_of_version_1() -> None:
    data = write_manifest(SEAL, SNAPSHOT, head(3), b"", [np.array([5, ZERO, 6], np.uint32)])
    assert data[:8].hex() == "564d465301030000"
    end = 16 + int.from_bytes(data[8:12], "little")
    compressed = len(Compressor(3).frame(b"")) + 16, len(Compressor(3).frame(TABLE_BYTES)) + 16
    assert data[16 : end - 16] == (
        b'{"head":{"name":"web1 before","created_s":12.5,'
        b'"blocks":[{"name":"block0","size_bytes":12288,"page_bytes":4096}],'
        b'"indexes":[["11111111111111111111111111111111",999],["22222222222222222222222222222222",1]],'
        b'"counts":{"pages":3,"zero":0,"known":0,"differences":0,"stored_bytes":0},'
        b'"disks":[{"node":"disk0"}],"metadata":{"why":["x",1]}},'
        b'"sections":[[%d,0],[%d,12]]}' % compressed
    )
    _, opened = read_head(SEAL, SNAPSHOT, data, len(data))
    assert opened.section(1, 12) == TABLE_BYTES


TABLE_BYTES = bytes.fromhex("05000000 faffffff 07000000".replace(" ", ""))
"""5, then all ones (6 less), then 6 (7 more): neighbours subtracted, wrapping around."""


def test_a_million_pages_in_order_are_some_kilobytes() -> None:
    table = np.arange(1 << 20, dtype=np.uint32)
    data = write_manifest(SEAL, SNAPSHOT, head(1 << 20, rows=1 << 20), b"", [table])
    assert len(data) < 4096


def test_one_that_is_larger_than_any_can_be_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_manifest(SEAL, SNAPSHOT, head(1), b"", [np.zeros(1, np.uint32)])
    monkeypatch.setattr(module, "STORE_MANIFEST_BYTES_MAX", len(data))
    read_manifest(SEAL, SNAPSHOT, data)
    with pytest.raises(Damaged, match="more than"):
        read_manifest(SEAL, SNAPSHOT, data + b"x")


def test_state_and_tables_that_cannot_be_compressed_fit() -> None:
    rng = np.random.default_rng(1)
    table = rng.integers(0, ROWS, 1 << 16, dtype=np.uint32)
    for state in (b"", b"x", rng.bytes(1 << 20)):
        data = write_manifest(SEAL, SNAPSHOT, head(1 << 16), state, [table])
        assert read_manifest(SEAL, SNAPSHOT, data).device_state == state


def test_what_is_written_is_complete() -> None:
    with pytest.raises(AssertionError, match="one table per block"):
        write_manifest(SEAL, SNAPSHOT, head(3), b"", [np.zeros(2, np.uint32)])
    with pytest.raises(AssertionError, match="every page has come"):
        write_manifest(SEAL, SNAPSHOT, head(1), b"", [np.array([0xFFFFFFFE], np.uint32)])


@pytest.mark.parametrize("number", [ROWS, 0xFFFFFFFD, 0x80000000])
def test_numbers_that_no_index_has(number: int) -> None:
    data = write_manifest(SEAL, SNAPSHOT, head(1), b"", [np.array([number], np.uint32)])
    with pytest.raises(Damaged, match="no index has"):
        read_manifest(SEAL, SNAPSHOT, data)


def test_heads_that_cannot_be() -> None:
    good = head(1)
    cases: tuple[dict[str, Any], ...] = (
        {"blocks": [Block("a", 4095)]}, {"blocks": [Block("a", 1 << 60)]}, {"blocks": []},
        {"indexes": [IndexUse("11" * 15, 1)]}, {"indexes": [IndexUse("11" * 16, 1 << 40)]},
        {"indexes": [IndexUse("zz" * 16, 1)]}, {"created_s": -1.0}, {"created_s": 1e18},
    )  # fmt: skip
    for changes in cases:
        bad = msgspec.structs.replace(good, **changes)
        tables = [np.zeros(min(block.pages, 1), np.uint32) for block in good.blocks]
        name = manifest_name(SNAPSHOT)
        data = seal_object(SEAL, name, MANIFEST, msgspec.to_builtins(bad), [b"", tables[0].tobytes()])
        with pytest.raises(Damaged, match=SNAPSHOT):
            read_manifest(SEAL, SNAPSHOT, data)
