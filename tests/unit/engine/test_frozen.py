"""A guest at rest: what an image knows beside its pages, as bytes; and what a snapshot's owner says of it."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.engine.frozen import (
    MAGIC,
    FrozenDisk,
    FrozenState,
    SnapshotWords,
    freeze,
    state_of,
    thaw,
)
from vmferry.engine.image import Image, KeptBitmaps
from vmferry.errors import PlanRefused, RepositoryError
from vmferry.wire.events import Configuration, DeviceSection

STATE = FrozenState(
    Configuration("pc-q35-7.2", page_bits=12, uuid=bytes(range(16)), order=("configuration/uuid",
                  "configuration/target-page-bits")),
    (
        DeviceSection(1, "early", 0, 3, b"\x01", early=True),
        DeviceSection(30, "cpu", 7, 12, b"state"),
        DeviceSection(31, "slirp", 0, 4, b""),
    ),
    b'{"devices": []}',
    ram_section_id=2,
)  # fmt: skip
GOLDEN = (
    "766d6665727279206465766963652073746174650a0000000185ad636f6e66696775726174696f6e85a76d616368696e65c4"
    "0a70632d7133352d372e32a56f7264657292b2636f6e66696775726174696f6e2f75756964be636f6e66696775726174696f"
    "6e2f7461726765742d706167652d62697473a9706167655f626974730cac6361706162696c6974696573c0a475756964c410"
    "000102030405060708090a0b0c0d0e0fab6861735f666f6f74657273c3ae72616d5f73656374696f6e5f696402a764657669"
    "636573939601c4056561726c790003c3c40101961ec403637075070cc2c4057374617465961fc405736c6972700004c2c400"
    "ab6465736372697074696f6ec40f7b2264657669636573223a205b5d7d"
)

u32 = st.integers(0, (1 << 32) - 1)
names = st.binary(max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
machines = st.binary(min_size=1, max_size=200).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    page_bits = draw(st.none() | st.integers(12, 16))
    capabilities = draw(st.none() | st.lists(names, max_size=3).map(tuple))
    uuid = draw(st.none() | st.binary(min_size=16, max_size=16))
    values = {"target-page-bits": page_bits, "capabilities": capabilities, "uuid": uuid}
    order = draw(st.permutations([f"configuration/{name}" for name, value in values.items() if value is not None]))
    return Configuration(draw(machines), page_bits, capabilities, uuid, tuple(order))


@st.composite
def states(draw: st.DrawFn) -> FrozenState:
    count = draw(st.integers(0, 2))
    devices = tuple(
        DeviceSection(draw(u32), draw(names), draw(u32), draw(u32), draw(st.binary(max_size=40)), each < count)
        for each in range(draw(st.integers(0, 4)))
    )
    description = draw(st.none() | st.binary(max_size=40))
    return FrozenState(draw(st.none() | configurations()), devices, description, draw(st.booleans()), draw(u32))


def test_the_bytes_stay_the_same() -> None:
    assert freeze(STATE).hex() == GOLDEN
    assert thaw(bytes.fromhex(GOLDEN)) == STATE


@given(states())
def test_what_was_frozen_thaws(state: FrozenState) -> None:
    assert thaw(freeze(state)) == state


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 255))
def test_damaged_bytes_are_refused_or_harmless(tail: bytes, at: int, value: int) -> None:
    """A repository checks what it keeps; what comes from a hostile one must still never do worse than be refused."""
    whole = bytearray(freeze(STATE))
    whole[at % len(whole)] = value
    for data in (bytes(whole), bytes(whole[:at]), MAGIC + tail, MAGIC + bytes([0, 0, 0, 1]) + tail):
        try:
            found = thaw(data)
        except RepositoryError:
            continue
        assert thaw(freeze(found)) == found


def test_another_version_is_named() -> None:
    data = bytearray(freeze(STATE))
    data[len(MAGIC) + 3] = 9
    with pytest.raises(RepositoryError, match="it has version 9, and this vmferry reads version 1"):
        thaw(bytes(data))


def changed(**values: object) -> bytes:
    """The golden state with other values in it, which `freeze` would never write."""
    head = len(MAGIC) + 4
    body = msgspec.msgpack.decode(bytes.fromhex(GOLDEN)[head:])
    for path, value in values.items():
        target = body
        *parts, last = path.split("__")
        for part in parts:
            target = target[int(part) if part.isdigit() else part]
        target[int(last) if last.isdigit() else last] = value
    return bytes.fromhex(GOLDEN)[:head] + msgspec.msgpack.encode(body)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"configuration__machine": b""}, "configuration section"),
        ({"configuration__machine": bytes(9999)}, "configuration section"),
        ({"configuration__uuid": bytes(15)}, "configuration section"),
        ({"configuration__page_bits": 99}, "configuration section"),
        ({"configuration__capabilities": [bytes(256)]}, "configuration section"),
        ({"configuration__order": []}, "configuration section"),
        ({"devices__0__0": 1 << 32}, "out of bounds"),
        ({"devices__0__2": -1}, "out of bounds"),
        ({"devices__0__1": bytes(256)}, "name is too long"),
        ({"devices__1__4": True, "devices__0__4": False}, "order of a stream"),
        ({"devices": [[1, b"x", 0, 0, False, b""]] * 16385}, "16385 device sections"),
        ({"description": bytes((4 << 20) + 1)}, "vmdescription is too long"),
        ({"surprise": 1}, "surprise"),
        ({"ram_section_id": "one"}, "int"),
    ],
)
def test_what_no_qemu_writes_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(RepositoryError, match=words):
        thaw(changed(**values))


def test_an_image_is_frozen_and_filled() -> None:
    image = Image()
    STATE.fill(image)
    assert image.is_device_state_whole
    assert image.machine == STATE.machine == "pc-q35-7.2"
    assert [each.idstr for each in image.early] == ["early"]
    assert state_of(image) == STATE
    assert FrozenState(None, (), None).machine == ""


def test_dirty_bitmaps_are_refused_in_words() -> None:
    image = Image()
    STATE.fill(image)
    image.bitmaps = KeptBitmaps(7)
    with pytest.raises(PlanRefused, match="dirty bitmaps"):
        state_of(image)


WORDS = SnapshotWords(
    vm="web1", host="host-a", job="0123", machine="pc-q35-7.2", qemu_version="7.2.22", was_running=True, way="precopy",
    definition={"name": "web1"},
)  # fmt: skip
DISK = FrozenDisk(path="/srv/a.raw", format="raw", way="external-snapshot", size_bytes=5, mtime_ns=7, overlay="/srv/b")


def test_words_survive_a_manifest() -> None:
    assert SnapshotWords.from_wire(msgspec.json.decode(msgspec.json.encode(WORDS.to_wire()))) == WORDS
    assert FrozenDisk.from_wire(msgspec.json.decode(msgspec.json.encode(DISK.to_wire()))) == DISK


def test_a_copy_says_whose_it_is_and_others_stay_as_they_were() -> None:
    copy = dataclasses.replace(DISK, way="mirror", overlay="", disk="/srv/own.raw", virtual_bytes=9, chain=())
    assert FrozenDisk.from_wire(msgspec.json.decode(msgspec.json.encode(copy.to_wire()))) == copy
    assert (copy.guest_path, DISK.guest_path) == ("/srv/own.raw", "/srv/a.raw")
    assert not {"disk", "virtual_bytes"} & DISK.to_wire().keys(), "an earlier agent knows no such words"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "has version 2, and this vmferry reads version 1"),
        ({"version": None}, "has version None"),
        ({"way": "magic"}, "description cannot be read"),
        ({"was_running": "yes"}, "description cannot be read"),
        ({"strange": 1}, "strange"),
    ],
)
def test_words_of_others_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RepositoryError, match=words):
        SnapshotWords.from_wire({**WORDS.to_wire(), **changes})


def test_words_that_are_missing_are_refused() -> None:
    wire = WORDS.to_wire()
    del wire["vm"]
    with pytest.raises(RepositoryError, match="vm"):
        SnapshotWords.from_wire(wire)
    with pytest.raises(RepositoryError, match="disk cannot be read"):
        FrozenDisk.from_wire(dataclasses.asdict(DISK) | {"way": "copy"})
