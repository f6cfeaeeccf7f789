"""Effects and their guards: the last look before the hand acts."""

from __future__ import annotations

import pytest

from vmferry.core.effects import DESTINATION_GUARDS, SOURCE_GUARDS, DestinationEffect, Effect, Guard
from vmferry.core.view import DestinationView, Halt, Held, Incoming, Ran, Served, Wish
from vmferry.testing.tables import Views

VIEW = DestinationView(Wish.KEEP, Held.YES, Incoming.LOADED, Ran.NO, Halt.NONE)


def test_every_effect_of_both_sides_has_a_guard() -> None:
    assert set(SOURCE_GUARDS) == set(Effect)
    assert set(DESTINATION_GUARDS) == set(DestinationEffect)
    assert all(SOURCE_GUARDS.values())
    assert all(DESTINATION_GUARDS.values())


def test_a_guard_allows_when_every_guarded_question_is_within_bounds() -> None:
    guard = Guard({"held": frozenset({Held.YES}), "ran": frozenset({Ran.NO, Ran.UNKNOWN})})
    assert guard.allows(VIEW)
    assert not guard.allows(DestinationView(Wish.KEEP, Held.NO, Incoming.LOADED, Ran.NO, Halt.NONE))
    assert Guard({}).allows(VIEW)


@pytest.mark.parametrize("effect", DestinationEffect)
def test_every_guard_allows_some_view_and_refuses_another(effect: DestinationEffect) -> None:
    views = Views(DestinationView)
    assert 0 < views.allowed(DESTINATION_GUARDS[effect]) < views.all


def test_cpus_start_under_one_guard_only() -> None:
    (guard,) = DESTINATION_GUARDS[DestinationEffect.START_CPUS]
    assert guard.allowed == {
        "wish": frozenset({Wish.KEEP}),
        "held": frozenset({Held.YES}),
        "incoming": frozenset({Incoming.LOADED}),
        "ran": frozenset({Ran.NO}),
        "served": frozenset({Served.NO}),
    }
