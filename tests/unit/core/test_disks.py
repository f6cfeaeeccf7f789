"""Which local disks go with a guest, and everything that speaks against it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vmferry.core import disks
from vmferry.core.disk_reports import DiskReport, DiskUse, LocalDisk, RoomReport, Since
from vmferry.core.disks import Choice
from vmferry.core.preflight import Weight
from vmferry.errors import UsageError
from vmferry.units import GIB, MIB

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


@pytest.mark.proves("S96", "S114")
def test_bitmaps_that_travel_and_disks_that_are_copied_do_not_go_together() -> None:
    found = disks.objections("a", "b", [DISK], {DISK.path: ROOM}, from_spec=True, takes_bitmaps=True)
    assert [(o.code, o.weight) for o in found] == [("disk-copy-bitmaps", Weight.BLOCKER)]
    assert "dirty-bitmaps" in found[0].fix


def test_a_plan_says_when_disks_go_in_clear_text() -> None:
    def noted(*, clear_text: bool) -> list[tuple[str, Weight]]:
        return [(o.code, o.weight) for o in disks.remarks([DISK], {DISK.path: ROOM}, clear_text=clear_text)]

    assert noted(clear_text=False) == [("disk-copy", Weight.NOTE)]
    assert noted(clear_text=True) == [("disk-copy", Weight.NOTE), ("disk-copy-clear-text", Weight.WARNING)]
    assert disks.remarks([], {}, clear_text=True) == ()


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


CAME = Since("vmferry-since:j1:host-b", "j1", "host-b", is_origin=True, changed_bytes=MIB)
TRIED = Since("vmferry-tried:j2:host-b", "j2", "host-b", is_origin=False, changed_bytes=2 * MIB)
THERE = replace(ROOM, exists=True, left_bytes=8 * GIB)


@pytest.mark.proves("S96", "S114")
def test_a_bitmaps_name_says_since_when_and_where_the_other_image_is() -> None:
    assert disks.parse_since(disks.since_name("j1", "host-b"), MIB) == CAME
    assert disks.parse_since(disks.tried_name("j2", "host-b"), 2 * MIB) == TRIED
    for strange in ("", "backup-1", "vmferry-since", "vmferry-since:j1", "vmferry-since::host-b", "other:j1:host-b"):
        assert disks.parse_since(strange, 0) is None, strange


@pytest.mark.proves("S114")
def test_a_try_counts_before_the_arrival_and_other_hosts_do_not() -> None:
    elsewhere = replace(TRIED, host="host-c")
    assert disks.since_for([CAME, elsewhere, TRIED], "host-b") == TRIED
    assert disks.since_for([CAME, elsewhere], "host-b") == CAME
    assert disks.since_for([elsewhere], "host-b") is None


@pytest.mark.proves("S96", "S114")
def test_an_image_that_was_left_there_is_written_to_and_no_other_one() -> None:
    disk = replace(DISK, since=CAME)
    assert codes(disk, THERE) == []
    assert codes(DISK, THERE) == ["disk-copy-exists"], "nobody counts what differs from it"
    assert codes(disk, replace(THERE, left_bytes=None)) == ["disk-copy-exists"], "somebody has touched it"
    assert codes(disk, replace(THERE, left_bytes=4 * GIB)) == ["disk-copy-exists"], "the disk has grown since"
    assert codes(replace(disk, format="qcow2"), replace(THERE, has_tool=False)) == [], "nothing is made"
    assert codes(disk, replace(THERE, free_bytes=MIB)) == [], "there is room for what changed"
    assert codes(disk, replace(THERE, free_bytes=MIB - 1)) == ["disk-copy-room"]


@pytest.mark.proves("S96", "S114")
def test_who_wants_only_changes_to_go_hears_what_would_go_as_a_whole() -> None:
    disk = replace(DISK, since=CAME)

    def found(room: RoomReport | None) -> list[str]:
        rooms = {} if room is None else {disk.path: room}
        objections = disks.objections("host-a", "host-b", [disk], rooms, from_spec=True, only_changes=True)
        return [objection.code for objection in objections]

    assert found(THERE) == []
    assert found(ROOM) == ["disk-not-left"]
    assert found(replace(THERE, left_bytes=None)) == ["disk-not-left"]
    assert found(None) == ["disk-copy-unreported"]


@pytest.mark.proves("S96")
def test_a_plan_says_how_much_is_sent() -> None:
    (whole,) = disks.remarks([DISK], {DISK.path: ROOM})
    assert "1.0 GiB are in use) is copied to /copies/web.img" in whole.message
    (changed,) = disks.remarks([replace(DISK, since=CAME)], {DISK.path: THERE})
    assert "1.0 MiB changed since both sides were equal) is sent to /copies/web.img" in changed.message
