"""The test's side of the fakes: scripts for every process, what each of them did, and who ran when.

Theory of operation
-------------------
`wrapper` writes a program that a test gives to an agent as its QEMU. Each fake calls the director's socket at its
start, gets the script of its host, and tells every step that it reaches and every start and stop of its CPUs.
`never_two_ran` is the invariant over all of that: no guest ever ran in two processes at once.

Rule 1: times are the monotonic clock, which all processes of a host share.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vmferry

_TOOL = """#!/bin/sh
if [ "$1" = info ]; then
    while [ "$1" != -- ]; do shift; done
    printf '[{"filename": "%s", "format": "qcow2"}]' "$2"
    exit
fi
base=
what=$1
while [ "$1" != -- ]; do
    [ "$1" = -b ] && base=$2
    shift
done
if [ "$what" = measure ]; then
    printf '{"required": %s}' $(($(wc -c < "$2") + 65536))
    exit
fi
length=$(printf '\\%o\\%o' $((${#base} / 256)) $((${#base} % 256)))
printf "QFI\\373\\0\\0\\0\\3\\0\\0\\0\\0\\0\\0\\0\\24\\0\\0$length%s" "$base" > "$2"
"""
"""A qemu-img that makes images of nothing but their header, which names what each lies on, and says of each that it
lies on nothing and that a copy takes what its file has, and a table."""


@dataclass
class Puppet:
    """One fake process."""

    host: str
    vm: str
    pid: int
    is_incoming: bool
    writer: asyncio.StreamWriter = field(repr=False)
    steps: list[str] = field(default_factory=list)
    runs: list[tuple[float, bool]] = field(default_factory=list)
    """(when, CPUs run from then on)."""
    is_gone: bool = False

    @property
    def is_running(self) -> bool:
        """Do its CPUs run now?"""
        return bool(self.runs) and self.runs[-1][1] and not self.is_gone

    @property
    def ever_ran(self) -> bool:
        """Did they ever?"""
        return any(running for _, running in self.runs)


class Director:
    """Lives on the test's loop; `close` ends every fake that still lives."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.puppets: list[Puppet] = []
        self._scripts: dict[str, dict[str, Any]] = {}
        self._moved = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens for fakes."""
        self._server = await asyncio.start_unix_server(self._on_connection, str(self.directory / "director.sock"))

    async def close(self) -> None:
        """Every fake ends as its socket closes."""
        if self._server is not None:
            self._server.close()
        for puppet in self.puppets:
            if not puppet.is_gone:
                puppet.writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def wrapper(self, host: str, profile: str) -> Path:
        """A program to be used as the QEMU of `host`."""
        path = self.directory / f"qemu-{host}-{profile}"
        source = Path(vmferry.__file__).parent.parent
        if path.exists():
            return path  # a shell may be reading it at this moment
        path.write_text(
            "#!/bin/sh\n"
            f"export VMFERRY_FAKE_PROFILE={profile} VMFERRY_FAKE_HOST={host} PYTHONPATH={source}\n"
            f"export VMFERRY_FAKE_DIRECTOR={self.directory}/director.sock\n"
            f'exec {sys.executable} -sS -m vmferry.testing.fake_qemu "$@"\n'
        )
        path.chmod(0o755)
        tool = self.directory / "qemu-img"
        tool.write_text(_TOOL)
        tool.chmod(0o755)
        return path

    # --- orders ---

    def script(self, host: str, steps: dict[str, Any] | None = None, **more: Any) -> None:
        """What every fake of the host does from now on, also those that run already."""
        self._scripts[host] = {"steps": steps or {}, **more}
        for puppet in self._living(host):
            self._send(puppet, {"script": self._scripts[host]})

    def change(self, host: str, **more: Any) -> None:
        """Some keys of the host's script; the others stay."""
        self.script(host, **{**self._scripts.get(host, {}), **more})

    def go(self, host: str, step: str) -> None:
        """Lets the fakes of the host leave a step at which they hold (or will hold next)."""
        for puppet in self._living(host):
            self._send(puppet, {"go": step})

    async def kill(self, puppet: Puppet) -> None:
        """The process crashes now; returns when it is gone."""
        self._send(puppet, {"die": True})
        await self.until(lambda: puppet.is_gone)

    # --- what is seen ---

    def newest(self, host: str, *, incoming: bool | None = None) -> Puppet:
        """The youngest process of the host."""
        found = [p for p in self.puppets if p.host == host and incoming in (None, p.is_incoming)]
        assert found, f"{host} has no process"
        return found[-1]

    async def reached(self, host: str, step: str, *, times: int = 1) -> None:
        """Waits until the fakes of the host reached the step so often."""
        await self.until(lambda: sum(p.steps.count(step) for p in self.puppets if p.host == host) >= times)

    async def until(self, holds: Any, *, deadline_s: float = 20.0) -> None:
        """Waits until `holds()` after one of the next messages. Raises TimeoutError."""
        async with asyncio.timeout(deadline_s), self._moved:
            await self._moved.wait_for(holds)

    def running(self, vm: str) -> list[Puppet]:
        """The processes in which the guest runs now."""
        return [p for p in self.puppets if p.vm == vm and p.is_running]

    def never_two_ran(self) -> None:
        """Raises AssertionError if a guest ever ran in two processes at once."""
        for vm in {puppet.vm for puppet in self.puppets}:
            moments = sorted((at_s, running, p.pid) for p in self.puppets if p.vm == vm for at_s, running in p.runs)
            active: set[int] = set()
            for at_s, running, pid in moments:
                if running:
                    assert not active, f"{vm} ran in {active} when {pid} started at {at_s}"
                    active.add(pid)
                else:
                    active.discard(pid)

    # --- inside ---

    def _living(self, host: str) -> list[Puppet]:
        return [p for p in self.puppets if p.host == host and not p.is_gone]

    def _send(self, puppet: Puppet, message: dict[str, Any]) -> None:
        if not puppet.writer.is_closing():
            puppet.writer.write(json.dumps(message).encode() + b"\n")

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        hello = json.loads(await reader.readline())
        puppet = Puppet(hello["host"], hello["hello"], int(hello["pid"]), bool(hello["incoming"]), writer)
        self.puppets.append(puppet)
        self._send(puppet, {"script": self._scripts.get(puppet.host, {})})
        try:
            while line := await reader.readline():
                await self._take(puppet, json.loads(line))
        except OSError:
            pass  # a killed process may leave with a reset
        finally:
            self._tasks.discard(task)
            puppet.is_gone = True
            writer.close()
        async with self._moved:
            self._moved.notify_all()

    async def _take(self, puppet: Puppet, message: dict[str, Any]) -> None:
        if "step" in message:
            puppet.steps.append(str(message["step"]))
        if "running" in message:
            puppet.runs.append((float(message["at_s"]), bool(message["running"])))
        async with self._moved:
            self._moved.notify_all()
