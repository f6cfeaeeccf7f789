"""A small exploration: it is complete, repeats exactly, and a schedule that it finds can be followed again."""

from __future__ import annotations

import pytest

from vmferry.agent.observe import arrival, destination_findings, source_findings
from vmferry.core.facts import Fact
from vmferry.model import logs
from vmferry.model.explore import Explorer, NotReplayable, replay
from vmferry.model.rules import Rules
from vmferry.model.world import Setting

RULES = Rules(source_findings, destination_findings, arrival)
NO_FAULT = Setting("precopy", locks=False, faults=0, cancels=0)
STRAIGHT = (
    "source agent plans",
    "source agent asks for a place",
    "prepare arrives",
    "destination agent starts a paused QEMU",
    "destination agent offers the place",
    "source agent hears the answer to prepare",
    "source agent configures its QEMU",
    "source agent tells its QEMU to migrate",
    "the QEMUs shake hands",
)


@pytest.mark.proves("S2", "S19")
def test_a_precopy_without_a_fault_breaks_nothing_and_always_ends() -> None:
    result = Explorer(RULES, NO_FAULT).run()
    assert result.violations == []
    assert result.states > 1000
    assert result.settled > 0


def test_an_exploration_repeats_exactly() -> None:
    first, second = (Explorer(RULES, NO_FAULT).run() for _ in range(2))
    assert (first.states, first.transitions, first.depth) == (second.states, second.transitions, second.depth)


def test_a_schedule_can_be_followed_step_by_step() -> None:
    world, broken = replay(RULES, NO_FAULT, STRAIGHT)
    assert broken == []
    assert world.s_word == "active"
    assert logs.has(world.s_log, Fact.STARTED)


def test_a_step_that_is_not_possible_is_refused_with_what_is() -> None:
    with pytest.raises(NotReplayable, match=r"step 2, 'the QEMUs shake hands'.*source agent asks for a place"):
        replay(RULES, NO_FAULT, (STRAIGHT[0], "the QEMUs shake hands"))


@pytest.mark.deep
@pytest.mark.timeout(3600)
@pytest.mark.proves("S36", "S121", "S123")
def test_a_stream_that_breaks_while_the_agents_cannot_talk_breaks_nothing() -> None:
    """Two faults, as one of them leaves the agents their link: a million states, in minutes."""
    apart = Setting("postcopy", locks=False, faults=2, cancels=0, kinds=frozenset({"network", "stream"}))
    result = Explorer(RULES, apart).run()
    assert result.violations == []
    assert result.settled > 0
