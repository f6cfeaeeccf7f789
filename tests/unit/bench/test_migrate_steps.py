"""The steps of a migration, as the bench tells them."""

from __future__ import annotations

from typing import Any

from vmferry.bench.migrate import _steps


def timeline(**at_ms: float) -> list[dict[str, Any]]:
    return [{"what": what.replace("_", " "), "at_ms": at} for what, at in at_ms.items()]


def test_what_comes_after_the_stop_is_told_from_the_stop_on() -> None:
    rounds = [
        timeline(migrate=1, STOP_on_the_source=100, continue_=105),
        timeline(migrate=2, STOP_on_the_source=300, continue_=304),
        timeline(migrate=4, STOP_on_the_source=200, continue_=209),
    ]
    assert _steps(rounds) == {"migrate": 2.0, "STOP on the source": 200.0, "continue ": 205.0}


def test_a_round_without_a_stop_is_told_from_its_start() -> None:
    assert _steps([timeline(migrate=1, cleanup=9)]) == {"migrate": 1.0, "cleanup": 9.0}
