"""Two hosts on this machine with a real agent each, in a folder of their own.

Theory of operation
-------------------
The hosts are network namespaces (`testing.netns`), or loopback addresses where those are not possible. The
certificates come from `vmferry pki`, the agents are `vmferry agent` processes, and everything that people do
goes through the `vmferry` command as they would run it.

Rule 1: everything lies in one folder with a name that nobody else has. A process of ours has that folder in
        its command line, and `close` ends exactly those processes: QEMUs outlive their agents on purpose.
Rule 2: `close` is complete also when the start was interrupted half-way, and may be called again.
Rule 3: orphans become children of this process while a pair exists (it is their subreaper), so that a QEMU whose
        agent has ended is reaped here and not left to a container's first process, which may not care.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmferry.errors import Unfit, from_wire
from vmferry.testing import linux_guest, qemus
from vmferry.testing.host_tools import HostToolError, default_cache
from vmferry.testing.netns import Host, TwoHosts
from vmferry.testing.serial_log import SerialReader, SerialTimeoutError
from vmferry.vm import spawn as vm_spawn

PORT = 7600
READY_S = 20.0
END_S = 10.0
"""How long an agent may take to end before it is killed."""
COMMAND_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(slots=True)
class AgentHost:
    """One of the two: its network, its folder, its agent."""

    name: str
    net: Host
    folder: Path
    agent: subprocess.Popen[bytes] | None = None

    @property
    def socket_path(self) -> Path:
        """The agent's control socket."""
        return self.folder / "run" / "agent.sock"

    @property
    def vm_folder(self) -> Path:
        """Where the runtime directories of VMs appear."""
        return self.folder / "run" / "vms"

    @property
    def disks(self) -> Path:
        """Where copies of disks may be put."""
        return self.folder / "disks"

    @property
    def log_path(self) -> Path:
        """What the agent says."""
        return self.folder / "agent.log"

    @property
    def agent_pid(self) -> int:
        """The agent's process."""
        assert self.agent is not None, "the agents have been started"
        return self.agent.pid

    def command(self, *words: str) -> list[str]:
        """The `vmferry` command for this host's agent."""
        return [*vmferry_command(), words[0], "--socket", str(self.socket_path), *words[1:]]

    def vmferry(self, *words: str) -> dict[str, Any]:
        """Runs a command with --json to its end. Raises its error."""
        done = subprocess.run(
            self.command(*words, "--json"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_S,
        )
        return read_answer(words[0], done.returncode, done.stdout, done.stderr)


def read_answer(what: str, code: int, out: str, err: str) -> dict[str, Any]:
    """The one JSON object of a command. Raises the error in it, or Unfit when there is no such object."""
    try:
        wire = json.loads(out)
    except ValueError:
        raise Unfit(f"vmferry {what} ended with {code} and without an answer", cause=err.strip() or out) from None
    if code != 0 and wire.get("error"):
        raise from_wire(wire["error"])
    if code != 0:
        raise Unfit(f"vmferry {what} ended with {code}", cause=json.dumps(wire))
    return dict(wire)


def vmferry_command() -> list[str]:
    """The installed `vmferry`, beside the Python that runs now; else the module."""
    script = Path(sys.executable).with_name("vmferry")
    return [str(script)] if script.exists() else [sys.executable, "-m", "vmferry.cli.main"]


def choose_qemu() -> str:
    """$VMFERRY_QEMU, else the newest one of this machine. Raises Unfit when there is none."""
    chosen = os.environ.get("VMFERRY_QEMU", "")
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise Unfit(f"VMFERRY_QEMU is {chosen}, which is no program", hint="name a QEMU, or unset VMFERRY_QEMU")
        return str(Path(found).absolute())
    try:
        known = qemus.available()
    except (HostToolError, AssertionError) as error:
        raise Unfit("a QEMU of this machine does not start", cause=error) from error
    if not known:
        raise Unfit("this machine has no QEMU", hint="run 'make setup' as root")
    return str(list(known.values())[-1])


def find_guest() -> linux_guest.LinuxGuest:
    """The Linux guest that 'make setup' built. Raises Unfit."""
    try:
        guest = linux_guest.built(default_cache())
    except HostToolError as error:
        raise Unfit(str(error)) from error
    if guest is None:
        raise Unfit("the Linux guest of the demo is not built, or older than its sources", hint="run 'make setup'")
    return guest


class TwoAgents:
    """`with TwoAgents(qemu) as pair:` gives two hosts whose agents are ready and know each other."""

    def __init__(self, qemu: str, *, clear_text: bool = False, disk_dirs: bool = False) -> None:
        """`disk_dirs`: each host puts copies of disks into a folder of its own, as both see one file system."""
        self.qemu, self.clear_text, self.disk_dirs = qemu, clear_text, disk_dirs
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-demo-", dir=_scratch()))
        self._nets: TwoHosts | None = None
        _adopt_orphans(True)
        try:
            self._nets = TwoHosts.create()
            self.a = AgentHost("host-a", self._nets.a, self.folder / "a")
            self.b = AgentHost("host-b", self._nets.b, self.folder / "b")
            self._start()
        except HostToolError as error:
            self.close()
            raise Unfit("two hosts cannot be made on this machine", cause=error) from error
        except BaseException:
            self.close()
            raise

    @property
    def kind(self) -> str:
        """What the hosts are, in words."""
        is_real = self._nets is not None and self._nets.kind == "netns"
        return "network namespaces with a cable between them" if is_real else "loopback addresses"

    def _start(self) -> None:
        hosts = (self.a, self.b)
        ports = {host.name: PORT if host.net.kind == "netns" else _free_port(host.net.address) for host in hosts}
        if not self.clear_text:
            pairs = [f"{host.name}={host.net.address}" for host in hosts]
            _run([*vmferry_command(), "pki", str(self.folder / "pki"), *pairs, "--json"])
        for host, other in ((self.a, self.b), (self.b, self.a)):
            host.disks.mkdir(parents=True)
            disk_dir = ["--disk-dir", str(host.disks)] if self.disk_dirs else []
            trust = ["--clear-text"] if self.clear_text else ["--pki", str(self.folder / "pki" / host.name)]
            with host.log_path.open("wb") as log:
                host.agent = host.net.popen(
                    [
                        *vmferry_command(), "agent", "--name", host.name,
                        "--listen", f"{host.net.address}:{ports[host.name]}",
                        "--peer", f"{other.name}={other.net.address}:{ports[other.name]}",
                        "--state-dir", str(host.folder / "state"), "--runtime-dir", str(host.folder / "run"),
                        "--qemu", self.qemu, *trust, *disk_dir,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for us; we end the agents in good order
                )  # fmt: skip
        for host in hosts:
            self._wait_ready(host)

    def _wait_ready(self, host: AgentHost) -> None:
        """Until the agent's log says so. Raises Unfit with its last words when it ends instead."""
        assert host.agent is not None
        with SerialReader.follow(host.log_path) as log:
            for _ in range(int(READY_S / 0.5)):
                with contextlib.suppress(SerialTimeoutError):
                    log.wait_for(lambda line: b"result=ready" in line.raw, timeout_s=0.5)
                    return
                if host.agent.poll() is not None:
                    break
        words = host.log_path.read_text(errors="replace").strip().splitlines()
        raise Unfit(f"the agent of {host.name} does not start", cause=" ".join(words[-3:]) or None)

    def other(self, host: AgentHost) -> AgentHost:
        """The other one."""
        return self.b if host is self.a else self.a

    def close(self) -> None:
        """Ends agents and QEMUs, takes the hosts and the folder away. A signal meanwhile waits until it is done."""
        with _signals_wait():
            for host in (getattr(self, "a", None), getattr(self, "b", None)):
                if host is not None and host.agent is not None:
                    _end(host.agent)
            kill_processes_of(self.folder)
            if self._nets is not None:
                self._nets.close()
            _adopt_orphans(False)
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def kill_processes_of(folder: Path) -> None:
    """SIGKILL to every process with the folder in its command line (but this one), and waits for their end."""
    mark = os.fsencode(f"{folder}/")
    killed: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        identity = vm_spawn.identify(int(entry.name))
        try:
            is_ours = identity is not None and mark in (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        pidfd = vm_spawn.open_process(identity) if identity is not None and is_ours else None
        if pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            killed.append(pidfd)
    for pidfd in killed:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(END_S * 1000)
        vm_spawn.reap(pidfd)
        os.close(pidfd)


def _adopt_orphans(wanted: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM stay pending while the block runs, so that nothing is left behind half-way."""
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(argv: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(
        list(argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=COMMAND_S
    )
    return read_answer(argv[1], done.returncode, done.stdout, done.stderr)


def _free_port(address: str) -> int:
    with socket.socket() as trial:
        trial.bind((address, 0))
        return int(trial.getsockname()[1])


def _scratch() -> str | None:
    """/tmp may be memory, on which a disk cannot be opened for direct I/O; /var/tmp is a disk by convention."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else None)
