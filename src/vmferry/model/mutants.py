"""Small mistakes, each of which the model must show: in rows, in guards, in the views, in the environment's contract.

Rule 1: an equivalent mutant is not in the set. Where one was left out, the reason stands beside the place that makes
        the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from vmferry.model.rules import Rules
from vmferry.model.world import Setting

QUICK: Final = Setting("precopy", locks=False, faults=0, cancels=1)
QUICK_POSTCOPY: Final = Setting("postcopy", locks=False, faults=0, cancels=0)


@dataclass(frozen=True)
class Mutant:
    """One mistake. `of` makes the mistaken rules; `settings` are tried in order until one shows it."""

    name: str
    of: Callable[[Rules], Rules]
    settings: tuple[Setting, ...] = (QUICK,)


@dataclass(frozen=True)
class Breaks:
    """The mutant that does not keep one promise of the environment."""

    promise: str

    def __call__(self, rules: Rules) -> Rules:
        return replace(rules, broken=rules.broken | {self.promise})


MUTANTS: Final[tuple[Mutant, ...]] = (Mutant("the destination is not started paused", Breaks("started paused")),)
