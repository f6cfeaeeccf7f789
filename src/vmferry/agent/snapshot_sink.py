"""Where the state of a guest that is saved goes: from an incoming endpoint, page by page, into the repository.

Theory of operation
-------------------
`SnapshotSink` is the endpoint's image and its sink. The writer of the snapshot is made when the first page comes,
because only then the guest's blocks are known; pages go to it through a small queue, in a thread of the sink's own.
`commit` follows in another thread, after the endpoint and that one have ended, so the writer has one user at a time.

While the guest stands for its last pages it shall not wait for a store, which may be far away: `spill` has what comes
from then on written into a nameless file of this host (`Spill`); `commit` puts it into packs when the guest has gone
on. A pack that is being put at that moment, or never ends, holds up the queue and not the guest.

If the repository has an earlier snapshot of the same VM, changed pages are kept as differences to it.

Rule 1: nothing of the snapshot is there until `commit` returns; after `abort`, or an error, `prune` takes away what was
        put.
Rule 2: memory does not grow with the guest, but for the 5 bytes per page of tables and maps.
Rule 3: what was spilled is put in the order in which it came, after everything that came before it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vmferry import limits
from vmferry.agent.spill import Spill
from vmferry.engine.frozen import FrozenDisk, SnapshotWords, freeze, state_of
from vmferry.engine.image import PAGE_BYTES, Pages
from vmferry.engine.passing import PassingImage
from vmferry.errors import RepositoryError, UsageError, VmferryError
from vmferry.store.errors import StoreTransient, UnknownSnapshot
from vmferry.store.manifest import Block, Head
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository, SnapshotInfo
from vmferry.store.writer import SnapshotWriter

log = logging.getLogger("vmferry.agent")

Numbers = npt.NDArray[np.int64]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BEGINNING = re.compile(r"[0-9a-f]{8,31}")
_COMMIT_TRIES = 3
_NUMBER_BYTES = 8


def check_name(name: str) -> None:
    """Raises UsageError for what is no name of a snapshot."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a snapshot: 1 to 64 letters, digits, dots, dashes or underscores")


def require_free(repository: Repository, name: str) -> None:
    """Raises RepositoryError if a snapshot has this name. A damaged one has none that could be read."""
    if any(info.head is not None and info.head.name == name for info in repository.each_snapshot()):
        raise RepositoryError(
            f"the repository has a snapshot {name} already; it was left as it is",
            retry="no",
            hint=f"take another name, or take that one away first: vmferry forget {name}",
        )


def find(repository: Repository, word: str) -> SnapshotInfo:
    """The snapshot that a person means: by its id, which is what agents say to each other; else by its name; else by
    the beginning of its id, of 8 digits or more.

    Raises UnknownSnapshot; RepositoryError if several begin so, or two hosts gave the same name in the same moment."""
    with contextlib.suppress(UnknownSnapshot):
        return repository.snapshot(word)
    named, begun = [], []
    for info in repository.each_snapshot():
        if info.head is not None and info.head.name == word:
            named.append(info)
        elif _BEGINNING.fullmatch(word) and info.snapshot.startswith(word):
            begun.append(info)
    found = named or begun
    if not found:
        raise UnknownSnapshot(
            f"the repository has no snapshot {word}", retry="no", hint="'vmferry snapshots' lists them"
        )
    if len(found) > 1:
        are, by = ("are named", "its id") if named else ("have an id that begins with", "more of it")
        ids = ", ".join(sorted(info.snapshot for info in found))
        raise RepositoryError(f"{len(found)} snapshots {are} {word}; say which by {by}: {ids}", retry="no")
    return found[0]


def _size(numbers: Numbers, pages: Pages | None) -> int:
    return numbers.nbytes + (0 if pages is None else pages.nbytes)


class SnapshotSink:
    """A snapshot that is being saved. `image` is the endpoint's."""

    def __init__(self, repository: Repository, *, vm: str = "", spill_folder: Path | None = None) -> None:
        self.image = PassingImage(self)
        self.stored_pages = 0
        """Pages that came, zeros not counted, repeated ones each time."""
        self._repository, self._vm = repository, vm
        self._writer: SnapshotWriter | None = None
        self._base: SnapshotReader | None = None
        self._is_over = threading.Event()
        self._committing = threading.Lock()
        """Whoever holds it has the writer, and what was set aside."""
        self._spill_folder = spill_folder
        self._is_spilling = False
        self._spilled: Spill | None = None
        self._changed = threading.Condition()
        """Guards what follows."""
        self._queue: deque[tuple[str, Numbers, Pages | None]] = deque()
        """For the writer: block, numbers, pages (None: zeros)."""
        self._queued_bytes = 0
        self._uploader: threading.Thread | None = None
        self._has_all = False
        self._failed: Exception | None = None
        self._order: deque[tuple[str, int, bool]] = deque()
        """What was spilled: block, how many pages, and whether they are zero. In the file are their numbers, and behind
        those their content if they are not zero."""

    @property
    def snapshot(self) -> str:
        """The snapshot's id; '' before a page has come."""
        return "" if self._writer is None else self._writer.snapshot

    @property
    def may_be_there(self) -> bool:
        """After a `commit` that failed: whether the snapshot may be in the repository all the same."""
        return self._writer is not None and self._writer.may_be_there

    @property
    def base_damage(self) -> str:
        """What of the VM's snapshot before could not be read; '' if nothing was met."""
        return "" if self._writer is None else self._writer.base_damage

    def spill(self) -> None:
        """The guest stands: from now on nothing waits for the store. Any thread; without a folder nothing changes."""
        if self._spill_folder is not None:
            with self._changed:
                self._is_spilling = True
                self._changed.notify_all()

    # --- the endpoint's thread ----------------------------------------------------------------------------

    def put(self, block: str, numbers: Numbers, pages: Pages) -> None:
        """See `PageSink`."""
        self.stored_pages += len(numbers)
        if not self._hand_over(block, numbers, pages):
            self._set_aside(block, numbers, pages)

    def put_zeros(self, block: str, numbers: Numbers) -> None:
        """See `PageSink`."""
        if not self._hand_over(block, numbers, None):
            self._set_aside(block, numbers, None)

    def _set_aside(self, block: str, numbers: Numbers, pages: Pages | None) -> None:
        try:
            if self._spilled is None:
                assert self._spill_folder is not None, "it says whether there is spilling"
                is_secret = self._repository.config.encryption is not None
                self._spilled = Spill(self._spill_folder, is_secret=is_secret)
            self._spilled.write(np.ascontiguousarray(numbers, np.int64).data)
            if pages is not None:
                self._spilled.write(np.ascontiguousarray(pages).data)
        except OSError as error:
            raise RepositoryError(f"the guest's last pages cannot be set aside: {error}", cause=error) from error
        self._order.append((block, len(numbers), pages is None))

    def _hand_over(self, block: str, numbers: Numbers, pages: Pages | None) -> bool:
        """Into the queue, when there is room. False: the guest stands, and nothing waits."""
        size = _size(numbers, pages)
        with self._changed:
            while self._queue and self._queued_bytes + size > limits.SAVE_QUEUE_BYTES:
                if self._is_spilling or self._failed is not None or self._is_over.is_set():
                    break
                self._changed.wait()
            self._require_wanted()
            if self._failed is not None:
                raise self._failed
            if self._is_spilling:
                return False
            if self._uploader is None:
                self._uploader = threading.Thread(target=self._upload, name=f"save-put-{self._vm}", daemon=True)
                self._uploader.start()
            self._queue.append((block, numbers.copy(), None if pages is None else pages.copy()))
            self._queued_bytes += size
            self._changed.notify_all()
        return True

    def _upload(self) -> None:
        """The uploader's thread: what is in the queue into the writer, in its order."""
        while True:
            with self._changed:
                while not self._queue and not self._has_all and not self._is_over.is_set():
                    self._changed.wait()
                if not self._queue or self._is_over.is_set():
                    return
                block, numbers, pages = self._queue.popleft()
            try:
                writer = self._the_writer()
                if pages is None:
                    writer.put_zeros(block, numbers)
                else:
                    writer.put_some(block, numbers, pages)
            except Exception as error:  # noqa: BLE001 - whoever puts next, or commits, raises it
                with self._changed:
                    self._failed = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._queued_bytes -= _size(numbers, pages)
                self._changed.notify_all()

    def _end_uploads(self) -> None:
        with self._changed:
            self._has_all = True
            self._changed.notify_all()
        if self._uploader is not None:
            self._uploader.join()

    def _require_wanted(self) -> None:
        if self._is_over.is_set():
            raise RepositoryError("the save was given up", retry="yes")

    def _the_writer(self) -> SnapshotWriter:
        self._require_wanted()
        if self._writer is None:
            blocks = [Block(block.name, block.wire.used_length) for block in self.image]
            if sum(block.pages for block in blocks) > limits.STORE_SNAPSHOT_PAGES_MAX:
                raise RepositoryError("the guest has more memory than a snapshot can have", retry="no")
            self._base = self._open_base(blocks)
            self._writer = SnapshotWriter(self._repository, blocks, base=self._base)
        return self._writer

    def _open_base(self, blocks: Sequence[Block]) -> SnapshotReader | None:
        """The newest snapshot of the same VM that can be read, if its memory is as large."""
        if not self._vm:
            return None
        sizes = {block.name: block.size_bytes for block in blocks}
        fitting = [
            (info.head.created_s, info.snapshot)
            for info in self._repository.each_snapshot()
            if info.head is not None
            and info.head.metadata.get("vm") == self._vm
            and {block.name: block.size_bytes for block in info.head.blocks} == sizes
        ]
        for _, snapshot in sorted(fitting, reverse=True):
            try:
                return SnapshotReader(self._repository, snapshot)
            except RepositoryError as error:  # it costs room to go without
                log.warning("vm=%s base=%s result=%s", self._vm, snapshot, error)
        return None

    # --- when the endpoint has ended ----------------------------------------------------------------------

    def commit(self, name: str, words: SnapshotWords, disks: Sequence[FrozenDisk] = ()) -> Head:
        """The snapshot is there, for good, when this returns. Waits for the store.

        Once: after an error there is only `abort`, and the same error again. Raises RepositoryError: nothing was
        committed, unless `may_be_there`: then nobody knows. PlanRefused for a state that is not kept.
        """
        assert self.image.is_device_state_whole, "everything has come"
        self._end_uploads()
        with self._committing:
            try:
                if self._failed is not None:
                    raise self._failed
                head = self._commit(name, words, disks)
            except Exception as error:
                # What was set aside is read once: called again, pages of an earlier pass would count as the last ones.
                self._failed = error
                raise
        self.abort()
        return head

    def _commit(self, name: str, words: SnapshotWords, disks: Sequence[FrozenDisk]) -> Head:
        state = freeze(state_of(self.image))
        writer = self._the_writer()
        require_free(self._repository, name)
        self._put_spilled(writer)
        plain: list[dict[str, Any]] = [disk.to_wire() for disk in disks]
        tries_left = _COMMIT_TRIES
        while True:
            if not writer.may_be_there:  # what was put is seen through: only a look for the lock says what it is worth
                self._require_wanted()
            tries_left -= 1
            try:
                return writer.commit(name, device_state=state, disks=plain, metadata=words.to_wire())
            except StoreTransient:
                if not tries_left:
                    raise

    def _put_spilled(self, writer: SnapshotWriter) -> None:
        if self._spilled is not None:
            self._spilled.rewind()
        while self._order:
            self._require_wanted()
            block, count, is_zero = self._order.popleft()
            assert self._spilled is not None, "their numbers are there"
            numbers = np.frombuffer(self._spilled.read(count * _NUMBER_BYTES), np.int64)
            if is_zero:
                writer.put_zeros(block, numbers)
                continue
            data = self._spilled.read(count * PAGE_BYTES)
            writer.put_some(block, numbers, np.frombuffer(data, np.uint8).reshape(-1, PAGE_BYTES))

    def abort(self) -> None:
        """Gives back what the repository was asked to hold. Again, or after `commit`, is fine. Waits for a commit that
        nobody waits for any more, which gives up between two steps.

        1. it has put its manifest  2. its lock is given back  3. the snapshot is found, and told as saved  4. it looks
        for its lock, and takes the manifest away again."""
        self._is_over.set()
        self._end_uploads()
        with self._committing:
            self._give_back()

    def _give_back(self) -> None:
        if self._spilled is not None:
            self._spilled.close()
        for each in (self._writer, self._base):
            if each is not None:
                try:
                    each.abort() if isinstance(each, SnapshotWriter) else each.close()
                except VmferryError as error:  # a lock that stays gets stale by itself
                    log.warning("vm=%s snapshot=%s effect=unlock result=%s", self._vm, self.snapshot, error)
        self._base = None  # with its tables: image and sink hold each other, and stay until somebody looks for circles
