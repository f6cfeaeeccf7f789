"""What this host can do for a migration: KVM, userfaultfd, memory, ports, disks.

Rule 1: a probe that says yes has done the thing (made a VM, registered with userfaultfd), not read a version.
Rule 2: a probe changes nothing: what it makes it closes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import json
import os
import posixpath
import shutil
import socket
import stat
import struct
import tempfile
from pathlib import Path

from vmferry.limits import VM_KVM_BOOT_S, VM_PROBE_S
from vmferry.vm import image_locks

_KVM_GET_API_VERSION, _KVM_CREATE_VM, _KVM_API_VERSION = 0xAE00, 0xAE01, 12
_USERFAULTFD_SYSCALL = {"x86_64": 323, "aarch64": 282, "s390x": 355, "ppc64le": 364, "riscv64": 282}
_UFFDIO_API_IOCTL, _UFFD_API, _USERFAULTFD_IOC_NEW = 0xC018AA3F, 0xAA, 0xAA00
# Bits in the answer of UFFDIO_API: a process may register and unregister memory.
_UFFD_NEEDED_IOCTLS = 0b11
BOOT_MARK = b"vmferry-kvm-ok"


@dataclasses.dataclass(frozen=True, slots=True)
class Usable:
    """Whether something works here, and why not (or how). `works` None is unknown."""

    works: bool | None
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of memory on this host; `available` is what the kernel would give without swapping."""

    total_bytes: int
    available_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class DiskFacts:
    """One image or block device as this host sees it. None is unknown; sizes are in bytes.

    `identity` is equal on two hosts only by accident unless they are the same file of the same host.
    """

    path: str
    exists: bool
    kind: str
    size_bytes: int | None
    virtual_size_bytes: int | None
    format: str | None
    readable: bool
    writable: bool
    backing: str | None
    identity: tuple[int, int] | None
    locks: image_locks.ImageLocks | None
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ClockOffset:
    """How far a peer's clock is ahead of ours, and how wrong that may be; both in milliseconds."""

    peer: str
    offset_ms: float
    uncertainty_ms: float


def kvm() -> Usable:
    """Open /dev/kvm and make a VM (and throw it away). Says nothing on speed; `kvm_boot` does."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Usable(False, f"/dev/kvm cannot be opened: {error.strerror}")
    try:
        version = fcntl.ioctl(device, _KVM_GET_API_VERSION)
        if version != _KVM_API_VERSION:
            return Usable(False, f"/dev/kvm has API version {version} and not {_KVM_API_VERSION}")
        os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
    except OSError as error:
        return Usable(False, f"/dev/kvm is there but makes no VM: {error.strerror}")
    finally:
        os.close(device)
    return Usable(True, "/dev/kvm makes VMs")


async def kvm_boot(qemu: str, *, timeout_s: float = VM_KVM_BOOT_S, accel: str = "kvm") -> Usable:
    """Boot a guest of one sector that prints a mark; it must come within `timeout_s` seconds."""
    loop = asyncio.get_running_loop()
    with tempfile.NamedTemporaryFile(prefix="vmferry-boot-") as image:
        image.write(boot_sector(BOOT_MARK))
        image.flush()
        argv = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-accel", accel, "-m", "16"]
        argv += ["-drive", f"file={image.name},format=raw,if=ide,snapshot=on", "-serial", "stdio"]
        began_s = loop.time()
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            return Usable(None, f"{qemu} cannot be started: {error.strerror}")
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(timeout_s):
                await process.stdout.readuntil(BOOT_MARK)
        except TimeoutError:
            return Usable(False, f"a guest of one sector did not boot under {accel} within {timeout_s:g} s")
        except asyncio.IncompleteReadError:
            words = " ".join((await process.stderr.read(500)).decode(errors="replace").split())
            return Usable(False, f"QEMU gave up under {accel}: {words or 'no reason given'}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
        return Usable(True, f"a guest of one sector booted in {(loop.time() - began_s) * 1000:.0f} ms")


def boot_sector(text: bytes) -> bytes:
    """A sector that a BIOS boots and that prints `text` on COM1, then halts."""
    # cli; xor ax,ax; mov ds,ax; mov si,text; mov dx,0x3f8; cld
    # next: lodsb; test al,al; jz done; out dx,al; jmp next      done: hlt; jmp done
    head = b"\xfa\x31\xc0\x8e\xd8\xbe\x00\x00\xba\xf8\x03\xfc"
    body = head + b"\xac\x84\xc0\x74\x03\xee\xeb\xf8" + b"\xf4\xeb\xfd"
    code = body[:6] + struct.pack("<H", 0x7C00 + len(body)) + body[8:] + text + b"\0"
    assert len(code) <= 510, "the text does not fit into a sector"
    return code.ljust(510, b"\0") + b"\x55\xaa"


def userfaultfd() -> Usable:
    """Open a userfaultfd that may handle faults from the kernel, too, as a postcopy destination needs."""
    reasons: list[str] = []
    for way, opened in (("/dev/userfaultfd", _uffd_from_device), ("the system call", _uffd_from_syscall)):
        try:
            descriptor = opened()
        except OSError as error:
            reasons.append(f"{way}: {error.strerror}")
            continue
        try:
            answer = fcntl.ioctl(descriptor, _UFFDIO_API_IOCTL, struct.pack("QQQ", _UFFD_API, 0, 0))
        except OSError as error:
            reasons.append(f"{way}: UFFDIO_API: {error.strerror}")
            continue
        finally:
            os.close(descriptor)
        if struct.unpack("QQQ", answer)[2] & _UFFD_NEEDED_IOCTLS == _UFFD_NEEDED_IOCTLS:
            return Usable(True, f"userfaultfd works by {way}")
        reasons.append(f"{way}: the kernel lacks UFFDIO_REGISTER")
    return Usable(False, "userfaultfd does not work: " + "; ".join(reasons))


def _uffd_from_device() -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(device)


def _uffd_from_syscall() -> int:
    number = _USERFAULTFD_SYSCALL.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"the call's number on {os.uname().machine} is not known")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(ctypes.c_long(number), ctypes.c_long(os.O_CLOEXEC | os.O_NONBLOCK)))
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return descriptor


def memory() -> Memory:
    """What /proc/meminfo says."""
    return parse_meminfo(Path("/proc/meminfo").read_text())


def parse_meminfo(text: str) -> Memory:
    """The text of /proc/meminfo -> bytes."""
    kib = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in text.splitlines())
        if rest.split()[:1]
    }
    return Memory(kib["MemTotal"] * 1024, kib.get("MemAvailable", kib.get("MemFree", 0)) * 1024)


def cpu() -> str | None:
    """Which CPU this host has, with all that it can do: equal on two hosts if a guest sees no difference. None: the
    kernel does not say."""
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        return None


def parse_cpuinfo(text: str) -> str | None:
    """The text of /proc/cpuinfo -> its first CPU's model and flags."""
    first = text.partition("\n\n")[0]
    fields = {name.strip(): rest.strip() for name, _, rest in (line.partition(":") for line in first.splitlines())}
    model, flags = fields.get("model name"), fields.get("flags")
    if not model or not flags:
        return None
    return f"{model} [{' '.join(sorted(flags.split()))}]"


def free_port(first: int, last: int, *, address: str = "::") -> int | None:
    """A TCP port in `first`..`last` that can be bound now, or None; for 0 one that the kernel chooses. It may be taken
    a moment later."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in range(first, last + 1):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as attempt:
                attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                attempt.bind((address, port))
                attempt.listen(1)  # SO_REUSEADDR lets bind pass beside a listener; listen does not
                return port or int(attempt.getsockname()[1])
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    return None


async def disk(path: str, *, qemu_img: str | None = None, timeout_s: float = VM_PROBE_S) -> DiskFacts:
    """Everything about one image that decides whether a guest can run from it here."""
    facts = await asyncio.to_thread(_disk_without_format, path)
    if not facts.exists or not facts.readable:
        return facts
    program = qemu_img or shutil.which("qemu-img")
    if program is None:
        return dataclasses.replace(facts, problem=facts.problem or "qemu-img is not installed")
    try:
        process = await asyncio.create_subprocess_exec(
            program, "info", "-U", "--output=json", "--", path,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        return dataclasses.replace(facts, problem=f"{program} cannot be started: {error.strerror}")
    try:
        async with asyncio.timeout(timeout_s):
            output, complaints = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        return dataclasses.replace(facts, problem=f"the storage did not answer within {timeout_s:g} s")
    if process.returncode != 0:
        return dataclasses.replace(facts, problem=" ".join(complaints.decode(errors="replace").split()))
    info = json.loads(output)
    return dataclasses.replace(
        facts,
        format=info["format"],
        virtual_size_bytes=info["virtual-size"],
        backing=info.get("full-backing-filename", info.get("backing-filename")),
    )


def _disk_without_format(path: str) -> DiskFacts:
    empty = DiskFacts(path, False, "missing", None, None, None, False, False, None, None, None)
    try:
        status = os.stat(path)
    except OSError as error:
        return dataclasses.replace(empty, problem=error.strerror or "cannot be examined")
    kind = "file" if stat.S_ISREG(status.st_mode) else "block" if stat.S_ISBLK(status.st_mode) else "other"
    facts = dataclasses.replace(
        empty,
        exists=True,
        kind=kind,
        size_bytes=status.st_size if kind == "file" else None,
        readable=os.access(path, os.R_OK),
        writable=os.access(path, os.W_OK) and not _is_mounted_readonly(path),
        identity=(status.st_dev, status.st_ino),
    )
    if kind == "other":
        return dataclasses.replace(facts, readable=False, problem="is neither a file nor a block device")
    try:
        if kind == "block":
            with open(path, "rb") as device:
                facts = dataclasses.replace(facts, size_bytes=device.seek(0, os.SEEK_END))
        return dataclasses.replace(facts, locks=image_locks.image_locks(path))
    except OSError as error:
        return dataclasses.replace(facts, readable=False, problem=error.strerror or "cannot be opened")


def _is_mounted_readonly(path: str) -> bool:
    try:
        return bool(os.statvfs(posixpath.dirname(path) or ".").f_flag & os.ST_RDONLY)
    except OSError:
        return False
