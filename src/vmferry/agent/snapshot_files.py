"""Snapshots out of the repository into plain stream files of QEMU's, and back. Blocking: runs in the threads of chores.

Rule 1: a file that exists is never written over, and a file that is not whole is not left.
Rule 2: an import goes through the same endpoint as a save, so it refuses what a save would refuse.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vmferry import limits
from vmferry.agent.snapshot_sink import SnapshotSink, find, require_free
from vmferry.agent.wants import ChoreWanted
from vmferry.core.facts import Fact
from vmferry.engine.frozen import SnapshotWords, state_of, thaw
from vmferry.engine.image import Pages
from vmferry.engine.incoming import Incoming
from vmferry.engine.shared import IncomingOptions
from vmferry.engine.stream_file import stream, was_running
from vmferry.errors import FileFailed, MigrationFailed, RepositoryError, UsageError, VmferryError
from vmferry.store.local import link_or_rename
from vmferry.store.manifest import Head
from vmferry.store.page_ids import PAGE_BYTES
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository

if TYPE_CHECKING:
    from vmferry.agent.chores import Watch

_READ_BYTES = 1 << 20


def part_of(path: Path, job: str) -> Path:
    """Where the export of this job writes before it is whole: the next agent knows it, too."""
    return path.with_name(f".{path.name}.{job}.part")


_NAMED_WRONG = frozenset({errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP})
"""What a person mends with another name; all else is the host's."""


def _told(path: Path, what: str, error: OSError) -> VmferryError:
    words = f"{path} cannot be {what}: {error.strerror or error}"
    return (UsageError if error.errno in _NAMED_WRONG else FileFailed)(words, cause=error)


def require_new(path: Path) -> None:
    """Raises UsageError if something has this name already, or its folder is not there; FileFailed if nobody may look.
    Asked before anything is read: a guest's memory is long on its way, and its file gets its name when all is there."""
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise _told(path, "written", error) from error


def export(repository: Repository, wanted: ChoreWanted, watch: Watch) -> dict[str, Any]:
    """Writes the snapshot into a new file, durably. Raises UsageError when there is one of that name or no folder for
    it, FileFailed when it cannot be written, RepositoryError when the snapshot cannot be read whole, and what `watch`
    raises; then there is no file of ours."""
    path = Path(wanted.file)
    require_new(path)
    info = find(repository, wanted.name)
    part = part_of(path, wanted.job)
    with SnapshotReader(repository, info.snapshot) as reader:
        state = thaw(reader.device_state)
        blocks = [(block.name, block.size_bytes) for block in reader.head.blocks]

        def read(block: str, first: int, count: int) -> Pages:
            reader.renew_if_due()
            return reader.read(block, first, count)

        def zeros(block: str) -> npt.NDArray[np.bool_]:
            return reader.is_zero(block)

        size_bytes = 0
        about = sum(int(np.count_nonzero(~zeros(name))) * PAGE_BYTES for name, _ in blocks) + len(reader.device_state)
        try:
            # A guest's memory has its keys and passwords: nobody else reads it.
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                for buffers in stream(state, blocks, read, zeros):
                    watch.tell(min(size_bytes, about), about)
                    for buffer in buffers:
                        size_bytes += file.write(bytes(buffer))
                file.flush()
                os.fsync(file.fileno())
            link_or_rename(part, path)  # fails where the name is taken
            _sync_folder(path.parent)
        except OSError as error:
            raise _told(path, "written", error) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
        name = reader.head.name
    return {"snapshot": info.snapshot, "name": name, "bytes": size_bytes, "machine": state.machine}


def load(repository: Repository, wanted: ChoreWanted, watch: Watch, *, host: str) -> dict[str, Any]:
    """Keeps a stream file as a snapshot. Raises UsageError when there is no such file, FileFailed when it cannot be
    read, RemoteProtocolError when it is no whole stream, RepositoryError, and what `watch` raises: nothing is kept
    then. MigrationFailed: nobody knows."""
    path, name = Path(wanted.file), wanted.name
    require_free(repository, name)
    sink = SnapshotSink(repository)
    incoming = Incoming(sink.image, options=IncomingOptions(end="end-of-input"), name="import")
    try:
        # Not blocking: a pipe that nobody writes to would hold this thread for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{path} is no regular file")
            ours, theirs = socket.socketpair()
            incoming.take(ours)
            with theirs:
                _pump(file.fileno(), theirs, found.st_size, watch)
                ending = incoming.ledger.wait(
                    Fact.ALL_SENT, Fact.ERROR, Fact.LINK_LOST, timeout_s=limits.SNAPSHOT_FILE_S
                )
        if ending is not Fact.ALL_SENT or incoming.error is not None:
            raise incoming.error or UsageError(f"{path} is no whole migration stream")
        incoming.stop()
        state = state_of(sink.image)
        words = SnapshotWords(
            vm="", host=host, job=wanted.job, machine=state.machine, was_running=was_running(state), way="import"
        )
        watch.no_return()
        try:
            head = sink.commit(name, words)
        except RepositoryError as error:
            if not sink.may_be_there:
                raise
            failed = "the import could not be committed"
            kept = kept_after_all(lambda: repository, wanted, because=failed)
            if kept is None:  # a put whose answer was lost may be carried out yet
                raise _unknown(wanted, failed, error) from error
            return kept
    except OSError as error:
        raise _told(path, "read", error) from error
    finally:
        incoming.stop()
        sink.abort()
    return loaded(sink.snapshot, head)


def kept_after_all(opened: Callable[[], Repository], wanted: ChoreWanted, *, because: str) -> dict[str, Any] | None:
    """What is told of an import that nobody heard the end of; None if it is not listed. Raises MigrationFailed when
    nobody can say."""
    try:
        listed = opened().snapshots()
    except RepositoryError as error:
        raise _unknown(wanted, because, error) from error
    for info in listed:
        if info.head is not None and info.head.metadata.get("job") == wanted.job:
            return loaded(info.snapshot, info.head)
    return None


def _unknown(wanted: ChoreWanted, because: str, cause: Exception) -> MigrationFailed:
    return MigrationFailed(
        f"{because}, and whether {wanted.name} is there nobody knows: {cause}",
        guest="unharmed",
        hint="'vmferry snapshots' will tell",
        cause=cause,
    )


def loaded(snapshot: str, head: Head) -> dict[str, Any]:
    """What is told of a stream file that was kept."""
    return {
        "snapshot": snapshot,
        "name": head.name,
        "machine": head.metadata.get("machine"),
        "pages": head.counts.pages,
        "stored_bytes": head.counts.stored_bytes,
    }


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _pump(fd: int, sock: socket.socket, size_bytes: int, watch: Watch) -> None:
    """The file into the endpoint, and its end. An endpoint that gives up closes: it knows why."""
    done = 0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while data := os.read(fd, _READ_BYTES):
            watch.tell(done, size_bytes)
            sock.sendall(data)
            done += len(data)
        sock.shutdown(socket.SHUT_WR)
