"""How pages are known: the first 16 bytes of SHA-256 over the repository's key and the page.

Rule 1: equal ids count as equal pages; nothing compares bytes afterwards. So the hash is a real one: an accident among
        2^40 pages has odds of 2^-49. The key is secret in an encrypted repository, where ids tell nothing about pages,
        and unknown to guests in any: a guest cannot even try to make two pages collide.
Rule 2: this is the only call per page on the way in and out; the rest of the room works on arrays.

The key fills the hash's first block, so its work is done once; pages have one length, so nothing can be appended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

PAGE_BYTES: Final = 4096
ID_BYTES: Final = 16

Pages = npt.NDArray[np.uint8]
"""Pages, one per row of PAGE_BYTES."""
Ids = npt.NDArray[np.uint8]
"""Ids, one per row of ID_BYTES."""


class PageIds:
    """Ids of pages in one repository."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == 32
        self._begun = hashlib.sha256(key + bytes(32))

    def of(self, pages: Pages) -> Ids:
        """One id per row."""
        return self.of_some(pages, range(len(pages)))

    def of_some(self, pages: Pages, rows: Iterable[int]) -> Ids:
        """The ids of these rows of `pages`."""
        begun, found = self._begun, bytearray()
        flat = np.ascontiguousarray(pages).reshape(-1).data
        for row in rows:
            one = begun.copy()
            one.update(flat[row * PAGE_BYTES : (row + 1) * PAGE_BYTES])
            found += one.digest()[:ID_BYTES]
        return np.frombuffer(found, np.uint8).reshape(-1, ID_BYTES)

    def is_page(self, page: Pages, page_id: bytes) -> bool:
        """Whether this one page, whole in memory, is what its id says."""
        one = self._begun.copy()
        one.update(page.data)
        return one.digest()[:ID_BYTES] == page_id


def halves(ids: Ids) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The ids as two numbers each: arrays that can be sorted and searched."""
    whole = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2)
    return whole[:, 0], whole[:, 1]
