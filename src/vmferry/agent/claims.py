"""What commands are about to do with a VM's name: between the check that it is free and the register that has it.

Theory of operation
-------------------
Every command that gives a name a new use (run, adopt, migrate, a place for a guest that arrives) checks first and
registers later, and waits in between: for the disk, for other hosts, for a QEMU.

    1. one command finds the name free and waits  2. another one finds it free too  3. both would go on

So each claims the name before its check and holds it until the register has it, or nothing is left. Other hosts hear
of a claim as they hear of a VM (`peer-has`): of two hosts that begin at the same moment at most one goes on.

Rule 1: a claim lives in this process only. What must outlive it is the journal's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vmferry.errors import Busy, Side

HINT = "see with 'vmferry ls' what has become of it"


class Claims:
    """The names in use by commands that are not over. Lives on the agent's loop."""

    def __init__(self) -> None:
        self._doing: dict[str, str] = {}

    @contextmanager
    def hold(self, what: str, doing: str, *, side: Side = "client") -> Iterator[None]:
        """Nobody else gets `what` inside this block; `doing` says in a participle what happens to it meanwhile.

        Raises Busy, with `side` at fault, when another command has it; nothing was done."""
        if what in self._doing:
            raise Busy(f"{what} is being {self._doing[what]} at this very moment", side=side, hint=HINT)
        self._doing[what] = doing
        try:
            yield
        finally:
            del self._doing[what]

    def doing(self, what: str) -> str:
        """What a command is doing with it ('started'), or an empty text."""
        return self._doing.get(what, "")
