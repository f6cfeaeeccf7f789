"""Take over a QEMU that somebody else started: find its process, and its command line for a destination.

Theory of operation
-------------------
A QMP socket leads to its process: the kernel tells who listens there. Its command line, working directory
and program are in /proc. The kernel names the process that called listen(), which is not the QEMU when a
manager passed the socket on; then the process that holds the listening socket is searched for.

Rule 1: adopting reads and never touches: no signal, no monitor command, no file.
Rule 2: the command line is what the guest started with. Devices plugged since are not in it; compare both
sides with `hardware.py` before a migration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmferry import limits
from vmferry.errors import QemuError, SpecError
from vmferry.vm import qemuopts, rewrite
from vmferry.vm.rewrite_actions import PathKind
from vmferry.vm.runtime import RuntimePaths
from vmferry.vm.spawn import ProcessIdentity, identify

_LOADER = re.compile(r"ld(-linux.*|-musl.*|64)?\.so(\.\d+)?$|ld-\d.*\.so$")
# Options of the dynamic loader that take a value, as ld.so --help lists them.
_LOADER_VALUES = frozenset(
    {"--library-path", "--glibc-hwcaps-prepend", "--glibc-hwcaps-mask", "--inhibit-rpath", "--audit",
     "--preload", "--argv0"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class AdoptedVm:
    """A running QEMU as /proc shows it.

    `cwd` is where its relative paths count from, '' when that cannot be found out; `has_left_cwd`
    when QEMU went elsewhere after its start (-daemonize).
    `args` are QEMU's own arguments; `launcher` is what stood before the program (a dynamic loader, say),
    usually empty. `machine_option` is the machine type as written, None when it was left to QEMU.
    """

    identity: ProcessIdentity
    qemu_binary: str
    launcher: tuple[str, ...]
    args: tuple[str, ...]
    cwd: str
    machine_option: str | None
    has_left_cwd: bool = False

    @property
    def pid(self) -> int:
        """The process id."""
        return self.identity.pid

    @property
    def argv(self) -> tuple[str, ...]:
        """The whole command line as it was started."""
        return (*self.launcher, self.qemu_binary, *self.args)


def adopt(qmp_socket: str) -> AdoptedVm:
    """The process behind a QMP socket of this host.

    Connects and closes at once, which takes QEMU's only QMP slot for that moment; so call it before (not
    while) a QMP client is connected. Raises QemuError when nobody listens or /proc does not tell, SpecError
    when the listener is not a QEMU. The guest is unharmed in every case.
    """
    pid = listener_pid(qmp_socket)
    identity = identify(pid)
    if identity is None:
        raise QemuError(f"the process behind {qmp_socket} has just ended")
    try:
        cmdline = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape")
        cwd = os.readlink(f"/proc/{pid}/cwd")
        program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError as error:
        raise QemuError(f"process {pid} behind {qmp_socket} cannot be read: {error.strerror}") from error
    vm = from_cmdline(cmdline.rstrip("\0").split("\0"), program=program, cwd=cwd, identity=identity)
    if any(option.name in ("daemonize", "chroot") for option in rewrite.split_options(vm.args)):
        start = start_directory(vm.args, *_start_hints(pid))
        vm = dataclasses.replace(vm, cwd=start, has_left_cwd=start != cwd)
    if identify(pid) != identity:
        raise QemuError(f"the process behind {qmp_socket} has just ended")
    return vm


def _start_hints(pid: int) -> tuple[str, frozenset[str]]:
    """The directory that the starting shell was in, and every file that the process has open."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape")
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return "", frozenset()
    opened: set[str] = set()
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            opened.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    variables = dict(entry.partition("=")[::2] for entry in environment.split("\0"))
    return variables.get("PWD", ""), frozenset(opened)


def start_directory(args: Sequence[str], shell_directory: str, opened: frozenset[str]) -> str:
    """Where a QEMU with -daemonize was started: it has gone to / since. '' when nothing proves it. Pure.

    A directory counts as proven when a relative path of the command line leads from there to a file that
    the QEMU has open.
    """
    words = {word for text in args for word in re.split(r'[,="{}]+', text)}
    relative = sorted(word for word in words if word and not word.startswith(("/", "-")))
    candidates = [shell_directory] if shell_directory.startswith("/") else []
    for word in relative:
        candidates += sorted(path[: -len(word)] for path in opened if path.endswith(f"/{word}"))
    for candidate in candidates:
        if any(posixpath.normpath(posixpath.join(candidate, word)) in opened for word in relative):
            return posixpath.normpath(candidate)
    return ""


def from_cmdline(cmdline: Sequence[str], *, program: str, cwd: str, identity: ProcessIdentity) -> AdoptedVm:
    """What /proc says -> the VM. Pure. Raises SpecError when this is no QEMU system emulator."""
    launcher, qemu, args = _past_the_loader(cmdline, program)
    if "qemu" not in posixpath.basename(qemu) and "kvm" not in posixpath.basename(qemu):
        raise SpecError(f"process {identity.pid} runs {qemu}, which is not a QEMU", side="source")
    return AdoptedVm(identity, qemu, launcher, args, cwd, machine_option(args))


def _past_the_loader(cmdline: Sequence[str], program: str) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """Split off a dynamic loader that was called by name: its own arguments are not QEMU's."""
    if not _LOADER.match(posixpath.basename(program)):
        return (), program, tuple(cmdline[1:])
    index = 1
    while index < len(cmdline) and cmdline[index].startswith("--"):
        index += 2 if cmdline[index] in _LOADER_VALUES else 1
    if index >= len(cmdline):
        raise SpecError(f"{program} was called without a program to load", side="source")
    return tuple(cmdline[:index]), cmdline[index], tuple(cmdline[index + 1 :])


def machine_option(args: Sequence[str]) -> str | None:
    """The machine type as the command line has it, or None when QEMU chose. Raises SpecError as `rewrite`."""
    found: str | None = None
    for option in rewrite.split_options(args):
        if option.name in ("machine", "M"):
            found = qemuopts.get(qemuopts.parse(option.value or "", implied="type"), "type") or found
    return found


def pinned_machine(option: str | None, aliases: Mapping[str, str], *, default: str) -> str:
    """The versioned machine type: 'q35' -> 'pc-q35-7.2'.

    `aliases` (alias -> name) and `default` come from query-machines of the very QEMU that runs the guest.
    """
    return aliases.get(option, option) if option is not None else aliases.get(default, default)


def destination_argv(
    vm: AdoptedVm,
    *,
    qemu: str,
    machine: str,
    runtime: RuntimePaths,
    kinds: Mapping[str, PathKind] | None = None,
) -> rewrite.DestinationArgv:
    """The command line with which `qemu` on another host can take this guest in.

    `machine` is the versioned type (`pinned_machine`); `kinds` says what the paths of `host_kinds` are.
    Pure. Raises SpecError when something cannot be carried over; the guest is unharmed.
    """
    known = kinds or {}
    return rewrite.rewrite(
        vm.args,
        qemu=qemu,
        cwd=vm.cwd,
        runtime=runtime,
        machine=machine,
        has_left=vm.has_left_cwd,
        kind=lambda path: known.get(posixpath.normpath(path), "missing"),
    )


def host_kinds(vm: AdoptedVm) -> dict[str, PathKind]:
    """What every path that the command line may mean is on this host (`missing` ones are left out)."""
    found: dict[str, PathKind] = {}
    for text in vm.args:
        words = re.split(r'[,="{}:]+', text)
        for word in {text, *words}:
            if not word or "\0" in word or len(word) > 4096:
                continue
            path = posixpath.normpath(posixpath.join(vm.cwd, word))
            if os.path.isdir(path):
                found[path] = "directory"
            elif os.path.exists(path):
                found[path] = "file"
                from_root = posixpath.normpath(posixpath.join("/", word))
                if vm.has_left_cwd and os.path.exists(from_root) and os.path.samefile(path, from_root):
                    found[from_root] = "file"
    return found


def listener_pid(path: str) -> int:
    """The pid of the process that listens on a Unix socket. Raises QemuError when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(limits.VM_ADOPT_CONNECT_S)
        try:
            client.connect(path)
        except OSError as error:
            reason = error.strerror or "it does not accept a connection"
            raise QemuError(f"no QEMU listens on {path}: {reason}", cause=error) from error
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = int(struct.unpack("3i", credentials)[0])
    inodes = listening_inodes(Path("/proc/net/unix").read_text(errors="surrogateescape"), path)
    holders = [pid, *(int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != pid)]
    for holder in holders:
        if _holds_socket(holder, inodes):
            return holder
    if pid <= 0:
        raise QemuError(f"the process that listens on {path} is not visible from here")
    return pid


def listening_inodes(table: str, path: str) -> frozenset[int]:
    """The inodes of the sockets that listen on `path`, from the text of /proc/net/unix."""
    found: set[int] = set()
    for line in table.splitlines()[1:]:
        fields = line.split(None, 7)
        # Num RefCount Protocol Flags Type St Inode Path; the flag 0x10000 marks a listener.
        if len(fields) == 8 and fields[7] == path and int(fields[3], 16) & 0x10000:
            found.add(int(fields[6]))
    return frozenset(found)


def _holds_socket(pid: int, inodes: frozenset[int]) -> bool:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(f"/proc/{pid}/fd/{descriptor}") in wanted:
                return True
        except OSError:
            continue
    return False
