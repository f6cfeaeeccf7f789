"""A handful of the mutants, each caught; the whole set is `make model`. The set itself: names, number, no doubles."""

from __future__ import annotations

import pytest

from vmferry.agent.observe import arrival, destination_findings, source_findings
from vmferry.model.campaign import run_mutant
from vmferry.model.explore import replay
from vmferry.model.mutants import LEFT_OUT, MUTANTS, NOT_SHOWN
from vmferry.model.rules import Rules
from vmferry.model.world import Setting

RULES = Rules(source_findings, destination_findings, arrival)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("the destination is not started paused", "I4"),
        ("M-memory does retire-source", "I2"),
        ("C-commit does send-grant", "I4"),
        ("P-configure does nothing", "L2"),
        ("an order is not needed", "L2"),
    ],
)
@pytest.mark.proves("S36", "S55")
def test_a_mutant_is_caught_by_what_it_breaks_and_its_schedule_can_be_replayed(name: str, what: str) -> None:
    mutant = BY_NAME[name]
    caught = run_mutant(RULES, mutant)
    assert caught.violation is not None
    assert caught.violation.what.startswith(what)
    setting = next(s for s in mutant.settings if s.name == caught.violation.setting)
    _, broken = replay(mutant.of(RULES), setting, caught.violation.schedule)
    if caught.violation.what[0] == "I":
        assert caught.violation.what in broken
        assert caught.violation.what not in replay_without(caught.violation.schedule[:-1], mutant.of(RULES), setting)


def replay_without(schedule: tuple[str, ...], rules: Rules, setting: Setting) -> list[str]:
    return replay(rules, setting, schedule)[1]


def test_there_are_thirty_and_more_and_no_two_of_a_name() -> None:
    assert len(MUTANTS) >= 30
    assert len(BY_NAME) == len(MUTANTS)
    assert not ({name for name, _ in LEFT_OUT} | {mutant.name for mutant, _ in NOT_SHOWN}) & set(BY_NAME)
