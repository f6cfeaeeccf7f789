"""Which local disks go with a guest, and everything that speaks against it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vmferry.core import disks
from vmferry.core.disk_reports import DiskReport, DiskUse, LocalDisk, RoomReport
from vmferry.core.disks import Choice
from vmferry.core.preflight import Weight
from vmferry.errors import UsageError
from vmferry.units import GIB

DISK = LocalDisk(id="disk0", path="/d/web.img", node="disk0", format="raw", virtual_bytes=8 * GIB, allocated_bytes=GIB)
ROOM = RoomReport(path="/copies/web.img", folder="/copies", exists=False, folder_writable=True,
                  free_bytes=4 * GIB, filesystem="7")  # fmt: skip
FOUR = (
    Choice("disk0", "/a", readonly=False, shared=False),
    Choice("disk1", "/b", readonly=False, shared=True),
    Choice("disk2", "/c", readonly=True, shared=False),
    Choice("disk3", "/d", readonly=False, shared=False),
)


def codes(disk: LocalDisk = DISK, room: RoomReport | None = ROOM, *, from_spec: bool = True) -> list[str]:
    rooms = {} if room is None else {disk.path: room}
    found = disks.objections("host-a", "host-b", [disk], rooms, from_spec=from_spec)
    assert all(o.weight is Weight.BLOCKER and o.fix for o in found)
    return [objection.code for objection in found]


def ids(wanted: dict[str, str]) -> list[str]:
    return [disk.id for disk in disks.choose(FOUR, wanted)]


def test_what_is_said_on_the_command_line() -> None:
    assert disks.parse(None, []) == {}
    assert disks.parse("copy", ["disk1=shared", "disk2=copy"]) == {"*": "copy", "disk1": "shared", "disk2": "copy"}
    for each in ("disk1", "disk1=move"):
        with pytest.raises(UsageError, match="say copy or shared"):
            disks.parse(None, [each])
    with pytest.raises(UsageError, match="'move'"):
        disks.parse("move", [])


def test_ids_follow_the_order_of_the_definition() -> None:
    assert list(disks.ids(["/a", "/b"])) == [("disk0", "/a"), ("disk1", "/b")]


def test_all_means_those_that_are_local_and_can_be_written() -> None:
    assert ids({}) == []
    assert ids({"*": "shared"}) == []
    assert ids({"*": "copy"}) == ["disk0", "disk3"]
    assert ids({"*": "copy", "disk3": "shared"}) == ["disk0"]
    assert ids({"disk1": "copy"}) == ["disk1"], "by its name any disk that can be written"


def test_a_disk_that_is_not_there_or_read_only_is_said_to_be_so() -> None:
    with pytest.raises(UsageError, match="no disk disk9; it has disk0, disk1"):
        disks.choose(FOUR, {"disk9": "copy"})
    with pytest.raises(UsageError, match="it has none"):
        disks.choose((), {"disk9": "copy"})
    with pytest.raises(UsageError, match="read-only"):
        disks.choose(FOUR, {"disk2": "copy"})


def test_nothing_speaks_against_a_plain_disk_with_room() -> None:
    assert codes() == []
    assert codes(replace(DISK, format="qcow2")) == []
    assert codes(room=replace(ROOM, free_bytes=None)) == [], "what is not known is left to the copy itself"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"backing": "/base.qcow2"}, "disk-copy-backing"),
        ({"format": "vmdk"}, "disk-copy-format"),
        ({"extras": ("snapshots inside",)}, "disk-copy-extra"),
        ({"is_device": True}, "disk-copy-device"),
    ],
)
def test_what_cannot_be_copied_is_refused_in_words(change: dict[str, Any], code: str) -> None:
    assert codes(replace(DISK, **change)) == [code]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"exists": True}, "disk-copy-exists"),
        ({"folder_writable": False}, "disk-copy-folder"),
        ({"free_bytes": GIB}, "disk-copy-room"),
    ],
)
def test_what_is_wrong_with_the_place(change: dict[str, Any], code: str) -> None:
    assert codes(room=replace(ROOM, **change)) == [code]


def test_only_bytes_can_be_compared() -> None:
    for format, expected in (("raw", []), ("qcow2", ["disk-verify-format"])):
        disk = replace(DISK, format=format)
        found = disks.objections("a", "b", [disk], {DISK.path: ROOM}, from_spec=True, verify=True)
        assert [o.code for o in found] == expected


def test_only_images_that_are_more_than_their_bytes_need_a_tool() -> None:
    without = replace(ROOM, has_tool=False)
    assert codes(room=without) == []
    assert codes(replace(DISK, format="qcow2"), without) == ["disk-copy-tool"]


def test_silence_about_room_and_a_guest_of_somebody_else_block() -> None:
    assert codes(room=None) == ["disk-copy-unreported"]
    assert codes(from_spec=False) == ["disk-copy-adopted"]


def test_disks_share_the_room_of_a_file_system_and_cannot_share_a_name() -> None:
    second = replace(DISK, id="disk1", path="/e/web.img", allocated_bytes=3 * GIB)
    elsewhere = replace(ROOM, filesystem="8", path="/other/web.img")
    same = {DISK.path: ROOM, second.path: ROOM}
    found = disks.objections("a", "b", [DISK, second], same, from_spec=True)
    assert [o.code for o in found] == ["disk-copy-name", "disk-copy-room"]
    assert "disk0 and disk1" in found[0].message
    apart = {DISK.path: ROOM, second.path: elsewhere}
    assert disks.objections("a", "b", [DISK, second], apart, from_spec=True) == ()


def test_the_note_says_what_how_large_and_where_to() -> None:
    (note,) = disks.remarks([DISK, replace(DISK, path="/unreported")], {DISK.path: ROOM})
    assert note.weight is Weight.NOTE
    assert all(word in note.message for word in ("/d/web.img", "raw", "8", "/copies/web.img"))


def test_reports_are_values() -> None:
    assert DiskReport(exists=True) == DiskReport(exists=True)
    assert DiskUse("/a") == DiskUse("/a", read_only=False)
