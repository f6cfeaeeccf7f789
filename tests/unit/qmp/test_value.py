"""Values compare and refuse as frozen dataclasses do."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.qmp.value import Value


class Point(Value):
    x: int
    y: int = 7


class Other(Value):
    x: int
    y: int = 7


def test_fields_come_by_place_by_name_or_by_default() -> None:
    assert (Point(1, 2).x, Point(1, 2).y) == (1, 2)
    assert Point(1) == Point(1, 7) == Point(y=7, x=1)
    match Point(3):
        case Point(x, y):
            assert (x, y) == (3, 7)


def test_equality_is_by_type_and_fields() -> None:
    assert Point(1) != Point(2)
    assert Point(1) != Other(1)
    assert Point(1) != (1, 7)
    assert hash(Point(1)) == hash(Point(1, 7))
    assert repr(Point(1)) == "Point(x=1, y=7)"


@pytest.mark.parametrize(("places", "names"), [((), {}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"z": 1})])
def test_wrong_fields_are_refused(places: tuple[Any, ...], names: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="Point"):
        Point(*places, **names)


def test_nothing_changes_afterwards() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del point.x
    assert point == Point(1)
