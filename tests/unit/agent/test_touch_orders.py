"""Orders of first touches: kept, bounded, and ignored when they are damaged."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from vmferry import limits
from vmferry.agent.touch_orders import MAGIC, TouchOrders, read, write
from vmferry.engine.lazy import Touches

ORDER = Touches(["pc.ram", "vga \udc80"])
for block, page in (("pc.ram", 7), ("pc.ram", 3), ("vga \udc80", 1 << 39), ("pc.ram", 7)):
    ORDER.add(block, page, 1)
FIRST = [7, 3, 1 << 40 | 1 << 39]


def pages_of(found: Touches | None) -> list[int] | None:
    return None if found is None else found.codes.tolist()


def test_each_page_is_kept_once_where_it_was_touched_first() -> None:
    found = read(write(ORDER))
    assert pages_of(found) == FIRST
    assert found is not None
    assert found.names == ORDER.names
    assert pages_of(read(write(Touches([])))) == []


def test_a_file_that_is_not_exactly_as_it_was_written_counts_as_nothing() -> None:
    data = write(ORDER)
    for at in range(len(data)):
        assert read(data[:at]) is None
        assert read(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) is None
    assert read(data + b"x") is None


@pytest.mark.parametrize(
    "body",
    [
        MAGIC,
        MAGIC + (5).to_bytes(4, "little") + b"\xff\xff",
        MAGIC + bytes(4) + (1 << 40).to_bytes(8, "little"),
        MAGIC + bytes(4) + (1).to_bytes(8, "little") + (9 << 40).to_bytes(8, "little"),
    ],
    ids=["short", "name", "count", "block"],
)
def test_a_file_that_fits_its_sum_and_says_nonsense_counts_as_nothing(body: bytes) -> None:
    assert read(body + hashlib.sha256(body).digest()) is None


def test_an_agent_remembers_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESTORE_ORDERS_MAX", 2)
    orders = TouchOrders(tmp_path / "first")
    names = [f"{number:032x}" for number in range(3)]
    for number, name in enumerate(names):
        orders.put(name, ORDER)
        os.utime(orders.folder / name, ns=(number, number))
    assert [orders.has(name) for name in names] == [False, True, True]
    assert pages_of(orders.get(names[1])) == FIRST
    assert orders.get(names[0]) is None
    orders.forget(names[1])
    orders.forget(names[1])
    assert not orders.has(names[1])


def test_a_disk_that_refuses_costs_nothing_but_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "first").write_text("a file")
    orders = TouchOrders(tmp_path / "first")
    orders.put("0" * 32, ORDER)
    assert "is not remembered" in caplog.text
    assert orders.get("0" * 32) is None


def test_an_order_of_fewer_pages_replaces_none_of_more(tmp_path: Path) -> None:
    """Several restores of a snapshot that nobody knew end one after the other."""
    orders, snapshot = TouchOrders(tmp_path), "5" * 32
    longer, shorter = Touches(["pc.ram"]), Touches(["pc.ram"])
    longer.add("pc.ram", 1, 9)
    for _ in range(20):
        shorter.add("pc.ram", 1, 5)
    orders.put(snapshot, longer)
    orders.put(snapshot, shorter)
    assert pages_of(orders.get(snapshot)) == list(range(1, 10))
    longer.add("pc.ram", 20, 1)
    orders.put(snapshot, longer)
    assert pages_of(orders.get(snapshot)) == [*range(1, 10), 20]
