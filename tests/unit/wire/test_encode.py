"""Every event has its bytes. Most are proven where they are decoded; here are those that no decoder gives alone."""

from __future__ import annotations

import typing

import numpy as np

from tests.wire_streams import device, join, package, precopy, zeros
from vmferry.wire import events
from vmferry.wire.encode import encode, encode_package
from vmferry.wire.events import (
    BitmapChunk,
    Configuration,
    Description,
    EndOfSections,
    Header,
    MultifdInit,
    MultifdPacket,
    OpaqueDevices,
    Packaged,
    PackageEnd,
    SectionStart,
    SwitchoverAck,
    ZeroRun,
    to_raw,
    to_text,
)


def test_a_package_is_the_command_and_its_content() -> None:
    parts = encode_package([*package()])
    assert b"".join(bytes(each) for each in parts) == join([Packaged(len(join(package()))), *package(), PackageEnd()])


def test_things_without_payload() -> None:
    assert join([EndOfSections()]) == b"\x00"
    assert join([PackageEnd()]) == b""
    assert join([OpaqueDevices(b"abc")]) == b"abc"
    assert join([SwitchoverAck()]) == b"\x00\x07\x00\x00"


def test_the_examples_of_the_protocol() -> None:
    (first, second) = (precopy()[each] for each in (11, 12))
    assert join([first]) == bytes.fromhex("0200000002")  # a PART of section 2
    assert join([second])[:15].hex() == "0000000000000008" + "0670632e72616d"
    assert join(device(3, "timer", b"x"))[:19].hex() == "0400000003" + "0574696d6572" + "00000000" + "00000001"


def test_the_beginning_and_the_end_of_a_stream() -> None:
    assert join([Header()]) == b"QEVM\x00\x00\x00\x03"
    assert join([Configuration("pc")]) == bytes.fromhex("0700000002") + b"pc"
    assert join([SectionStart(2, "ram", 0, 4)]) == bytes.fromhex("0100000002" + "0372616d" + "00000000" + "00000004")
    assert join([BitmapChunk(0x01)]) == b"\x01"
    assert join([Description(b"{}")]) == bytes.fromhex("0600000002") + b"{}"


def test_a_multifd_channel_begins_with_its_number() -> None:
    raw = join([MultifdInit(3, b"u" * 16)])
    assert raw == bytes.fromhex("1122334400000001") + b"u" * 16 + b"\x03" + bytes(39)


def test_a_packet_tells_its_pages_from_its_zero_pages_and_from_leftovers() -> None:
    offsets = np.array([4096, 8192, 12288, 0], np.uint64)
    packet = MultifdPacket(0, 4, 2, 1, 8192, 7, None, b"ram", offsets)
    assert packet.normal_offsets.tolist() == [4096, 8192]
    assert packet.zero_offsets.tolist() == [12288]


def test_a_run_may_be_a_single_named_page() -> None:
    run = zeros([1], named=True)
    assert [bytes(each) for each in encode(run)][-1] == b""
    assert len(join([ZeroRun(run.block, np.array([4096, 8192], np.uint64), named=True)])) == 8 + 7 + 1 + 9


def test_every_event_is_frozen() -> None:
    for each in typing.get_args(events.Event):
        assert each.__dataclass_params__.frozen, each


def test_names_keep_every_byte() -> None:
    assert to_raw(to_text(bytes(range(256)))) == bytes(range(256))
