"""Which snapshot names jobs of this agent are about to use.

Theory of operation
-------------------
A name is free as long as the repository has no snapshot of it, and a snapshot is there only when its save or import
commits, at its very end.

    1. two saves find the name free  2. the first one commits  3. the second one is refused at its commit: its guest has
    stood still for nothing, and may have gone on in new files

So of the jobs of one agent the second is refused when it is asked for. Two agents cannot see each other's jobs: theirs
are told apart at the commit, as ever.

Rule 1: a name that a command holds lives in this process only, and only until the job's register has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmferry.core.job import IMPORT
from vmferry.errors import Busy

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent


class SnapshotNames:
    """Owned by the agent; lives on its loop."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._held: dict[str, str] = {}
        """Name -> job, of commands that are not over."""

    @contextmanager
    def hold(self, name: str, job: str) -> Iterator[None]:
        """No other job gets `name` inside this block; then the register of jobs has to have it. Raises Busy, naming the
        job that is about to use it."""
        other = self.user(name)
        if other:
            raise Busy(
                f"job {other} is about to keep a snapshot under the name {name}",
                side="client",
                hint="take another name, or wait for that job: 'vmferry jobs' shows how it stands",
            )
        self._held[name] = job
        try:
            yield
        finally:
            del self._held[name]

    def user(self, name: str) -> str:
        """The job that is about to use a name; '' if none is."""
        if name in self._held:
            return self._held[name]
        for save in self._agent.saves.at_work():
            if save.wanted.name == name:
                return save.job
        for chore in self._agent.chores.at_work():
            if chore.kind == IMPORT.name and chore.wanted.name == name:
                return chore.job
        return ""
