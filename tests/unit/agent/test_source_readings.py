"""What a source's attempt has read of QEMU, and how long that counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmferry.agent.source import SourceAttempt
from vmferry.agent.wants import Wanted
from vmferry.clock import SystemClock
from vmferry.core.facts import Fact
from vmferry.core.view import Cpus, Source


@pytest.mark.proves("S53", "S123")
async def test_cpus_that_were_seen_running_before_a_new_word_are_not_taken_for_running_after_it() -> None:
    """1. an agent begins anew and sees the guest run  2. the switchover comes  3. the grant is due: it must not be
    taken for a guest that runs although everything was given away."""
    machine = SimpleNamespace(is_gone=False, version=(11, 1), on_event=None, on_gone=None)
    context = SimpleNamespace(clock=SystemClock(), publish=lambda *_: None, converge=lambda *_: None)
    wanted = Wanted(job="j1", vm="web1", destination="host-b", generation=2, wanted_s=1.0)
    attempt = SourceAttempt(cast(Any, context), wanted, cast(Any, SimpleNamespace(machine=machine)))
    attempt.note(Fact.STARTED)
    attempt.set_readings(source=Source.IDLE, cpus=Cpus.AS_BEFORE)
    attempt.hear_word("postcopy-active")
    assert (attempt.readings.source, attempt.readings.cpus) == (Source.POSTCOPY, Cpus.UNKNOWN)
