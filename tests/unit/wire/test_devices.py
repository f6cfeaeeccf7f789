"""Finding and splitting device sections."""

from __future__ import annotations

import pytest

from tests.wire_streams import describe, device, devices_of_a_pc, join, package
from vmferry.wire import commands, description, devices, limits
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    Description,
    DeviceSection,
    EndOfSections,
    Event,
    Packaged,
    Ping,
    SectionFooter,
    SectionStart,
)

NO_ONE: frozenset[tuple[str, int]] = frozenset()


def sections(events: list[Event]) -> list[DeviceSection]:
    return [each for each in events if isinstance(each, DeviceSection)]


def tail(*, footers: bool = True, early: frozenset[tuple[str, int]] = NO_ONE) -> devices.Tail:
    return devices.Tail(offset=0, footers=footers, early=early)


def whole(events: list[Event]) -> bytes:
    return join([*events, EndOfSections(), describe(events)])


@pytest.mark.parametrize("slab", [1, 50, 1 << 20])
@pytest.mark.parametrize("footers", [True, False])
def test_a_tail_is_whole_exactly_at_its_last_byte(slab: int, footers: bool) -> None:
    events = devices_of_a_pc()
    data = whole(events if footers else [*sections(events)])
    target = tail(footers=footers)
    ends = []
    for at in range(0, len(data), slab):
        if target.feed(data[at : at + slab]):
            ends.append(at)
    assert ends == [(len(data) - 1) // slab * slab]
    assert target.sections == sections(events)
    assert target.description is not None
    assert data[target.description[0] : target.description[1]] == describe(events).text


def test_what_follows_a_tail_does_not_matter() -> None:
    data = whole(devices_of_a_pc())
    target = tail()
    assert target.feed(data + b'\x00\x06\x00\x00\x00\x02{"' * 1000)
    assert target.description is not None
    assert target.description[1] == len(data)


def test_early_devices_are_described_but_not_in_the_tail() -> None:
    events = devices_of_a_pc()
    data = join([*events, EndOfSections(), describe([*device(1, "mem-early", b"xx"), *events])])
    assert not tail().feed(data)
    assert tail(early=frozenset({("mem-early", 0)})).feed(data)


def test_a_description_of_something_else_does_not_end_a_tail() -> None:
    events = devices_of_a_pc()
    others: list[list[Event]] = [
        device(0, "timer", bytes(24)),
        [*events, *device(1, "more", b"")],
        [*device(0, "time", bytes(24)), *events[2:]],
        [*device(0, "timer", bytes(23)), *events[2:]],
        [*device(0, "timer", bytes(5000)), *events[2:]],
    ]
    for other in others:
        assert not tail().feed(join([*events, EndOfSections(), describe(other)]))
    broken = [*events[:1], SectionFooter(77), *events[2:]]
    assert not tail().feed(whole(broken))
    assert not tail().feed(join([Ping(1), EndOfSections(), describe(events)]))
    text = describe(events).text
    assert not tail().feed(join([*events, EndOfSections(), Description(text[:-1] + b"]")]))
    assert not tail().feed(join([*events, EndOfSections(), Description(b'{"devices": 1}')]))


def test_a_tail_with_too_many_candidates_is_refused() -> None:
    with pytest.raises(WireError) as caught:
        tail().feed(b'\x00\x06\x00\x00\x00\x02{"' * (limits.DESCRIPTION_CANDIDATES_MAX + 1))
    assert caught.value.reason == "devices-candidates"
    assert not tail().feed(b'\x00\x06\xff\x00\x00\x02{"' * 1000)  # too long to be one


def test_a_tail_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEVICES_BYTES_MAX", 100)
    with pytest.raises(WireError) as caught:
        tail().feed(bytes(101))
    assert caught.value.reason == "devices-size"


# --- chains -------------------------------------------------------------------------------------------------


def bodies(data: bytes, *, is_package: bool) -> list[tuple[str, bytes]] | None:
    found = devices.split_chain(data, is_package=is_package, offset=0)
    if found is None:
        return None
    pieces = [(each[0], each[1]) for each in found[0] if isinstance(each[0], devices.Head)]
    return [(head.idstr, data[head.end : end]) for head, end in pieces if isinstance(end, int)]


def test_a_package_is_split_in_spite_of_false_footers() -> None:
    data = join(package())
    assert bodies(data, is_package=True) == [(each.idstr, each.body) for each in sections(package())]
    found = devices.split_chain(data, is_package=True, offset=0)
    assert found is not None
    numbers = [each[0] for each in found[0] if not isinstance(each[0], devices.Head)]
    assert numbers == [commands.LISTEN, commands.PING, commands.PING, commands.RUN]
    assert found[1] == len(data)


def test_a_false_section_inside_of_a_body_is_given_up_again() -> None:
    """A body that holds a footer and a plausible head of a section that has no end."""
    lie = join([SectionFooter(3)]) + b"\x04\x00\x00\x00\x09\x01x" + bytes(8) + b"rest"
    for is_package, end in ((True, b""), (False, b"\x00")):
        data = join(device(3, "liar", lie)) + end
        assert bodies(data, is_package=is_package) == [("liar", lie)]


@pytest.mark.parametrize("end", [b"\x00", b"\x00\x06\x00\x00\x00\x02{}", b"\x00\x06\x00\x00\x00\x00"])
def test_a_chain_without_description_ends_at_its_end(end: bytes) -> None:
    data = join(devices_of_a_pc())
    found = devices.split_chain(data + end, is_package=False, offset=0)
    assert found is not None
    assert found[1] == len(data)


@pytest.mark.parametrize(
    "end", [b"", b"\x01", b"\x00\x00", b"\x00\x06\x00\x00", b"\x00\x07\x00\x00\x00\x00", b"\x00\x06\x00\x00\x00\x03{}"]
)
def test_what_is_no_chain(end: bytes) -> None:
    assert bodies(join(devices_of_a_pc()) + end, is_package=False) is None
    assert devices.split_chain(end[:1] or b"\x04", is_package=False, offset=0) == (
        ([], 0) if end[:1] == b"\0" else None
    )


@pytest.mark.parametrize(
    "end", [b"\x08\x00", b"\x08\x00\x02\x00\x05abcde", b"\x08\x00\x02\x00\x04ab", b"\x04\xff\0\0\0\x01a" + bytes(9)]
)
def test_what_is_no_package(end: bytes) -> None:
    assert bodies(join(package()) + end, is_package=True) is None


def test_a_search_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FOOTER_CANDIDATES_MAX", 50)
    with pytest.raises(WireError) as caught:
        bodies(join(device(1, "a", b"x")) * 60 + b"\x05", is_package=False)
    assert caught.value.reason == "devices-search"


@pytest.mark.parametrize(
    ("head", "plausible"),
    [
        (devices.Head(4, 1, "timer", 0, 1, 0), True),
        (devices.Head(4, 1 << 24, "timer", 0, 1, 0), False),
        (devices.Head(4, 1, "timer", 0, 1 << 16, 0), False),
        (devices.Head(4, 1, "", 0, 1, 0), False),
        (devices.Head(4, 1, "t\x01", 0, 1, 0), False),
        (devices.Head(4, 1, "tämer", 0, 1, 0), False),
    ],
)
def test_plausible_heads(head: devices.Head, plausible: bool) -> None:
    assert head.is_plausible == plausible


def test_a_search_over_too_many_bytes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section after section begins and none has an end: each would search all that follows."""
    monkeypatch.setattr(limits, "FOOTER_SEARCH_BYTES_MAX", 10_000)
    lies = b"".join(join([SectionFooter(1)]) + b"\x04\x00\x00\x09%c\x01x" % each + bytes(8) for each in range(50))
    data = b"\x04\x00\x00\x00\x01\x01a" + bytes(8) + lies + bytes(2000)
    with pytest.raises(WireError) as caught:
        bodies(data, is_package=True)
    assert caught.value.reason == "devices-search"


# --- early sections -----------------------------------------------------------------------------------------

EARLY = DeviceSection(1, "mem-early", 0, 1, b"\x7e\x00\x00\x00\x01\x05" + bytes(6), early=True)


@pytest.mark.parametrize("behind", [[SectionStart(2, "ram", 0, 4)], device(3, "b", b""), [Ping(1)]])
def test_an_early_section_ends_before_something_plausible(behind: list[Event]) -> None:
    data = join([EARLY, SectionFooter(1)])
    end = len(data) - 5
    data += join(behind)
    found: object = 0
    searched = 0
    for length in range(len(data) + 1):
        found = devices.early_section(bytearray(data[:length]), searched, offset=0)
        if not isinstance(found, int):
            break
        searched = found
    assert found == (EARLY, end)


def test_an_early_section_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EARLY_SECTION_BYTES_MAX", 100)
    data = bytearray(join([EARLY])) + bytes(100)
    with pytest.raises(WireError) as caught:
        devices.early_section(data, 0, offset=0)
    assert caught.value.reason == "devices-early"


def test_a_package_command_is_known() -> None:
    assert devices.split_chain(join([Packaged(5)]), is_package=True, offset=0) is not None


def test_real_descriptions_need_the_right_size() -> None:
    events = devices_of_a_pc()
    described = description.parse(describe(events).text)
    assert described is not None
    data = join(events)
    assert devices.split_described(data, list(described.devices), footers=True) == sections(events)
    assert devices.split_described(data[:-1], list(described.devices), footers=True) is None
    assert devices.split_described(data + b"x", list(described.devices), footers=True) is None
