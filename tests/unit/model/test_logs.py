"""A log as an integer says the same as the log that it stands for: on random histories, for everybody who reads one."""

from __future__ import annotations

import random

import pytest

from vmferry.core.facts import ROUNDED, Fact, FactLog
from vmferry.core.status import cancel_refusal, destination_status, is_over, source_status
from vmferry.core.view import Incoming, Readings, destination_view, source_view
from vmferry.model import logs

UNREAD = {Fact.COLO}  # vmferry refuses to start it, and it stands for completed in one rule only


def history(rng: random.Random) -> list[tuple[Fact, int]]:
    """Facts in random order, as far as they can come so: rounds one after another, a lost link after the proof, and
    that after the package."""
    facts: list[tuple[Fact, int]] = [(Fact.MIGRATE, 0), (Fact.PREPARE, 0)]
    possible = [fact for fact in Fact if fact not in UNREAD]
    for fact in rng.sample(possible, rng.randrange(1, len(possible))):
        seen = {f for f, _ in facts}
        if fact is Fact.LINK_LOST and Fact.PACKAGE_LOADED not in seen:
            facts += [(Fact.PACKAGE_SENT, 0), (Fact.PACKAGE_LOADED, 0)]
        if fact in (Fact.PACKAGE_LOADED, Fact.POSTCOPY_ANNOUNCED) and Fact.PACKAGE_SENT not in seen:
            facts.append((Fact.PACKAGE_SENT, 0))
        rounds = range(1, rng.randrange(2, logs.ROUNDS_MAX + 1)) if fact in ROUNDED else (0,)
        facts += [(fact, round_no) for round_no in rounds]
    return facts


@pytest.mark.parametrize("seed", range(300))
def test_the_canonical_log_is_read_like_the_real_one(seed: int) -> None:
    real, mask = FactLog(), 0
    for fact, round_no in history(random.Random(seed)):
        if fact is Fact.CLEANUP and not {Fact.ERROR, Fact.CANCEL} & {entry.fact for entry in real}:
            continue  # it ends something
        real, mask = real.with_fact(fact, round_no=round_no), logs.with_fact(mask, fact, round_no)
        canonical = logs.log_of(mask)
        assert source_status(canonical) is source_status(real)
        assert cancel_refusal(canonical) == cancel_refusal(real)
        assert is_over(canonical) is is_over(real)
        assert source_view(canonical, Readings()) == source_view(real, Readings())
        for incoming in Incoming:
            assert destination_view(canonical, incoming) == destination_view(real, incoming)


def test_a_destinations_log_is_read_alike_too() -> None:
    real, mask = FactLog(), 0
    for fact in (Fact.PREPARE, Fact.LISTENING, Fact.HEADER_SEEN, Fact.LOADED, Fact.ALL_SENT, Fact.CLEANUP):
        real, mask = real.with_fact(fact), logs.with_fact(mask, fact)
        assert destination_status(logs.log_of(mask)) is destination_status(real)


def test_a_fact_twice_is_a_fact_once_and_names_are_for_people() -> None:
    once = logs.with_fact(0, Fact.MIGRATE)
    assert logs.with_fact(once, Fact.MIGRATE) == once
    assert logs.names(logs.with_fact(once, Fact.GRANTED, 2)) == ["migrate", "granted 2"]
    assert logs.last_round(logs.with_fact(once, Fact.GRANTED, 2), Fact.GRANTED) == 2


def test_more_rounds_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(logs.TooManyRounds):
        logs.with_fact(0, Fact.GRANTED, logs.ROUNDS_MAX + 1)
