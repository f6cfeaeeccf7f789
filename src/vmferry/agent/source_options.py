"""Options of QEMU that are changed while a migration runs: what QEMU is told, what is remembered of it.

What a person chose is the job's from then on, not only QEMU's: the journal has it, and whatever sets such an option
later (the pace after a postcopy was held back, the disks' shares after an agent began anew) sets the newest value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmferry.agent import source_disks, way_back
from vmferry.core.view import are_pages_held_back
from vmferry.jobs.journal import Entry

if TYPE_CHECKING:
    from vmferry.agent.source import SourceAttempt


async def change(attempt: SourceAttempt, values: Mapping[str, Any]) -> None:
    """These options, by QEMU's names, which their windows allow. Raises QemuError: nothing is changed then; Unfit: QEMU
    has them, and an agent that begins anew does not know.

    A postcopy may be held back, so that the destination has run before the last page goes:

    1. the pages are held back  2. a person wants another pace  3. QEMU told at once would send all of them: the pace is
    remembered, and QEMU told when the destination has run (`way_back.let_pages_go`)
    """
    held = {name: values[name] for name in values if name == way_back.PACE and are_pages_held_back(attempt.facts)}
    await _tell(attempt, {name: value for name, value in values.items() if name not in held})
    await attempt.context.journal.append(Entry.OPTIONS, attempt.job, dict(values))
    attempt.wanted = replace(attempt.wanted, options={**attempt.wanted.options, **values})
    if held and not are_pages_held_back(attempt.facts):  # let go while that was written
        await _tell(attempt, held)


async def _tell(attempt: SourceAttempt, values: Mapping[str, Any]) -> None:
    if not values:
        return
    told = dict(values)
    if source_disks.BANDWIDTH in told:
        told[source_disks.BANDWIDTH] = source_disks.memory_share(attempt, int(told[source_disks.BANDWIDTH]))
    await attempt.machine.execute("migrate-set-parameters", told)
    if source_disks.BANDWIDTH in told:
        await source_disks.change_speed(attempt, int(values[source_disks.BANDWIDTH]))
