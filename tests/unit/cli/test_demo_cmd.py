"""What the demo asks of its agents."""

from __future__ import annotations

import pytest

from vmferry.cli.parser import build_parser
from vmferry.demo.run import DemoWish


@pytest.mark.parametrize("mode", ["auto", "precopy", "postcopy"])
@pytest.mark.parametrize("clear_text", [False, True])
def test_the_migration_is_in_the_mode_that_was_asked_for(mode: str, clear_text: bool) -> None:
    words = DemoWish(mode=mode, clear_text=clear_text, memory="256M", dirty_mib_per_s=20, as_json=True).words()
    wish = build_parser().parse_args(["migrate", "demo", "host-b", *words])
    assert (wish.mode, wish.clear_text) == (mode, clear_text)


def test_a_postcopy_is_not_over_after_its_first_pass() -> None:
    wish = DemoWish(mode="postcopy", clear_text=False, memory="256M", dirty_mib_per_s=20, as_json=True)
    assert "downtime-limit=1ms" in wish.words()
