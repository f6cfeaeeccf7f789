"""The log of facts that become true once."""

from __future__ import annotations

from enum import StrEnum

from vmferry.core.once import OnceEntry, OnceLog


class Thing(StrEnum):
    BEGUN = "begun"
    OVER = "over"


def test_a_fact_is_recorded_once_with_what_was_said_first() -> None:
    empty = OnceLog[Thing]()
    log = empty.with_fact(Thing.BEGUN, text="now", at_s=7.0, by="person")
    assert log.entries == (OnceEntry(Thing.BEGUN, "now", 7.0, "person"),)
    assert log.with_fact(Thing.BEGUN, text="again") is log
    assert (Thing.BEGUN in log, Thing.OVER in log, Thing.BEGUN in empty) == (True, False, False)
    assert log.entry(Thing.BEGUN) == log.entries[0]
    assert log.entry(Thing.OVER) is None
    assert [entry.fact for entry in log.with_fact(Thing.OVER).entries] == [Thing.BEGUN, Thing.OVER]
