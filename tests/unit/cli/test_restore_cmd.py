"""`vmferry restore`: when it has waited long enough."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.cli.restore_cmd import _is_there


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ({"resume_ms": None, "paused": False, "detail": "running-lazily"}, False),
        ({"resume_ms": 12.0, "paused": False, "detail": "running-lazily"}, True),
        ({"resume_ms": None, "paused": True, "detail": "loaded"}, False),
        ({"resume_ms": None, "paused": True, "detail": "running-lazily"}, True),
    ],
)
def test_a_guest_that_is_to_stay_paused_is_not_waited_for(wire: dict[str, Any], expected: bool) -> None:
    assert _is_there(wire) == expected
