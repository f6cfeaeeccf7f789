"""What becomes of each command of a monitor's client."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.core.blockers import Operation
from vmferry.core.monitor_fates import (
    JOBS_PASS,
    LINES_PASS,
    NEVER,
    OURS,
    PASSES,
    Fate,
    fate,
    line_word,
    operation,
    own_names,
)

GRAPH = """
    block-commit block-stream blockdev-mirror drive-mirror blockdev-backup drive-backup blockdev-snapshot
    blockdev-snapshot-sync blockdev-snapshot-internal-sync blockdev-snapshot-delete-internal-sync blockdev-reopen
    blockdev-add blockdev-del blockdev-create blockdev-change-medium blockdev-insert-medium blockdev-remove-medium
    blockdev-open-tray blockdev-close-tray eject x-blockdev-change x-blockdev-set-iothread x-blockdev-amend
    blockdev-set-active change-backing-file block_resize transaction block-job-cancel block-job-complete
    block-job-finalize block-job-change block-export-add block-export-del nbd-server-start nbd-server-add
    nbd-server-remove nbd-server-stop block-dirty-bitmap-add block-dirty-bitmap-clear block-dirty-bitmap-disable
    block-dirty-bitmap-enable block-dirty-bitmap-merge block-dirty-bitmap-remove
"""
"""Commands of QEMU 7.2 and 11.1 that change what the guest writes to, or what counts and copies it."""
MACHINE = """
    cont stop quit system_powerdown system_reset system_wakeup snapshot-save snapshot-load snapshot-delete
    dump-guest-memory device_add device_del netdev_add netdev_del object-add object-del chardev-change chardev-remove
    qom-set set-action watchdog-set-action yank closefd x-exit-preconfig
"""


def test_each_command_has_one_fate() -> None:
    assert not OURS & PASSES
    assert not (OURS | PASSES) & NEVER.keys()
    assert {fate(name, {})[0] for name in OURS} == {Fate.OURS}
    assert {fate(name, {})[0] for name in PASSES} == {Fate.PASSED}
    assert all(fate(name, {}) == (Fate.NEVER, why) for name, why in NEVER.items())
    assert fate("query-block", {}) == fate("x-query-virtio", {}) == (Fate.PASSED, "")
    assert JOBS_PASS < OURS


@pytest.mark.parametrize("name", [*GRAPH.split(), *MACHINE.split(), "a-command-of-a-qemu-to-come"])
def test_what_changes_the_guest_or_its_disks_waits_until_it_has_arrived(name: str) -> None:
    assert fate(name, {}) == (Fate.HELD, "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("info status", Fate.PASSED),
        ("info block -v", Fate.PASSED),
        ("x/10i $pc", Fate.PASSED),
        (" help migrate", Fate.PASSED),
        ("", Fate.PASSED),
        *((line, Fate.HELD) for line in ("cont", " c ", "s", "stop", "q", "quit", "quit/x", "loadvm x", "savevm x")),
        *((f"{word} d0", Fate.HELD) for word in (
            "delvm", "commit", "snapshot_blkdev", "snapshot_blkdev_internal", "snapshot_delete_blkdev_internal",
            "block_job_complete", "block_job_cancel", "block_stream", "block_resize", "drive_del", "drive_add",
            "drive_backup", "drive_mirror", "change", "eject", "qemu-io", "device_del", "qom-set", "system_powerdown",
            "system_reset", "nbd_server_stop", "closefd", "object_del", "a_word_of_a_qemu_to_come",
        )),
        ("migrate -d tcp:h:1", Fate.NEVER),
        ("migrate_set_parameter downtime-limit 3", Fate.NEVER),
        ("block_job_cancel vmferry-9a-disk0", Fate.NEVER),
        ("info vmferry-9a", Fate.PASSED),
    ],
)  # fmt: skip
def test_a_line_for_people_is_no_way_around(line: str, expected: Fate) -> None:
    assert fate("human-monitor-command", {"command-line": line})[0] is expected
    assert fate("human-monitor-command", {})[0] is Fate.PASSED


def test_a_lines_word_is_what_qemu_takes_for_it() -> None:
    assert [line_word(line) for line in ("", "  ", "info", "\tx/4xb 0", "quit/now", "p $pc")] == [
        "", "", "info", "x", "quit", "p",
    ]  # fmt: skip
    assert all(line_word(word) == word for word in LINES_PASS)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((f"block-job-{verb}", {"device": "vmferry-9a-disk0"}) for verb in
          ("cancel", "complete", "pause", "resume", "set-speed", "finalize", "dismiss")),
        ("block-job-change", {"id": "vmferry-9a-disk0", "type": "mirror"}),
        ("blockdev-del", {"node-name": "vmferry-9a-t1"}),
        ("block-export-del", {"id": "vmferry-9a-disk0"}),
        ("object-del", {"id": "vmferry-tls-9a"}),
        ("blockdev-add", {"driver": "raw", "node-name": "x", "file": {"driver": "raw", "file": "vmferry-9a-t1"}}),
        *((f"block-dirty-bitmap-{verb}", {"node": "disk0", "name": "vmferry-since:9a:b"}) for verb in
          ("add", "clear", "disable", "enable")),
        ("block-dirty-bitmap-merge", {"node": "disk0", "target": "vmferry-since:9a:b", "bitmaps": ["mine"]}),
        ("block-dirty-bitmap-remove", {"node": "vmferry-9a-t1r", "name": "round"}),
        ("blockdev-backup", {"device": "disk0", "target": "t", "sync": "bitmap", "bitmap": "vmferry-since:9a:b"}),
        ("blockdev-reopen", {"options": [{"node-name": "vmferry-9a-f1"}]}),
        ("transaction", {"actions": [
            {"type": "abort", "data": {}},
            {"type": "block-dirty-bitmap-clear", "data": {"node": "disk0", "name": "vmferry-since:9a:b"}},
        ]}),
    ],
)  # fmt: skip
def test_what_vmferry_has_made_nobody_else_changes(name: str, arguments: dict[str, Any]) -> None:
    found, why = fate(name, arguments)
    assert found is Fate.NEVER
    assert next(own_names(name, arguments)) in why


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("block-dirty-bitmap-remove", {"node": "disk0", "name": "vmferry-since:9a:b"}),
        ("block-dirty-bitmap-merge", {"node": "disk0", "target": "mine", "bitmaps": ["vmferry-since:9a:b"]}),
        ("block-job-cancel", {"device": "mine"}),
        ("transaction", {"actions": [{"type": "abort"}, 7, {"type": "drive-backup", "data": {"device": "disk0"}}]}),
        ("transaction", {"actions": "none"}),
        ("blockdev-snapshot-sync", {"device": "disk0", "snapshot-file": "/backup/vmferry-1.qcow2"}),
    ],
)  # fmt: skip
def test_what_is_a_clients_own_passes_when_the_guest_is_not_on_its_way(name: str, arguments: dict[str, Any]) -> None:
    assert fate(name, arguments) == (Fate.HELD, "")
    assert fate("block-job-pause", {"device": "mine"}) == (Fate.PASSED, "")


def test_names_are_read_wherever_a_command_has_them() -> None:
    nested = {"a": [{"b": ["vmferry-1", 2, None]}], "c": "vmferry-3", "d": "not-vmferry-4"}
    assert list(own_names("anything", nested)) == ["vmferry-1", "vmferry-3"]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        *((name, {}, Operation.STOP) for name in ("quit", "system_powerdown")),
        *((name, {}, Operation.SNAPSHOT) for name in
          ("snapshot-save", "blockdev-snapshot", "blockdev-snapshot-sync", "blockdev-snapshot-internal-sync")),
        *(("human-monitor-command", {"command-line": line}, Operation.STOP) for line in
          ("q", "quit", " system_powerdown")),
        *(("human-monitor-command", {"command-line": line}, Operation.SNAPSHOT) for line in
          ("savevm x", "snapshot_blkdev d /x", "snapshot_blkdev_internal d x")),
        ("transaction", {"actions": [{"type": "abort"}, {"type": "blockdev-snapshot"}]}, Operation.SNAPSHOT),
        ("transaction", {"actions": [{"type": "blockdev-backup"}, 7]}, None),
        ("transaction", {}, None),
        ("stop", {}, None),
        ("human-monitor-command", {"command-line": "info snapshots"}, None),
    ],
)  # fmt: skip
def test_what_people_can_hold_against_a_command(
    name: str, arguments: dict[str, Any], expected: Operation | None
) -> None:
    assert operation(name, arguments) is expected
    assert expected is None or fate(name, arguments)[0] is Fate.HELD, "only those are asked about"
