"""Pages out of packs, by number: rows of several indexes, counted through. What readers, prune and verify read with.

Theory of operation
-------------------
A number leads to an index and a row, the row to a frame of a pack, the frame to its pages; a page that is a difference
leads to its base, which is found by id. What comes out is what was saved, or `Damaged` with the pack's name: a frame is
proved by its seal, as the index that says what is in it was; and each page is compared with its id where frames carry
no proof, and for whoever wants to know that what was saved was right (`compares_ids`).

A row whose pack is gone was put elsewhere by `prune`: it is looked for by id, among the indexes that are here and then
among all others (`moved`). Those are read one after the other, and only one with a page that is wanted stays: memory is
for what a snapshot uses, and not for what else is in the repository.

Rule 1: threads may read at the same time. What they share, the frames that were inflated last and the bases that were
        found, is under one lock, which is never held while something is read or inflated. Indexes are added under
        another one; numbers that were given out keep their meaning.
Rule 2: a frame is kept when a page of it has been found right. One with a page that is wrong is kept no more, and the
        store is asked once more: what was damaged may be whole again, brought back from a copy.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vmferry.limits import STORE_FRAMES_KEPT, STORE_LOOK_AGAIN_S, STORE_READ_BYTES
from vmferry.store.errors import Damaged
from vmferry.store.index import Index, Place
from vmferry.store.known import UNKNOWN, KnownPages, Numbers, first_of_each
from vmferry.store.manifest import ZERO
from vmferry.store.pack import DIFFERENCES, inflate_frame, pack_name
from vmferry.store.page_ids import ID_BYTES, PAGE_BYTES, Ids, Pages
from vmferry.store.repository import Repository

_SEARCH_ROWS = 1 << 16
_FRAMES_AT_ONCE = 128
"""4 MiB of pages in frames of 8."""
_MOVED_PAGES = 1 << 19
"""Pages that are looked for by id at a time: 36 bytes each. Those that follow are in the same indexes mostly."""


class PageSource:
    """Pages of the indexes that were added, in that order. `others` gives all but those with these ids, one at a time,
    for what is not found."""

    def __init__(
        self,
        repository: Repository,
        others: Callable[[Collection[bytes]], Iterable[Index]] | None = None,
        *,
        compares_ids: bool = True,
    ) -> None:
        self._repository = repository
        self._compares_ids = compares_ids or not repository.seal.proves_frames
        self._others = others
        self._present = repository.packs()
        self.indexes: list[Index] = []
        self.starts: list[int] = [0]
        """The first number of each index, and the first that is free."""
        self._live: list[npt.NDArray[np.bool_]] = []
        """For each index, which of its packs are there."""
        self._bases = KnownPages()
        self._looked_s: dict[int, float] = {}
        """For each index, when its bases were looked for last."""
        self._frames: OrderedDict[tuple[int, int], Pages] = OrderedDict()
        self._lock = threading.Lock()
        self._adding = threading.Lock()
        self._looking = threading.Lock()
        """Held by whoever looks for bases."""

    def add(self, index: Index) -> int:
        """Its first number."""
        start = self.starts[-1]
        self._live.append(self._packs_there(index))
        self.indexes.append(index)
        self.starts.append(start + index.rows)
        return start

    # --- where --------------------------------------------------------------------------------------------

    def split(self, numbers: Numbers) -> list[tuple[int, npt.NDArray[np.intp], npt.NDArray[np.int64]]]:
        """For each index that is concerned: its position, where in `numbers` its rows are, and the rows. Zeros: no."""
        here = np.flatnonzero(numbers != ZERO)
        which = np.searchsorted(self.starts, numbers[here].astype(np.int64), side="right") - 1
        found = []
        for k in np.unique(which).tolist():
            at = here[which == k]
            found.append((k, at, numbers[at].astype(np.int64) - self.starts[k]))
        return found

    def is_live(self, k: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which rows of index `k` are in packs that are there."""
        return _are_live(self.indexes[k], self._live[k], rows)

    def misfits(self, k: int) -> list[int]:
        """The packs of index `k`, by their numbers in it, that are there and have another size than it says."""
        index = self.indexes[k]
        sizes = zip(index.pack_ids, index.pack_sizes.tolist(), strict=True)
        return [
            number
            for number, (pack_id, size) in enumerate(sizes)
            if pack_id in self._present and self._present[pack_id].size_bytes != size
        ]

    def find(self, ids: Ids, *, is_whole: bool) -> Numbers:
        """Numbers of these ids in packs that are there (stored whole, if so wanted), UNKNOWN for those without.

        An id may come more than once: an index can have a page twice, as a writer that does not remember all pages
        stores some again. A page that is stored whole goes before one that is a difference, and such a one counts only
        with its base: differences may outlive theirs."""
        leaders, positions = first_of_each(ids)
        found = self._find_distinct(ids[leaders], is_whole=is_whole)
        return np.asarray(found[positions])

    def _find_distinct(self, ids: Ids, *, is_whole: bool) -> Numbers:
        found = self._find_whole(ids)
        if is_whole or not np.any(found == UNKNOWN):
            return found
        at = np.flatnonzero(found == UNKNOWN)
        positions, numbers, bases = self._differences_of(ids[at])
        has_base = self.find(bases, is_whole=True) != UNKNOWN
        found[at[positions[has_base]]] = numbers[has_base]
        return found

    def _find_whole(self, ids: Ids) -> Numbers:
        """Of distinct ids; UNKNOWN for those that are nowhere stored whole."""
        wanted = _numbered(ids)
        found = np.full(len(ids), UNKNOWN, np.uint32)
        for k, index in enumerate(self.indexes):
            for positions, rows in _hits(index, self._live[k], wanted, is_whole=True):
                found[positions] = rows + self.starts[k]
        return found

    def _differences_of(self, ids: Ids) -> tuple[Numbers, Numbers, Ids]:
        """Rows that have some of these distinct ids as differences: the ids' positions, the rows' numbers, and the ids
        of their bases."""
        wanted = _numbered(ids)
        positions, numbers = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint32)]
        bases: list[Ids] = [np.zeros((0, ID_BYTES), np.uint8)]
        for k, index in enumerate(self.indexes):
            for at, rows in _hits(index, self._live[k], wanted, is_whole=False):
                are = index.are_differences(rows)
                positions.append(at[are])
                numbers.append((rows[are] + self.starts[k]).astype(np.uint32))
                bases.append(index.bases_of(rows[are]))
        return np.concatenate(positions), np.concatenate(numbers), np.concatenate(bases)

    def find_anywhere(self, ids: Ids, *, is_whole: bool) -> Numbers:
        """As `find`, and if one is not found among the indexes that are here, those others that have one are added."""
        leaders, positions = first_of_each(ids)
        distinct = ids[leaders]
        found = self._find_distinct(distinct, is_whole=is_whole)
        if np.any(found == UNKNOWN):
            with self._adding:
                self._add_others(distinct[found == UNKNOWN], is_whole=is_whole)
            found = self._find_distinct(distinct, is_whole=is_whole)
        if not is_whole and np.any(found == UNKNOWN):  # a difference is there, perhaps, and its base is somewhere else
            _, _, bases = self._differences_of(distinct[found == UNKNOWN])
            if len(bases):
                self.find_anywhere(bases, is_whole=True)
                found = self._find_distinct(distinct, is_whole=False)
        return np.asarray(found[positions])

    def _add_others(self, ids: Ids, *, is_whole: bool) -> None:
        """Adds those of the others that have some of these. A difference is no end of the search for its page: it may
        have outlived its base, and the page may be stored whole in another one."""
        lost = np.ones(len(ids), np.bool_)
        wanted = _numbered(ids)
        others = () if self._others is None else self._others({each.index_id for each in self.indexes})
        for index in others:
            live, has_some = self._packs_there(index), False
            for positions, rows in _hits(index, live, wanted, is_whole=is_whole):
                has_some = has_some or bool(lost[positions].any())
                lost[positions[~index.are_differences(rows)]] = False
            if has_some:
                self.add(index)
            if not lost.any():
                return

    def _packs_there(self, index: Index) -> npt.NDArray[np.bool_]:
        return np.array([each in self._present for each in index.pack_ids], np.bool_)

    def moved(self, numbers: Numbers) -> Numbers:
        """The same pages where they are now; UNKNOWN for those that are nowhere. What has not moved is not copied."""
        if all(live.all() for live in self._live):
            return numbers
        now = numbers
        for begin in range(0, len(numbers), _MOVED_PAGES):
            part = numbers[begin : begin + _MOVED_PAGES]
            places, ids = [], []
            for k, at, rows in self.split(part):
                gone = ~self.is_live(k, rows)
                if gone.any():
                    places.append(at[gone] + begin)
                    ids.append(self.indexes[k].ids[rows[gone]])
            if places:
                now = numbers.copy() if now is numbers else now
                now[np.concatenate(places)] = self.find_anywhere(np.concatenate(ids), is_whole=False)
        return now

    def pack_of(self, number: int) -> str:
        """The name of the pack that a number leads to."""
        k = bisect_right(self.starts, number) - 1
        index = self.indexes[k]
        return pack_name(index.pack_ids[index.place(index.frame_of(number - self.starts[k])).pack])

    def bases_of(self, k: int, rows: npt.NDArray[np.int64]) -> Numbers:
        """The numbers of the bases of rows that are differences. Raises Damaged when one is nowhere."""
        numbers = self.find_bases(k, rows)
        if np.any(numbers == UNKNOWN):
            row = int(rows[int(np.argmax(numbers == UNKNOWN))])
            raise Damaged(self.pack_of(self.starts[k] + row), "a page's base is nowhere in the repository")
        return numbers

    def find_bases(self, k: int, rows: npt.NDArray[np.int64]) -> Numbers:
        """As `bases_of`; UNKNOWN for those that are nowhere. Of pages that no snapshot needs, bases may be gone."""
        ids = self.indexes[k].bases_of(rows)
        numbers = self._known_bases(ids)
        if not np.any(numbers == UNKNOWN):
            return numbers
        # Whoever comes while somebody looks waits for that: until then nobody knows whether a base is nowhere.
        with self._looking:
            numbers = self._known_bases(ids)
            if np.any(numbers == UNKNOWN) and self._is_worth_a_look(k):
                # All that this index may ever ask for, at once: looking for one takes as long.
                every = self.indexes[k].frames.bases
                every = every[self._known_bases(every) == UNKNOWN]
                found = self.find_anywhere(every, is_whole=True)
                with self._lock:
                    self._bases.add(every[found != UNKNOWN], found[found != UNKNOWN])
                numbers = self._known_bases(ids)
        return numbers

    def _known_bases(self, ids: Ids) -> Numbers:
        with self._lock:
            return self._bases.find(ids)

    def _is_worth_a_look(self, k: int) -> bool:
        """Whether to look for bases of index `k`: once, and for whoever waits for them again after a while, among what
        is there then. A pack that was missing when the snapshot was opened may have been brought back."""
        now_s = self._repository.clock.now_s()
        looked_s = self._looked_s.get(k)
        if looked_s is not None:
            if self._others is None or now_s - looked_s < STORE_LOOK_AGAIN_S:
                return False
            present = self._repository.packs()
            with self._adding:
                self._present = present
                self._live = [self._packs_there(index) for index in self.indexes]
        self._looked_s[k] = now_s
        return True

    # --- what ---------------------------------------------------------------------------------------------

    def page(self, number: int) -> Pages:
        """One page, an array of PAGE_BYTES that is not to be written to. Raises Damaged."""
        k = bisect_right(self.starts, number) - 1
        index, row = self.indexes[k], number - self.starts[k]
        frame = index.frame_of(row)
        pages = self._kept(k, frame)
        if pages is not None:
            page = self._page_of(k, row, frame, pages)
            if page is not None:
                return page
            self._let_go(k, frame)
        pages = self._inflate(index, index.place(frame))
        page = self._page_of(k, row, frame, pages)
        if page is None:
            raise self._wrong(k, frame)
        self._keep(k, frame, pages)
        return page

    def _page_of(self, k: int, row: int, frame: int, pages: Pages) -> Pages | None:
        """A row's page out of its frame; None if it is not what was saved."""
        index = self.indexes[k]
        page: Pages = pages[row - int(index.first_rows[frame])]
        if index.frames.kinds[frame] & DIFFERENCES:
            base = int(self.bases_of(k, np.array([row]))[0])
            page = page ^ self.page(base)
        if not self._compares_ids:
            return page
        return page if self._repository.ids.is_page(page, index.ids[row].tobytes()) else None

    def read(self, numbers: Numbers) -> Pages:
        """Pages, one per number; ZERO gives zeros. Raises Damaged."""
        # Zeros are written where they are wanted only: all else is overwritten, or an error is raised.
        out = np.empty((len(numbers), PAGE_BYTES), np.uint8)
        if np.any(are_zero := numbers == ZERO):
            out[are_zero] = 0
        for k, at, rows in self.split(numbers):
            self._read_index(k, at, rows, out)
        return out

    def _read_index(
        self, k: int, at: npt.NDArray[np.intp], rows: npt.NDArray[np.int64], out: Pages, *, is_again: bool = False
    ) -> None:
        order = np.argsort(rows, kind="stable")
        at, rows = at[order], rows[order]
        of_rows = self.indexes[k].frames_of(rows)
        # So many rows at a time that their frames' pages are not much at once.
        edges = np.flatnonzero(np.diff(of_rows)) + 1
        begin = 0
        for end in (*edges[_FRAMES_AT_ONCE - 1 :: _FRAMES_AT_ONCE].tolist(), len(rows)):
            part = slice(begin, end)
            self._read_rows(k, at[part], rows[part], of_rows[part], out)
            begin = end
        if self._compares_ids:
            self._compare(k, at, rows, of_rows, out, is_again=is_again)

    def _read_rows(
        self,
        k: int,
        at: npt.NDArray[np.intp],
        rows: npt.NDArray[np.int64],
        of_rows: npt.NDArray[np.int64],
        out: Pages,
    ) -> None:
        """Rows in ascending order; nothing is compared yet."""
        index = self.indexes[k]
        edges = np.flatnonzero(np.diff(of_rows)) + 1
        begins = [0, *edges.tolist()]
        frames = of_rows[begins]
        # Pages that lie side by side here and there are copied together.
        is_begin = np.ones(len(rows), np.bool_)
        is_begin[1:] = (np.diff(rows) != 1) | (np.diff(at) != 1)
        is_begin[begins] = True
        cuts = np.flatnonzero(is_begin)
        pieces = zip(
            (np.searchsorted(begins, cuts, side="right") - 1).tolist(),
            (rows[cuts] - index.first_rows[of_rows[cuts]]).tolist(),
            at[cuts].tolist(),
            np.diff(cuts, append=len(rows)).tolist(),
            strict=True,
        )
        found = self._frames_of(k, frames)
        for which, slot, to, count in pieces:
            out[to : to + count] = found[which][slot : slot + count]
        are = index.are_differences(rows)
        if are.any():
            out[at[are]] ^= self.read(self.bases_of(k, rows[are]))

    def _compare(
        self,
        k: int,
        at: npt.NDArray[np.intp],
        rows: npt.NDArray[np.int64],
        of_rows: npt.NDArray[np.int64],
        out: Pages,
        *,
        is_again: bool,
    ) -> None:
        """Each page with its id; what was wrong and came from a frame that was kept is read once more."""
        found = self._repository.ids.of_some(out, at.tolist())
        wrong = np.flatnonzero((found != self.indexes[k].ids[rows]).any(axis=1))
        if not len(wrong):
            return
        were_kept = [self._let_go(k, frame) for frame in np.unique(of_rows[wrong]).tolist()]
        if is_again or not any(were_kept):
            raise self._wrong(k, int(of_rows[wrong[0]]))
        self._read_index(k, at, rows, out, is_again=True)

    def _frames_of(self, k: int, frames: npt.NDArray[np.int64]) -> list[Pages]:
        """These frames' pages, in order; neighbours in a pack are read at once. For runs: what was kept is used, and
        nothing more is kept."""
        index, numbers = self.indexes[k], frames.tolist()
        with self._lock:
            kept = [self._frames.get((k, frame)) for frame in numbers]
        found: list[Pages] = []
        run: list[Place] = []
        for pages, place in zip(kept, index.places(frames), strict=True):
            if run and (
                pages is not None
                or (place.pack, place.number) != (run[-1].pack, run[-1].number + 1)
                or place.offset + place.length - run[0].offset > STORE_READ_BYTES
            ):
                found += self._inflate_run(index, run)
                run = []
            if pages is None:
                run.append(place)
            else:
                found.append(pages)
        if run:
            found += self._inflate_run(index, run)
        return found

    def _inflate_run(self, index: Index, run: Sequence[Place]) -> list[Pages]:
        """Neighbours in one pack."""
        name, first, seal = pack_name(index.pack_ids[run[0].pack]), run[0].offset, self._repository.seal
        data = self._repository.part(name, first, run[-1].offset + run[-1].length - first)
        found = []
        for place in run:
            begin = place.offset - first
            stored = data[begin : begin + place.length]
            found.append(inflate_frame(seal, name, place.number, stored, place.kind, place.pages))
        return found

    def _inflate(self, index: Index, place: Place) -> Pages:
        """One frame."""
        name = pack_name(index.pack_ids[place.pack])
        stored = self._repository.part(name, place.offset, place.length)
        return inflate_frame(self._repository.seal, name, place.number, stored, place.kind, place.pages)

    def _keep(self, k: int, frame: int, pages: Pages) -> None:
        with self._lock:
            self._frames[k, frame] = pages
            if len(self._frames) > STORE_FRAMES_KEPT:
                self._frames.popitem(last=False)

    def _let_go(self, k: int, frame: int) -> bool:
        """Whether the frame was kept."""
        with self._lock:
            return self._frames.pop((k, frame), None) is not None

    def _kept(self, k: int, frame: int) -> Pages | None:
        with self._lock:
            pages = self._frames.get((k, frame))
            if pages is not None:
                self._frames.move_to_end((k, frame))
            return pages

    def _wrong(self, k: int, frame: int) -> Damaged:
        place = self.indexes[k].place(frame)
        return Damaged(
            pack_name(self.indexes[k].pack_ids[place.pack]), f"a page in frame {place.number} is not what was saved"
        )


def _are_live(index: Index, live: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if live.all():
        return np.ones(len(rows), np.bool_)
    return np.asarray(live[index.packs_of(index.frames_of(rows))])


def _numbered(ids: Ids) -> KnownPages:
    """Distinct ids, and their positions."""
    wanted = KnownPages(len(ids))
    wanted.add(ids, np.arange(len(ids), dtype=np.uint32))
    return wanted


def _hits(
    index: Index, live: npt.NDArray[np.bool_], wanted: KnownPages, *, is_whole: bool
) -> Iterator[tuple[Numbers, npt.NDArray[np.int64]]]:
    """The numbers of wanted ids that an index has in packs that are there, and the rows of them."""
    for begin in range(0, index.rows, _SEARCH_ROWS):
        position = wanted.find(index.ids[begin : begin + _SEARCH_ROWS])
        rows = np.flatnonzero(position != UNKNOWN) + begin
        rows = rows[_are_live(index, live, rows)]
        if is_whole:
            rows = rows[~index.are_differences(rows)]
        if len(rows):
            yield position[rows - begin], rows
