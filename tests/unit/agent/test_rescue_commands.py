"""What counts as proof that a guest may be had back, for each state of its migration."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmferry.agent import rescue_commands, rescue_feed
from vmferry.agent.agent import Agent
from vmferry.agent.claims import Claims
from vmferry.agent.rescue_commands import FeedArguments, RescueArguments, proof_for
from vmferry.core.facts import ROUNDED, Fact, FactLog
from vmferry.core.rescue import Evidence, Tool
from vmferry.core.view import Readings, Source
from vmferry.errors import Busy, RescueRefused, UnknownVm

COMMITTED = (Fact.PREPARE, Fact.STARTED, Fact.COMMITTED)
GRANTED = (*COMMITTED, Fact.GRANT_SENT)


@dataclass
class FakeWanted:
    destination: str = "host-b"
    multifd_channels: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class FakeAttempt:
    """As much of a `SourceAttempt` as the commands look at."""

    facts: FactLog
    readings: Readings = field(default_factory=Readings)
    vm: str = "web1"
    wanted: FakeWanted = field(default_factory=FakeWanted)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    is_held_back: bool = False
    refreshed: int = 0
    has_run_since: bool = False
    memory: Any = None
    machine: Any = field(default_factory=lambda: SimpleNamespace(is_gone=True, version=(11, 1, 0)))

    async def hold_back(self) -> None:
        self.is_held_back = True

    def go_on(self) -> None:
        self.is_held_back = False

    def refresh(self) -> None:
        assert not self.is_held_back
        self.refreshed += 1


class FakeAgent:
    """As much of an `Agent` as the commands look at."""

    def __init__(self, *facts: Fact, source: Source = Source.BROKEN) -> None:
        log = FactLog()
        for fact in facts:
            log = log.with_fact(fact, round_no=int(fact in ROUNDED), at_s=1.0, by="test")
        self.attempt = FakeAttempt(log, Readings(source=source))
        self.attempts = {"web1": self.attempt} if facts else {}
        self.config = SimpleNamespace(name="host-a")
        self.vms: dict[str, Any] = {}
        self.claims = Claims()
        self.saves = SimpleNamespace(active=lambda vm: None)
        self.restores = SimpleNamespace(active=lambda vm: None)
        self.published: list[tuple[str, dict[str, Any]]] = []

    def publish(self, name: str, data: dict[str, Any]) -> None:
        self.published.append((name, data))

    def add(self, fact: Fact) -> None:
        self.attempt.facts = self.attempt.facts.with_fact(fact, at_s=2.0, by="test")

    @property
    def agent(self) -> Agent:
        return cast(Agent, self)


@pytest.mark.proves("S41", "S55")
@pytest.mark.parametrize(
    ("facts", "bring_back", "throw_away"),
    [
        (COMMITTED, False, True),  # the right to run it there was never given
        ((*COMMITTED, Fact.TARGET_GONE), True, True),
        (GRANTED, False, False),  # it may have arrived
        ((*GRANTED, Fact.TARGET_GONE), True, True),
        ((*GRANTED, Fact.START_REFUSED), False, False),  # its QEMU is still there
        ((*GRANTED, Fact.RUN_ACKED), False, False),
        ((*GRANTED, Fact.RUN_ACKED, Fact.TARGET_DIED), False, False),  # it ran
    ],
)
def test_facts_are_the_proof_whatever_a_person_says(
    facts: tuple[Fact, ...], bring_back: bool, throw_away: bool
) -> None:
    for never_ran in (False, True):
        agent = FakeAgent(*facts).agent
        for tool, allowed in ((Tool.BRING_BACK, bring_back), (Tool.THROW_AWAY, throw_away)):
            assert (proof_for(agent, "web1", tool, never_ran=never_ran).objection() == "") is allowed, tool


def test_a_proof_falls_with_its_facts() -> None:
    made = FakeAgent(*COMMITTED)
    throw_away = proof_for(made.agent, "web1", Tool.THROW_AWAY, never_ran=False)
    assert throw_away.evidence is Evidence.NEVER_GRANTED
    assert throw_away.objection() == ""
    made.add(Fact.GRANT_SENT)
    assert throw_away.objection() != ""
    bring_back = proof_for(made.agent, "web1", Tool.BRING_BACK, never_ran=False)
    assert bring_back.objection() != ""
    made.add(Fact.TARGET_GONE)
    assert bring_back.objection() == ""


def test_without_a_migration_a_person_must_say_it() -> None:
    made = FakeAgent()
    with pytest.raises(RescueRefused, match="nothing proves") as refused:
        proof_for(made.agent, "web1", Tool.BRING_BACK, never_ran=False)
    assert "--never-ran" in refused.value.hint
    assert proof_for(made.agent, "web1", Tool.BRING_BACK, never_ran=True).evidence is Evidence.PERSON
    ended = FakeAgent(*COMMITTED)
    ended.attempt.ended.set()
    with pytest.raises(RescueRefused):
        proof_for(ended.agent, "web1", Tool.THROW_AWAY, never_ran=False)


async def test_while_a_tool_is_at_work_the_table_rests_and_nobody_else_begins() -> None:
    made = FakeAgent(*COMMITTED)
    async with rescue_commands.at_work(made.agent, "web1") as tell:
        assert made.attempt.is_held_back
        tell({"bytes": 1})
        with pytest.raises(Busy, match="rescued"):
            async with rescue_commands.at_work(made.agent, "web1"):
                pass
        assert made.attempt.is_held_back
    assert (made.attempt.is_held_back, made.attempt.refreshed) == (False, 1)
    assert made.published == [("RESCUE", {"vm": "web1", "bytes": 1})]


@pytest.mark.parametrize(("register", "words"), [("saves", "being saved"), ("restores", "being restored")])
async def test_a_guest_that_a_save_or_a_restore_has_in_hand_is_not_rescued(register: str, words: str) -> None:
    """A guest that lacks pages is led nowhere: its restore brings them."""
    made = FakeAgent(*COMMITTED)
    getattr(made, register).active = lambda vm: SimpleNamespace(job="1f" * 16)
    with pytest.raises(Busy, match=words):
        async with rescue_commands.at_work(made.agent, "web1"):
            pass
    assert not made.attempt.is_held_back


async def test_a_vm_that_is_not_here_is_unknown() -> None:
    with pytest.raises(UnknownVm):
        await rescue_commands.bring_back(FakeAgent().agent, RescueArguments(vm="web1"))


@pytest.mark.parametrize(
    ("facts", "source", "text"),
    [
        ((), Source.BROKEN, "no migration"),
        (GRANTED, Source.GONE, "nobody there waits"),
        ((*GRANTED, Fact.RUN_ACKED), Source.POSTCOPY, "still serves"),
        ((*GRANTED, Fact.RUN_ACKED), Source.DONE, "still serves"),
    ],
)
async def test_nobody_is_fed_who_is_served_or_does_not_run(facts: tuple[Fact, ...], source: Source, text: str) -> None:
    with pytest.raises(RescueRefused, match=text):
        await rescue_commands.feed(FakeAgent(*facts, source=source).agent, FeedArguments(vm="web1"))


@pytest.mark.parametrize(
    ("ran", "text", "guest"), [(True, "has run since the switchover", "unknown"), (False, "nothing of its", "lost")]
)
async def test_a_source_that_ran_again_before_it_died_feeds_nobody(ran: bool, text: str, guest: str) -> None:
    """Its file is still there, and holds what another copy of the guest wrote."""
    made = FakeAgent(*GRANTED, Fact.RUN_ACKED, source=Source.GONE)
    made.attempt.has_run_since = ran
    made.attempt.memory = object() if ran else None
    with pytest.raises(RescueRefused, match=text) as caught:
        await rescue_commands.feed(made.agent, FeedArguments(vm="web1"))
    assert caught.value.guest == guest


@pytest.mark.parametrize(
    ("wanted", "text"),
    [(FakeWanted(multifd_channels=2), "multifd"), (FakeWanted(options={"postcopy-preempt": True}), "postcopy-preempt")],
)
async def test_between_hosts_a_destination_that_waits_for_several_connections_is_not_fed(
    wanted: FakeWanted, text: str
) -> None:
    made = FakeAgent(*GRANTED, Fact.RUN_ACKED, source=Source.GONE)
    made.attempt.wanted = wanted
    with pytest.raises(RescueRefused, match=f"with {text} its destination"):
        await rescue_commands.feed(made.agent, FeedArguments(vm="web1"))


def test_the_likeliest_number_of_ram_s_section_comes_first() -> None:
    assert rescue_feed.sections_to_try((7, 2))[0] == 2
    assert rescue_feed.sections_to_try((9, 0))[0] == 2
    for newer in ((9, 1), (11, 1), None, (0, 0)):
        assert rescue_feed.sections_to_try(newer)[0] == 1
    assert {len(set(rescue_feed.sections_to_try(each))) for each in ((7, 2), None)} == {4}


def test_an_agent_at_rest_has_neither_numpy_nor_the_endpoints() -> None:
    """They would take half of the memory that an agent may use."""
    program = (
        "import sys, vmferry.agent.agent; print([m for m in sys.modules if m.startswith(('numpy', 'vmferry.engine'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
