"""What streams hold. How it is shown is in tests/unit/cli."""

from __future__ import annotations

import json
import zlib

from tests.wire_streams import BLOCK, bitmaps, describe, device, precopy
from vmferry.wire import summary
from vmferry.wire.configuration import UUID
from vmferry.wire.events import (
    AskBitmap,
    CompressedPage,
    Configuration,
    Description,
    Discard,
    Event,
    MappedData,
    OpaqueDevices,
    Packaged,
    PostcopyAdvise,
)


def of(events: list[Event]) -> summary.Summary:
    found = summary.Summary()
    for each in events:
        found.add(each)
    return found


def test_counts_and_devices() -> None:
    wire = of(precopy()).to_wire()
    assert wire["machine"] == "pc-i440fx-11.1"
    assert wire["blocks"][0] == {
        "name": "pc.ram",
        "bytes": BLOCK.used_length,
        "records": {"page": 22, "zero": 20, "xbzrle": 1},
    }
    assert [each["name"] for each in wire["devices"]] == ["timer", "apic", "dma", "empty"]
    assert wire["records"]["MultifdFlush"] == 2
    assert wire["devices"][3]["fields"] == []


def test_what_is_rare() -> None:
    page = CompressedPage(BLOCK, 0, zlib.compress(bytes(4096)), named=True)
    events: list[Event] = [
        Configuration("m", uuid=bytes(15) + b"\x01", order=(UUID,)), PostcopyAdvise(), PostcopyAdvise(1, 2),
        Discard("m", ((0, 1), (5, 2))), AskBitmap("m"), Packaged(16), page, *bitmaps(),
        MappedData(0, memoryview(b"x")), OpaqueDevices(b"abc"),
    ]  # fmt: skip
    wire = of(events).to_wire()
    assert wire["uuid"].endswith("01")
    assert wire["commands"] == [
        "PostcopyAdvise for dirty bitmaps", "PostcopyAdvise 0x1 0x2", "Discard m: 2 ranges, 3 bytes", "AskBitmap m",
        "Packaged 0x10",
    ]  # fmt: skip
    assert wire["iterable_sections"] == ["dirty-bitmap"]
    assert wire["undelimited_device_bytes"] == 3


def test_only_so_many_commands_are_kept() -> None:
    found = of([AskBitmap("m")] * (summary.COMMANDS_KEPT_MAX + 1))
    assert len(found.commands) == summary.COMMANDS_KEPT_MAX


def test_fields_need_a_description_that_fits() -> None:
    one = device(1, "a", b"abc")
    assert of(one).fields(("a", 0)) is None
    assert of([*one, describe(device(1, "a", b"abcd"))]).fields(("a", 0)) is None
    assert of([*one, describe(device(1, "b", b"abc"))]).fields(("a", 0)) is None
    assert of([*one, describe(one)]).fields(("a", 0)) is not None


def test_differences_of_fields() -> None:
    one, two = device(1, "a", b"abc"), device(1, "a", b"abd")
    first, second = of([*one, describe(one)]), of([*two, describe(two)])
    assert list(summary.compare(first, second)) == [
        {"what": "device a/0, state", "first": "616263", "second": "616264"}
    ]
    assert list(summary.compare(first, first)) == []
    longer = of([BLOCK, *device(1, "c", b"")])
    what = [each["what"] for each in summary.compare(first, longer)]
    assert what == ["block pc.ram, bytes", "device a/0", "device c/0"]


def test_states_that_nothing_describes() -> None:
    first, second = (of(device(1, "a", body)) for body in (b"abc", b"abd"))
    assert [each["what"] for each in summary.compare(first, second)] == ["device a/0, state"]


def test_fields_that_are_alike_are_not_shown() -> None:
    fields = [{"name": "x", "size": 1}, {"name": "y", "size": 2}]
    described = Description(json.dumps({"devices": [{"name": "a", "instance_id": 0, "fields": fields}]}).encode())
    first, second = (of([*device(1, "a", body), described]) for body in (b"abc", b"abd"))
    assert [each["what"] for each in summary.compare(first, second)] == ["device a/0, y"]
