"""What a save says at its end."""

from __future__ import annotations

import io
from typing import Any

import pytest

from vmferry.cli import snapshot_cmd
from vmferry.cli.render import ProgressLine


@pytest.mark.parametrize("error", [None, {"message": "the store is full"}], ids=["saved", "failed after its disks"])
def test_the_last_lines_say_what_belongs_into_the_spec(error: dict[str, Any] | None) -> None:
    """Whoever starts the guest again from its old spec starts it on its old disk."""
    wire = {"timeline": [], "notes": [], "pages": 8, "stored_bytes": 4096, "error": error,
            "goes_on_in": {"/d/web1.img": "/d/web1-disk0.one.qcow2"}}  # fmt: skip
    lines = list(snapshot_cmd._end_lines(wire))
    assert any("/d/web1.img stays" in line for line in lines)
    assert any('path = "/d/web1-disk0.one.qcow2", format = "qcow2"' in line for line in lines)


def test_the_last_lines_say_where_the_copies_are() -> None:
    wire = {"timeline": [], "notes": [], "pages": 8, "stored_bytes": 4096, "error": None,
            "copies": {"/d/web1.img": "/d/web1-disk0.one.stored.qcow2"}}  # fmt: skip
    lines = list(snapshot_cmd._end_lines(wire))
    assert "  /d/web1.img was copied to /d/web1-disk0.one.stored.qcow2; the guest goes on in /d/web1.img" in lines


def test_a_save_that_copies_disks_says_so_once() -> None:
    stream = io.StringIO()
    line = ProgressLine("web1", enabled=True, stream=stream)
    brief = {"status": "active", "outcome": "pending", "copying": {"done_bytes": 1, "whole_bytes": 4}}
    for more in ({}, {"copying": {"done_bytes": 2, "whole_bytes": 4}}, {"copying": None}):
        line.show({**brief, **more})
    assert stream.getvalue() == "web1: active, its disks are on their way\nweb1: active\n"
