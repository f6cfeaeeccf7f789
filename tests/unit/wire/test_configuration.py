"""The configuration section."""

from __future__ import annotations

import pytest

from vmferry.wire import configuration
from vmferry.wire.buffer import Buffer
from vmferry.wire.errors import WireError
from vmferry.wire.events import NEED_DATA, Configuration

UUID = bytes(range(16))
FULL = Configuration(
    "pc-i440fx-11.1", page_bits=12, capabilities=("x-ignore-shared", "mapped-ram"), uuid=UUID,
    order=(configuration.PAGE_BITS, configuration.CAPABILITIES, configuration.UUID),
)  # fmt: skip


def decode(data: bytes) -> object:
    buffer = Buffer()
    buffer.feed(data)
    return configuration.decode(buffer)


@pytest.mark.conforms("2")
@pytest.mark.parametrize("event", [Configuration("q35"), Configuration("m", uuid=UUID, order=FULL.order[2:]), FULL])
def test_there_and_back_however_it_is_cut(event: Configuration) -> None:
    data = configuration.encode(event) + b"\x08"
    assert decode(data) == event
    for end in range(len(data)):
        assert decode(data[:end]) is NEED_DATA


def test_the_example_of_the_protocol() -> None:
    raw = bytes.fromhex("070000000e") + b"pc-i440fx-11.1" + bytes.fromhex("0512") + b"configuration/uuid"
    event = Configuration("pc-i440fx-11.1", uuid=UUID, order=("configuration/uuid",))
    assert decode(raw + bytes.fromhex("00000001") + UUID + b"\x01") == event


@pytest.mark.parametrize(
    "data",
    [
        b"\x07\x00\x00\x00\x00",
        b"\x07\x00\x00\x01\x01",
        b"\x07\x00\x00\x00\x01m\x05\x01x\x00\x00\x00\x01",
        configuration.encode(FULL).replace(b"uuid\x00\x00\x00\x01", b"uuid\x00\x00\x00\x02"),
        configuration.encode(FULL).replace(b"\x01\x00\x00\x00\x0c", b"\x01\x00\x00\x00\x11"),
        configuration.encode(FULL).replace(b"\x01\x00\x00\x00\x0c", b"\x01\x00\x00\x00\x09"),
        configuration.encode(FULL).replace(b"mapped-ram", b"mapped-rom"),
        configuration.encode(FULL).replace(b"\x00\x00\x00\x02\x0fx", b"\x00\x00\x00\x11\x0fx"),
        configuration.encode(Configuration("m", uuid=UUID, order=FULL.order[2:] * 2)) + b"\x01",
    ],
)  # fmt: skip
def test_what_is_refused(data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decode(data)
    assert caught.value.reason == "configuration"
