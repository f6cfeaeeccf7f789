"""What a save says at its end."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.cli import snapshot_cmd


@pytest.mark.parametrize("error", [None, {"message": "the store is full"}], ids=["saved", "failed after its disks"])
def test_the_last_lines_say_what_belongs_into_the_spec(error: dict[str, Any] | None) -> None:
    """Whoever starts the guest again from its old spec starts it on its old disk."""
    wire = {"timeline": [], "notes": [], "pages": 8, "stored_bytes": 4096, "error": error,
            "goes_on_in": {"/d/web1.img": "/d/web1-disk0.one.qcow2"}}  # fmt: skip
    lines = list(snapshot_cmd._end_lines(wire))
    assert any("/d/web1.img stays" in line for line in lines)
    assert any('path = "/d/web1-disk0.one.qcow2", format = "qcow2"' in line for line in lines)
