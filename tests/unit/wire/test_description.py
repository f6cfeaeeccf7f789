"""The vmdescription. Real ones are in tests/golden."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vmferry.wire import description


def document(**device: Any) -> bytes:
    return json.dumps({"devices": [{"name": "a", "instance_id": 0, **device}]}).encode()


def test_sizes_of_fields_arrays_and_subsections() -> None:
    raw = document(
        version=3,
        fields=[{"name": "x", "size": 4}, {"name": "y", "size": 2, "array_len": 3}],
        subsections=[{"vmsd_name": "a/sub", "version": 1, "fields": [{"name": "z", "type": "uint8", "size": 1}]}],
    )
    found = description.parse(raw)
    assert found is not None
    (device,) = found.devices
    assert (device.name, device.version, device.size) == ("a", 3, 4 + 6 + 6 + 5 + 1)
    body = b"xxxx" + b"aabbcc" + b"\x05\x05a/sub\x00\x00\x00\x01" + b"z"
    fields = description.fields(device, body)
    assert [(each.path, each.data) for each in fields] == [
        ("x", b"xxxx"), ("y[0]", b"aa"), ("y[1]", b"bb"), ("y[2]", b"cc"), ("<a/sub>.z", b"z"),
    ]  # fmt: skip
    assert [each.type for each in fields] == ["?", "?", "?", "?", "uint8"]


def test_old_devices_are_one_buffer() -> None:
    found = description.parse(document(size=3))
    assert found is not None
    assert found.page_size is None
    assert found.devices[0].version is None
    assert description.fields(found.devices[0], b"abc") == (description.Field("data", "buffer", b"abc"),)


def test_structures_are_opened_if_they_fit() -> None:
    inner = {"fields": [{"name": "i", "size": 2}]}
    fields = [
        {"name": "s", "size": 2, "struct": inner},
        {"name": "s", "size": 2, "struct": inner, "index": 7},
        {"name": "t", "size": 3, "struct": inner},
        {"name": "u", "size": 3, "struct": {"fields": [{"name": "i"}]}},
        {"name": "none", "size": 0, "array_len": 1 << 26},
    ]
    found = description.parse(document(fields=fields))
    assert found is not None
    got = description.fields(found.devices[0], b"aabbcccddd")
    assert [each.path for each in got] == ["s[0].i", "s[7].i", "t", "u"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"{}",
        b'{"devices": 1}',
        b'{"devices": [1]}',
        b'{"devices": [{}]}',
        b'{"devices": [{"name": 1, "instance_id": 0, "size": 1}]}',
        document(size=-1),
        document(size=True + 0.5),
        document(size=1 << 60),
        document(fields=[{"size": "1"}]),
        document(fields=[1]),
        document(fields=[], subsections=[{"fields": []}]),
        document(fields=[], subsections=[{"vmsd_name": 1, "fields": []}]),
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_description(text: bytes) -> None:
    assert description.parse(text) is None


def test_page_size() -> None:
    found = description.parse(b'{"page_size": 4096, "devices": []}')
    assert found is not None
    assert found.page_size == 4096
