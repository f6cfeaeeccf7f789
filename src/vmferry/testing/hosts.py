"""Two hosts with a real agent each, and everything that a test asks of them.

Theory of operation
-------------------
A `TwoAgents` is a pair of network namespaces (`netns`), each with a `vmferry agent` process, its own state and
runtime directory under one short folder, and a QEMU of its own choice. Commands of people go through the real
command line (`AgentHost.cli`), scripts through the control socket (`AgentHost.client`), and what the agents tell
is awaited with `Follower`: an event or a deadline, never a pause.

Rule 1: whatever belongs to a pair has its folder on the command line; only such processes are ever killed.
Rule 2: `left_behind` says in words what a test left, so that a leak is a failure of the test that made it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmferry.errors import VmferryError
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.codec import Event
from vmferry.testing import bootsector, linux_guest
from vmferry.testing.guest_report import Chunk, GuestReport, analyse_chain
from vmferry.testing.host_tools import default_cache
from vmferry.testing.netns import Host, TwoHosts
from vmferry.testing.qemus import available
from vmferry.testing.serial_log import SerialReader

QEMUS = available()
OLDEST, NEWEST = next(iter(QEMUS), ""), next(reversed(QEMUS), "")
PAIRS = [(OLDEST, OLDEST), (NEWEST, NEWEST), (OLDEST, NEWEST)] if OLDEST != NEWEST else [(OLDEST, OLDEST)]
"""The matrix: source's and destination's QEMU."""

AGENT_PORT = 7600
MIGRATION_PORTS = (49152, 49167)
START_S = 20.0
COMMAND_S = 60.0
WAIT_S = 20.0
POLL_S = 0.005
OVER = ("completed", "cancelled", "failed")


@dataclass(frozen=True, slots=True)
class CliResult:
    """What one command of the command line gave."""

    code: int
    out: str
    err: str
    took_s: float

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON object that `--json` promises."""
        found = json.loads(self.out)
        assert isinstance(found, dict), self.out
        return found

    @property
    def error(self) -> dict[str, Any]:
        """The error of a command with `--json`."""
        error = self.json["error"]
        assert isinstance(error, dict), self.out
        return error


class Follower:
    """One session with an agent's control socket that keeps every event it heard, in order."""

    def __init__(self, path: Path) -> None:
        self.client = BlockingClient(str(path), name="the agent")
        self.heard: list[Event] = []

    def until(self, wanted: Callable[[Event], bool], *, timeout_s: float = WAIT_S) -> Event:
        """The first event, heard already or to come, that is wanted. Raises AssertionError at the deadline."""
        for event in self.heard:
            if wanted(event):
                return event
        for event in self.client.events(timeout_s):
            self.heard.append(event)
            if wanted(event):
                return event
        told = "\n  ".join(f"{e.name} {brief_of(e.data)}" for e in self.heard[-12:])
        raise AssertionError(f"not within {timeout_s} s; the last events were:\n  {told}")

    def status(self, *words: str, role: str | None = None, timeout_s: float = WAIT_S) -> Event:
        """Waits for a MIGRATION event with one of these statuses, of the source or (`role`) the destination."""
        return self.until(
            lambda e: e.name == "MIGRATION" and e.data.get("status") in words and e.data.get("role") == role,
            timeout_s=timeout_s,
        )

    def end(self, *, timeout_s: float = 60) -> dict[str, Any]:
        """Waits for the end of a job; its wire form."""
        return dict(self.until(lambda e: e.name == "JOB_ENDED", timeout_s=timeout_s).data)

    def statuses(self, *, role: str | None = None) -> list[str]:
        """The statuses told so far, in order."""
        return [
            str(e.data["status"]) for e in self.heard if e.name == "MIGRATION" and e.data.get("role") == role
        ]  # fmt: skip

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 30) -> Any:
        """One command; events that come meanwhile are kept."""
        return self.client.execute(command, arguments, deadline_s=timeout_s, on_event=self.heard.append)

    def forget(self) -> None:
        """What was heard so far is of no interest any more."""
        for event in self.client.events(0):
            self.heard.append(event)
        self.heard.clear()

    def close(self) -> None:
        """Ends the session."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def brief_of(data: Mapping[str, Any]) -> str:
    """An event's data in one short line."""
    return " ".join(f"{k}={data[k]}" for k in ("vm", "host", "role", "status", "row", "outcome") if data.get(k))


def wait_true(what: Callable[[], Any], *, timeout_s: float = WAIT_S, why: str = "") -> Any:
    """Looks until it is true, for facts that nobody tells by an event (a process table, a foreign QEMU)."""
    end_s = time.monotonic() + timeout_s
    while True:
        found = what()
        if found:
            return found
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {timeout_s} s: {why or what}")
        select.select([], [], [], POLL_S)


@dataclass(slots=True)
class AgentHost:
    """One host: a namespace, an agent process, its folders, its QEMU."""

    name: str
    net: Host
    folder: Path
    qemu: Path
    flags: list[str] = field(default_factory=list)
    hidden: Path | None = None
    """A directory in whose place this host's agent and QEMUs see an empty one."""
    over: tuple[Path, Path] | None = None
    """(what, where): in place of the second directory this host's agent and QEMUs see the first one."""
    process: subprocess.Popen[bytes] | None = None
    ready_count: int = 0

    @property
    def runtime(self) -> Path:
        return self.folder / "run"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def socket(self) -> Path:
        return self.runtime / "agent.sock"

    @property
    def log_path(self) -> Path:
        return self.folder / "agent.log"

    # --- the agent's process ---

    def agent_argv(self) -> list[str]:
        """The command that runs this host's agent."""
        return [
            sys.executable, "-m", "vmferry.cli.main", "agent", "--name", self.name,
            "--state-dir", str(self.state), "--runtime-dir", str(self.runtime), "--qemu", str(self.qemu),
            "--migration-ports", f"{MIGRATION_PORTS[0]}-{MIGRATION_PORTS[1]}", *self.flags,
        ]  # fmt: skip

    def start(self) -> None:
        """Starts the agent and returns at once; `wait_ready` follows."""
        assert self.process is None or self.process.poll() is not None, "it runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            argv = self.agent_argv()
            if self.hidden is not None:  # `ip netns exec` has made a mount namespace for it
                argv = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(self.hidden), *argv]
            if self.over is not None:
                argv = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', *map(str, self.over), *argv]
            self.process = self.net.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_ready(self) -> None:
        """Until the agent says that it listens. Raises AssertionError with its log if it ends instead."""
        self.ready_count += 1
        wait_true(
            lambda: self.is_dead or self.log().count("result=ready") >= self.ready_count,
            timeout_s=START_S,
            why=f"{self.name} is not ready",
        )
        assert not self.is_dead, self.log()[-2000:]

    @property
    def is_dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """To the agent's process."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL and gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """A new agent on the same folders."""
        self.start()
        self.wait_ready()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # --- commands ---

    def cli(self, *words: str, timeout_s: float = COMMAND_S, socket: bool = True) -> CliResult:
        """One command of the real command line against this host's agent, to its end."""
        return run_cli(*words, environment={"VMFERRY_SOCKET": str(self.socket)} if socket else {}, timeout_s=timeout_s)

    def ok(self, *words: str, timeout_s: float = COMMAND_S) -> dict[str, Any]:
        """The same with `--json`; it must succeed."""
        done = self.cli(*words, "--json", timeout_s=timeout_s)
        assert done.code == 0, f"{words}: {done.code}\n{done.out}\n{done.err}"
        return done.json

    def refused(self, *words: str, code: int, timeout_s: float = COMMAND_S) -> dict[str, Any]:
        """The same; it must fail with this exit code. The error's wire form."""
        done = self.cli(*words, "--json", timeout_s=timeout_s)
        assert done.code == code, f"{words}: {done.code}, not {code}\n{done.out}\n{done.err}"
        return done.error

    def cli_start(self, *words: str) -> subprocess.Popen[str]:
        """A command that goes on beside the test."""
        return self.net.popen(
            cli_argv(*words),
            env={**os.environ, "VMFERRY_SOCKET": str(self.socket)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def follow(self) -> Follower:
        """A session with the control socket."""
        return Follower(self.socket)

    def execute(self, command: str, **arguments: Any) -> Any:
        """One QMP command of the agent."""
        with self.follow() as session:
            return session.execute(command, {k.replace("_", "-"): v for k, v in arguments.items()})

    # --- VMs here ---

    def vm_directory(self, vm: str) -> Path:
        """The newest runtime directory of the VM on this host."""
        found = sorted((self.runtime / "vms").glob(f"{vm}-*"), key=lambda p: p.stat().st_ctime_ns)
        assert found, f"{self.name} has no directory of {vm}"
        return found[-1]

    def qemu_pid(self, vm: str) -> int:
        """The process of the VM's QEMU here. Raises AssertionError if there is not exactly one."""
        found = [pid for pid, words in processes_of(self.runtime).items() if f"/{vm}-" in words and "qmp.sock" in words]
        assert len(found) == 1, f"{self.name} has {len(found)} QEMUs of {vm}"
        return found[0]

    def qemus(self) -> dict[int, str]:
        """Every QEMU of this host: process id to command line."""
        return {p: words for p, words in processes_of(self.runtime).items() if "qmp.sock" in words}

    def console(self, vm: str) -> SerialReader:
        """Follows the guest's serial log on this host."""
        return SerialReader.follow(self.vm_directory(vm) / "serial.log")

    def status(self, vm: str) -> dict[str, Any]:
        """`vm-status` as the agent gives it."""
        return dict(self.execute("vm-status", vm=vm))

    def listening(self) -> set[int]:
        """TCP ports on which something listens at this host's addresses."""
        lines = self.net.run(["ss", "-Hltn"]).splitlines()
        ends = [line.split()[3] for line in lines if line.strip()]
        mine = [end for end in ends if self.net.kind == "netns" or end.startswith(f"{self.net.address}:")]
        return {int(end.rpartition(":")[2]) for end in mine}


def cli_argv(*words: str) -> list[str]:
    """The command line's command."""
    return [sys.executable, "-m", "vmferry.cli.main", *words]


def run_cli(*words: str, environment: Mapping[str, str] | None = None, timeout_s: float = COMMAND_S) -> CliResult:
    """One command of the real command line, to its end."""
    began_s = time.monotonic()
    done = subprocess.run(
        cli_argv(*words),
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    return CliResult(done.returncode, done.stdout, done.stderr, time.monotonic() - began_s)


def processes_of(folder: Path) -> dict[int, str]:
    """Processes with the folder in their command line: process id to command line."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if f"{folder}/" in words and not is_zombie(int(entry.name)):
                    found[int(entry.name)] = words
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """While the block runs the process does not."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_true(lambda: process_state(pid) == "T", why=f"process {pid} is stopped")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def process_state(pid: int) -> str:
    """The kernel's letter for what the process does. Raises OSError once it is reaped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_zombie(pid: int) -> bool:
    """Whether the process has ended and only waits to be reaped. Raises OSError once it is reaped."""
    return process_state(pid) == "Z"


class TwoAgents:
    """`with TwoAgents(qemus, pki=…) as pair:` gives `pair.a` and `pair.b`, ready."""

    def __init__(
        self,
        qemu_a: Path,
        qemu_b: Path,
        *,
        pki: Path | None,
        cache: Path | None = None,
        flags_a: Sequence[str] = (),
        flags_b: Sequence[str] = (),
        pki_of: Mapping[str, Path] | None = None,
        hidden_b: Path | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vf-", dir="/tmp"))
        self.hosts = TwoHosts.create()
        self._cache = cache
        self._qmp_checked: dict[str, list[str]] = {}
        self.may_leave = ""
        """Why a test leaves something behind on purpose."""
        trust = ["--clear-text"] if pki is None else []
        pairs = (("a", self.hosts.a, self.hosts.b, qemu_a, flags_a), ("b", self.hosts.b, self.hosts.a, qemu_b, flags_b))
        made: list[AgentHost] = []
        for letter, net, peer, qemu, flags in pairs:
            name, other = f"host-{letter}", "host-b" if letter == "a" else "host-a"
            words = ["--listen", f"{net.address}:{AGENT_PORT}", "--peer", f"{other}={peer.address}:{AGENT_PORT}"]
            if pki is not None:
                words += ["--pki", str((pki_of or {}).get(name, pki / name))]
            host = AgentHost(name, net, self.folder / letter, qemu, [*words, *trust, "--log-level", "debug", *flags])
            self._warm(host)
            made.append(host)
        self.a, self.b = made
        self.b.hidden = hidden_b

    def start(self) -> None:
        """Both agents, side by side."""
        for host in (self.a, self.b):
            host.start()
        for host in (self.a, self.b):
            host.wait_ready()

    def other(self, host: AgentHost) -> AgentHost:
        """The other one."""
        return self.b if host is self.a else self.a

    def _warm(self, host: AgentHost) -> None:
        """What an earlier agent found out about the same QEMU, which takes a new one half a second."""
        host.state.mkdir(parents=True)
        if self._cache is not None and (kept := self._cache / _tag(host.qemu)).is_dir():
            shutil.copytree(kept, host.state, dirs_exist_ok=True)

    def _keep_facts(self, host: AgentHost) -> None:
        if self._cache is None or (self._cache / _tag(host.qemu)).exists() or not host.state.is_dir():
            return
        not_facts = shutil.ignore_patterns("journal*", "repository", "disks", "first-touches")
        shutil.copytree(host.state, self._cache / _tag(host.qemu), ignore=not_facts)

    # --- judging ---

    def judge(self, *directories: Path) -> GuestReport:
        """How the Linux guest lived, from the serial logs of these runtime directories, in the order of its way."""
        return analyse_chain([[Chunk(0.0, (folder / "serial.log").read_bytes())] for folder in directories])

    def letters(self, *directories: Path) -> bytes:
        """What the boot-sector guest wrote, joined in the order of its way."""
        return b"".join((folder / "serial.log").read_bytes() for folder in directories)

    def running_on(self, vm: str) -> list[str]:
        """The hosts on which the VM's CPUs run right now, by QEMU's own word through the agents."""

        def rows() -> list[dict[str, Any]] | None:
            listed = self.a.execute("vm-list")
            found = [row for row in listed["vms"] if row["vm"] == vm]
            told = all(host["answers"] for host in listed["hosts"])
            return (
                found
                if told and found and not any(row["run_state"] in ("silent", "incoming") for row in found)
                else None
            )

        found: list[dict[str, Any]] = wait_true(rows, why=f"every host tells of {vm}")
        return [row["host"] for row in found if row["run_state"] == "running"]

    def left_behind(self) -> list[str]:
        """What is there beside two idle agents and the VMs that they keep, in words; empty is clean."""
        found: list[str] = []
        for host in (self.a, self.b):
            if host.is_dead:
                continue
            listed = host.execute("vm-list", local=True)["vms"]
            kept = [host.status(row["vm"]) for row in listed if row["run_state"] not in ("incoming", "gone")]
            found += [f"{host.name}: {row['vm']} is {row['run_state']}" for row in listed if row["doing"]]
            pids = {int(vm["pid"]) for vm in kept}
            found += [f"{host.name}: process {p}: {words[:90]}" for p, words in host.qemus().items() if p not in pids]
            found += [f"{host.name}: port {port}" for port in host.listening() - {AGENT_PORT}]
            found += _files_left(host, {str(vm["directory"]) for vm in kept})
            self._qmp_checked |= {
                f"{host.name}/{vm['vm']}": [vm["qmp"]] for vm in kept if vm["generation"] == 1 and vm["directory"]
            }
        return found

    def options_left(self) -> list[str]:
        """Migration options that a QEMU still has although its guest never left. Only once the agents are gone:
        a QEMU talks to one client at a time."""
        found: list[str] = []
        for name, (path,) in self._qmp_checked.items():
            try:
                with BlockingClient(path, deadline_s=5) as qemu:
                    states = qemu.execute("query-migrate-capabilities")
                    values = qemu.execute("query-migrate-parameters")
            except VmferryError:
                continue  # its QEMU ended since
            found += [f"{name}: capability {c['capability']}" for c in states if c["state"]]
            found += [f"{name}: {key}={values[key]}" for key in ("tls-creds", "tls-hostname") if values.get(key)]
        return found

    # --- the end ---

    def close(self) -> None:
        """Kills the agents and every process that belongs to the folder; takes the hosts away."""
        for host in (self.a, self.b):
            if not host.is_dead:
                assert host.process is not None
                host.process.send_signal(signal.SIGCONT)
                host.process.terminate()
        for host in (self.a, self.b):
            if host.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    host.process.wait(10)
                if host.process.poll() is None:
                    host.kill()
            self._keep_facts(host)

    def remove(self) -> list[str]:
        """After `close`: ends what is left of the pair. What should have been gone and is not, in words."""
        for pid in processes_of(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_true(lambda: not processes_of(self.folder), why="killed processes are still there")
        names = {self.hosts.a.name, self.hosts.b.name}
        self.hosts.close()
        left = [f"namespace {entry.name}" for entry in _namespaces() if entry.name in names]
        shutil.rmtree(self.folder)
        return left


MakePair = Callable[..., TwoAgents]
"""What the fixture `make_pair` gives."""


class Guests:
    """Writes specs of small guests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def boot(
        self, name: str = "web1", *, memory_mib: int = 32, ram_mib: int = 16, delay: int = 20_000, more: str = ""
    ) -> str:
        """The boot-sector guest: starts in no time, dirties `ram_mib`, and writes a letter per pass."""
        image = self.folder / f"{name}.img"
        bootsector.write_image(image, ram_mib=ram_mib, delay_loops_per_page=delay)
        disk = f'[[disk]]\npath = "{image}"\nboot = 0\n'
        return self.write(name, f'memory = "{memory_mib}M"\naccel = "tcg"\n{more}\n{disk}')

    def linux(
        self,
        name: str = "web1",
        *,
        memory_mib: int = 128,
        dirty_mib_per_s: int = 5,
        disk: bool = True,
        more: str = "",
        fixed_layout: bool = False,
    ) -> str:
        """The Linux guest, which checks its memory and (with a disk) what it wrote there."""
        guest = linux_guest.build(default_cache())
        cmdline = linux_guest.cmdline(
            disk="vda" if disk else None,
            dirty_mib_per_s=dirty_mib_per_s,
            ram_mib=8,
            const_mib=4,
            disk_blocks=16,
            fixed_layout=fixed_layout,
        )
        text = f'memory = "{memory_mib}M"\naccel = "tcg"\n{more}\n'
        text += f'[kernel]\nimage = "{guest.kernel}"\ninitrd = "{guest.initrd}"\ncmdline = "{cmdline}"\n'
        if disk:
            image = self.folder / f"{name}.img"
            with image.open("wb") as file:
                file.truncate(16 << 20)
            text += f'[[disk]]\npath = "{image}"\n'
        return self.write(name, text)

    def write(self, name: str, text: str) -> str:
        """A spec file; its path."""
        path = self.folder / f"{name}.toml"
        path.write_text(f'name = "{name}"\n{text}')
        return str(path)


def boot(host: AgentHost, spec: str, *, letters: int = 2) -> dict[str, Any]:
    """Starts a boot-sector guest on the host and waits until it has made some passes."""
    wire = host.ok("run", spec)
    with host.console(wire["vm"]) as console:
        console.wait_bytes(letters, timeout_s=20)
    return wire


def _namespaces() -> Iterator[os.DirEntry[str]]:
    return iter(os.scandir("/run/netns")) if os.path.isdir("/run/netns") else iter(())


def _files_left(host: AgentHost, kept: set[str]) -> list[str]:
    """Files of jobs, and runtime directories of VMs that are not here, unless only logs are in them."""
    found = [f"{host.name}: {path}" for path in (host.runtime / "jobs").rglob("*")]
    for folder in (host.runtime / "vms").iterdir():
        if str(folder) not in kept:
            found += [f"{host.name}: {path}" for path in folder.iterdir() if path.suffix != ".log"]
            found += [f"{host.name}: {folder} (empty)"] if not any(folder.iterdir()) else []
    return found


def _tag(program: Path) -> str:
    return re.sub(r"[^a-z0-9.]", "-", str(program).lower())
