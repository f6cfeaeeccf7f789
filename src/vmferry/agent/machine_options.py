"""The migration options that a QEMU has: read, remembered before they are set, set and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from vmferry.core.options import differences
from vmferry.errors import QemuError
from vmferry.jobs.journal import Entry

if TYPE_CHECKING:
    from vmferry.agent.machine import Machine
    from vmferry.agent.source import SourceAttempt

READ_OPTIONS: Final = (("query-migrate-capabilities", None), ("query-migrate-parameters", None))


async def read_options(machine: Machine) -> dict[str, Any]:
    """Every capability and parameter that QEMU has now, in one mapping."""
    return _options_of(await machine.execute_all(READ_OPTIONS))


def _options_of(answers: list[Any]) -> dict[str, Any]:
    known, parameters = answers
    return {**{c["capability"]: c["state"] for c in known}, **parameters}


async def remember_options(attempt: SourceAttempt, names: Iterable[str]) -> None:
    """Makes durable what QEMU has under these names, before they are set: whoever cleans up, also an agent that was
    started since, puts it back. What may change later, on the way, is among them: a plan sets everything that it can.
    Raises QemuError or Unfit; nothing may be set then."""
    had = await read_options(attempt.machine)
    before = {name: had[name] for name in names if name in had}
    await attempt.context.journal.append(Entry.OPTIONS_BEFORE, attempt.job, before)
    attempt.saved_options = before


async def set_options(
    machine: Machine, commands: Iterable[tuple[str, dict[str, Any]]], expected: Mapping[str, Any]
) -> None:
    """Applies all, reads back, compares. Raises QemuError naming every difference; nothing has started."""
    answers = await machine.execute_all([*commands, *READ_OPTIONS])
    wrong = differences(expected, _options_of(answers[-len(READ_OPTIONS) :]))
    if wrong:
        raise QemuError(f"{machine.vm}: QEMU did not take the options: {'; '.join(wrong)}")
