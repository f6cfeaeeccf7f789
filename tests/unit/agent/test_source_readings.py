"""What a source's attempt has read of QEMU, and how long that counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmferry.agent import source_act
from vmferry.agent.source import SourceAttempt
from vmferry.agent.wants import Wanted
from vmferry.clock import SystemClock
from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.core.view import Cpus, Source
from vmferry.errors import Unfit
from vmferry.jobs.journal import Entry


def an_attempt(**context: Any) -> SourceAttempt:
    """Of web1 from host-a to host-b, in an agent that has what is given."""
    machine = SimpleNamespace(is_gone=False, version=(11, 1), on_event=None, on_gone=None)
    agent = SimpleNamespace(
        clock=SystemClock(), publish=lambda *_: None, converge=lambda *_: None, config=SimpleNamespace(name="host-a"),
        **context,
    )  # fmt: skip
    wanted = Wanted(job="j1", vm="web1", destination="host-b", generation=2, wanted_s=1.0)
    return SourceAttempt(cast(Any, agent), wanted, cast(Any, SimpleNamespace(machine=machine, is_leaving=False)))


@pytest.mark.proves("S53", "S123")
async def test_cpus_that_were_seen_running_before_a_new_word_are_not_taken_for_running_after_it() -> None:
    """1. an agent begins anew and sees the guest run  2. the switchover comes  3. the grant is due: it must not be
    taken for a guest that runs although everything was given away."""
    attempt = an_attempt()
    attempt.note(Fact.STARTED)
    attempt.set_readings(source=Source.IDLE, cpus=Cpus.AS_BEFORE)
    attempt.hear_word("postcopy-active")
    assert (attempt.readings.source, attempt.readings.cpus) == (Source.POSTCOPY, Cpus.UNKNOWN)


@pytest.mark.proves("S17", "S53")
async def test_a_guest_that_dies_while_its_cancel_is_cleaned_up_is_not_said_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """1. cancelled, the guest runs, everything is given back  2. its QEMU dies before the last answer  3. the end."""
    journal = FakeJournal()
    attempt = an_attempt(job_directory=tmp_path, journal=journal, attempt_ended=lambda *_: None)
    for fact in (Fact.MIGRATE, Fact.STARTED, Fact.CANCEL, Fact.TARGET_GONE):
        attempt.note(fact)
    attempt.set_readings(source=Source.BACK, cpus=Cpus.AS_BEFORE)
    assert (attempt.row().do, attempt.row().outcome) == (Effect.CLEAN_UP, Outcome.SOURCE)

    async def dies(_: SourceAttempt) -> None:
        attempt.set_readings(source=Source.GONE)

    monkeypatch.setattr(source_act, "_restore_source", dies)
    await source_act.act(attempt, Effect.CLEAN_UP)
    assert attempt.outcome_at_end is Outcome.LOST
    assert journal.kinds == [Entry.ENDED]


class FakeJournal:
    """What was appended."""

    def __init__(self) -> None:
        self.kinds: list[Entry] = []

    async def append(self, kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        self.kinds.append(kind)


@pytest.mark.proves("S113", "S115")
async def test_a_full_disk_under_the_other_journal_is_told_with_its_side_and_its_remedy() -> None:
    async def call(command: str, question: dict[str, Any], *, deadline_s: float) -> dict[str, Any]:
        raise Unfit("the journal cannot be written: database or disk is full", hint="make room on the disk")

    attempt = an_attempt(peers=SimpleNamespace(link=lambda host: SimpleNamespace(call=call)))
    for fact in (Fact.MIGRATE, Fact.STARTED, Fact.COMMITTED, Fact.GRANT_SENT, Fact.LOADED):
        attempt.note(fact)
    with pytest.raises(Unfit) as told:
        await attempt.ask("peer-grant", deadline_s=1.0)
    assert told.value.side == "destination"
    attempt.on_trouble(Effect.SEND_GRANT, told.value)
    assert attempt.wire()["action"] == attempt.brief()["action"] == "make room on the disk"
    attempt.hear_target({"loaded": True})
    assert attempt.wire()["action"] != "make room on the disk"
