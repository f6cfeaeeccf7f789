"""Image files on this host: where the copy of a disk would be, making it, taking it away again.

Theory of operation
-------------------
A file that a job made must be told from every other one, whenever an agent dies:

    1. an empty image is made under a name that only this job uses (`temporary`)
    2. its device and inode are written to the journal
    3. it gets its own name by link(2), which fails where that name is taken
    4. the first name is taken away

Who dies before 2 leaves a file whose name says whose it is; after 2 the journal tells which inode is the job's.

Rule 1: nothing here opens a file for writing that was there before.
Rule 2: a file is taken away only if its device and inode are those that were written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import stat
import struct
import threading
from pathlib import Path

from vmferry.core.disk_reports import RoomReport
from vmferry.errors import Side, Unfit
from vmferry.limits import IMAGE_TOOL_S
from vmferry.pki.job_credentials import tag
from vmferry.vm.image_locks import image_locks

CHUNK_BYTES = 1 << 20
Identity = tuple[int, int]
"""Device and inode."""
Stamp = tuple[int, int, int, int, int]
"""Device, inode, bytes, and when it was written to and changed, in ns: equal as long as nobody touches the file."""


def temporary(path: str, job: str) -> str:
    """The name under which the job makes the image, in the same folder."""
    return f"{path}.vmferry-{tag(job)[:12]}"


def tool_of(qemu: str) -> str | None:
    """The qemu-img that belongs to a QEMU: beside it, or the one in the path. None: there is none."""
    program = shutil.which(qemu) or qemu
    beside = Path(program).with_name("qemu-img")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("qemu-img")


async def run_tool(program: str, *words: str, what: str, side: Side | None = None) -> bytes:
    """What qemu-img prints. Raises Unfit, with its words, when it does not `what` ("make /a.img"); it is not running
    then, nor after a cancel."""
    process = await asyncio.create_subprocess_exec(
        program, *words,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(IMAGE_TOOL_S):
            answer, complaints = await process.communicate()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise Unfit(f"qemu-img did not {what} within {IMAGE_TOOL_S:g} s", side=side) from error
        raise
    if process.returncode != 0:
        text = " ".join(complaints.decode(errors="replace").split())
        raise Unfit(f"qemu-img cannot {what}: {text}", side=side)
    return answer


def room(path: str, *, qemu: str) -> RoomReport:
    """What is there now, and how much room. Never raises for what the file system says."""
    folder = os.path.dirname(path)
    free: int | None = None
    filesystem = ""
    with contextlib.suppress(OSError):
        seen = os.statvfs(folder)
        free = seen.f_bavail * seen.f_frsize
        filesystem = str(os.stat(folder).st_dev)
    return RoomReport(
        path=path,
        folder=folder,
        exists=os.path.lexists(path),
        folder_writable=os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK),
        free_bytes=free,
        filesystem=filesystem,
        has_tool=tool_of(qemu) is not None,
    )


async def make(
    path: str,
    *,
    job: str,
    size_bytes: int,
    format: str,
    options: tuple[str, ...],
    qemu: str,
    side: Side = "destination",
) -> Identity:
    """An empty image under its temporary name. Raises Unfit; nothing is left then."""
    name = temporary(path, job)
    try:
        if format == "raw":
            descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                os.truncate(descriptor, size_bytes)
            finally:
                os.close(descriptor)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            await _create(name, size_bytes=size_bytes, format=format, options=options, qemu=qemu, side=side)
        found = os.stat(name)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise Unfit(f"the image {path} cannot be made: {error.strerror}", side=side, cause=error) from error
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return found.st_dev, found.st_ino


async def _create(name: str, *, size_bytes: int, format: str, options: tuple[str, ...], qemu: str, side: Side) -> None:
    program = tool_of(qemu)
    if program is None:
        raise Unfit("there is no qemu-img to make an image with", side=side, hint="install qemu-utils")
    more = ("-o", ",".join(options)) if options else ()
    words = ("create", "-q", "-f", format, *more, "--", name, str(size_bytes))
    await run_tool(program, *words, what=f"make {name}", side=side)


def publish(path: str, *, job: str, side: Side = "destination") -> None:
    """The image gets its own name. Raises Unfit where a file has that name; nothing of it was touched."""
    name = temporary(path, job)
    try:
        os.link(name, path)
        os.unlink(name)
    except OSError as error:
        raise Unfit(f"the image {path} cannot get its name: {error.strerror}", side=side, cause=error) from error


def remove(path: str, identity: Identity | None, *, job: str) -> bool:
    """Takes away what the job made of this image; False when a file of that name is another one. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary(path, job))
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return True
    if identity is None or (found.st_dev, found.st_ino) != identity:
        return False
    os.unlink(path)
    return True


def sync(path: str) -> None:
    """What was written to the file, or made in the folder, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stamp(path: str) -> Stamp | None:
    """What the file looks like now; None: there is no plain file of that name that can be looked at."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def remove_left(path: str, looks: Stamp) -> bool:
    """Takes away an image that still looks so and that no QEMU has open; False: it is kept. Raises OSError."""
    held = image_locks(path)
    if stamp(path) != looks or held.holders or held.uses != frozenset():
        return False
    os.unlink(path)
    return True


def digest(path: str, stop: threading.Event) -> str:
    """A checksum of the bytes that an image of plain bytes has, wherever it has holes. Raises OSError, also when it is
    to stop.

    A chunk of zeroes counts as a hole, so that two files with the same bytes have the same digest."""
    total = hashlib.blake2b(digest_size=32)
    zeroes = bytes(CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        total.update(struct.pack("<Q", size))
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // CHUNK_BYTES * CHUNK_BYTES
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole is left
            chunk = os.pread(file.fileno(), min(CHUNK_BYTES, size - at), at)
            if stop.is_set():
                raise OSError(errno.ECANCELED, "nobody waits for its checksum any more", path)
            if chunk != zeroes[: len(chunk)]:
                total.update(struct.pack("<Q", at))
                total.update(chunk)
            at += CHUNK_BYTES
    return total.hexdigest()
