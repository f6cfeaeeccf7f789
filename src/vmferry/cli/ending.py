"""What every command says that waits for the end of a job: how it ended, or that its agent went away."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from vmferry.cli.main import report_error
from vmferry.errors import AgentUnreachable, Guest, from_wire
from vmferry.qmp.errors import QmpDisconnected


@contextmanager
def without_agent(meaning: str, *, guest: Guest, hint: str) -> Iterator[None]:
    """Inside, an agent that goes away is AgentUnreachable: `meaning` says what goes on without it."""
    try:
        yield
    except QmpDisconnected as error:
        raise AgentUnreachable(f"the agent went away; {meaning}", guest=guest, hint=hint, cause=error) from error


def show_end(wire: dict[str, Any], lines: Iterable[str], *, as_json: bool) -> int:
    """Prints how a job ended (or stands), then `lines`, unless it is JSON. Returns the exit code."""
    error = from_wire(wire["error"]) if wire.get("error") else None
    if as_json:
        print(json.dumps(wire))
        return error.exit_code if error else 0
    for line in (wire["sentence"], *lines):
        print(line)
    if error is None:
        return 0
    sys.stdout.flush()
    report_error(error, as_json=False)
    return error.exit_code


def notes_of(wire: dict[str, Any]) -> Iterator[str]:
    """A line for each thing worth knowing about a job that no error tells."""
    return (f"  note: {note}" for note in wire.get("notes") or ())
