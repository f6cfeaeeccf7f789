"""Which pages are known already: ids -> numbers, in sorted arrays, 20 bytes per page. Pure.

Theory of operation
-------------------
Runs of sorted ids, as in a log-structured merge tree: what is added becomes a run; a run that is not much larger than
the next younger one is merged with it, up to a size. So there are about as many as that size fits into all pages, and
its log2.

Rule 1: at most `STORE_KNOWN_PAGES_MAX`; beyond that pages are not remembered. What is not known is stored again,
        which costs room and never a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.limits import STORE_KNOWN_PAGES_MAX, STORE_KNOWN_RUN_PAGES_MAX
from vmferry.store.page_ids import Ids, halves

UNKNOWN: Final = np.uint32(0xFFFFFFFF)
Numbers = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class _Run:
    """Ids in order of their first halves."""

    first: npt.NDArray[np.uint64]
    second: npt.NDArray[np.uint64]
    numbers: Numbers

    def find(self, first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64], found: Numbers) -> None:
        """Writes the numbers of those that are here into `found`."""
        at = np.searchsorted(self.first, first)
        open_ = np.flatnonzero(at < len(self.first))
        # Ids with the same first half stand side by side; more than one is rare beyond belief, and still right.
        while len(open_):
            where = at[open_]
            same = self.first[where] == first[open_]
            open_, where = open_[same], where[same]
            hit = self.second[where] == second[open_]
            found[open_[hit]] = self.numbers[where[hit]]
            open_ = open_[~hit]
            at[open_] += 1
            open_ = open_[at[open_] < len(self.first)]


class KnownPages:
    """Ids and their numbers. Not for several threads at once."""

    def __init__(self, pages_max: int = STORE_KNOWN_PAGES_MAX) -> None:
        self._runs: list[_Run] = []
        self._left = pages_max

    def __len__(self) -> int:
        return sum(len(run.numbers) for run in self._runs)

    def add(self, ids: Ids, numbers: Numbers) -> None:
        """Remembers as many as there is room for. Of an id that is added twice either number is found."""
        ids, numbers = ids[: self._left], numbers[: self._left]
        self._left -= len(ids)
        if not len(ids):
            return
        first, second = halves(ids)
        self._runs.append(_sorted(first, second, np.asarray(numbers, np.uint32)))
        while len(self._runs) > 1 and _are_worth_merging(len(self._runs[-2].numbers), len(self._runs[-1].numbers)):
            young, old = self._runs.pop(), self._runs.pop()
            self._runs.append(
                _sorted(
                    np.concatenate([old.first, young.first]),
                    np.concatenate([old.second, young.second]),
                    np.concatenate([old.numbers, young.numbers]),
                )
            )

    def find(self, ids: Ids) -> Numbers:
        """Each id's number, UNKNOWN where there is none."""
        found = np.full(len(ids), UNKNOWN, np.uint32)
        first, second = halves(ids)
        for run in self._runs:
            run.find(first, second, found)
        return found


def _are_worth_merging(old: int, young: int) -> bool:
    return old < 2 * young and old + young <= STORE_KNOWN_RUN_PAGES_MAX


def _sorted(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64], numbers: Numbers) -> _Run:
    order = np.argsort(first, kind="stable")
    return _Run(first[order], second[order], numbers[order])


def first_of_each(ids: Ids) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Which rows are the first of their id, in order; and for each row, the position of its id among those."""
    if not len(ids):
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    first, second = halves(ids)
    order = np.lexsort((second, first))
    new = np.ones(len(ids), np.bool_)
    new[1:] = (first[order[1:]] != first[order[:-1]]) | (second[order[1:]] != second[order[:-1]])
    group = np.cumsum(new) - 1
    leaders = order[new]  # lexsort is stable: the first of each id in the order of rows
    in_order = np.argsort(leaders, kind="stable")
    rank = np.empty_like(in_order)
    rank[in_order] = np.arange(len(in_order))
    positions = np.empty(len(ids), np.intp)
    positions[order] = rank[group]
    return leaders[in_order], positions
