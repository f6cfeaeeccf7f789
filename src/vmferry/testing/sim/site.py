"""Two simulated hosts with their agents, and a person who gives orders. What a seed makes of them is in `scenario`.

Rule 1: an agent is the product's own `Agent`; nothing of it is replaced but its `Host` and its clock.
Rule 2: an agent's life is a process: `crash` ends it between any two steps, `start` begins a new one on the same disk.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmferry.agent import control
from vmferry.agent.agent import Agent
from vmferry.agent.config import Address, AgentConfig, PeerConfig
from vmferry.errors import VmferryError
from vmferry.pki import authority
from vmferry.testing.fake_profile import PROFILES
from vmferry.testing.sim.disk import Disk
from vmferry.testing.sim.host import Installed, SimClock, SimHost
from vmferry.testing.sim.kernel import Kernel, SimProcess
from vmferry.testing.sim.loop import VirtualLoop
from vmferry.testing.sim.net import Net
from vmferry.testing.sim.oracle import Oracle
from vmferry.testing.sim.qemu import SimQemu
from vmferry.testing.sim.trace import Trace

HOSTS = ("a", "b")
PORT = 7600
MIGRATION_PORTS = (49152, 49167)
MADE = datetime(2026, 1, 1, tzinfo=UTC)
VM = "g"


@functools.cache
def certificates() -> Path:
    """The authority's folder, made once in a process: an agent reads its own at its start."""
    directory = Path(tempfile.mkdtemp(prefix="vfpki"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    authority.init(directory, {host: (f"10.0.0.{number}",) for number, host in enumerate(HOSTS, 1)}, now=MADE)
    return directory


@dataclass(eq=False)
class Answer:
    """What became of a person's command. `value` and `error` are None while nobody answered."""

    command: str
    value: Any = None
    error: VmferryError | None = None
    is_there: bool = False


@dataclass(eq=False)
class Life:
    """One agent, from its start to its crash."""

    process: SimProcess
    agent: Agent | None = None
    failed: str = ""


class Script(dict[str, Any]):
    """What a host's QEMUs shall do; `cont` may be refused a number of times only."""

    refusals = 0

    def get(self, key: str, default: Any = None) -> Any:
        found = super().get(key, default)
        if key == "cont" and found and self.refusals > 0:
            self.refusals -= 1
            if self.refusals == 0:
                del self[key]
        return found


@dataclass(eq=False)
class Site:
    """Everything of one run."""

    loop: VirtualLoop
    directory: Path
    kernel: Kernel
    oracle: Oracle
    hosts: dict[str, Installed]
    lives: dict[str, Life] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    @property
    def trace(self) -> Trace:
        """What happened."""
        return self.kernel.trace

    @property
    def net(self) -> Net:
        """The ways between the hosts."""
        return self.kernel.net

    @classmethod
    def make(cls, directory: Path, seed: str, profiles: dict[str, str], latency_s: float) -> Site:
        """Two hosts without agents."""
        loop = VirtualLoop()
        trace = Trace(loop, hide=str(directory))
        net = Net(loop, random.Random(f"net {seed}"), latency_s)
        hosts = {
            name: Installed(
                name,
                PROFILES[profiles[name]],
                Disk(random.Random(f"disk {name} {seed}")),
                SimClock(loop.time),
                Script(),
                [],
            )
            for name in HOSTS
        }
        return cls(loop, directory, Kernel(loop, net, trace), Oracle(trace), hosts)

    # --- agents ---

    def start(self, host: str) -> Life:
        """A new agent of the host, on what the disk has. It is ready some virtual milliseconds later."""
        assert host not in self.lives or self.lives[host].process.is_dead, f"{host} has an agent"
        life = Life(self.kernel.start(host, "agent"))
        self.lives[host] = life
        life.process.spawn(self._live(life, host), "agent")
        return life

    def crash(self, host: str) -> None:
        """SIGKILL to the agent. Its QEMUs do not notice."""
        if host in self.lives:
            self.lives[host].process.die()

    async def _live(self, life: Life, host: str) -> None:
        other = HOSTS[1 - HOSTS.index(host)]
        installed = self.hosts[host]
        simulated = SimHost(
            self.kernel, life.process, installed, start_qemu=self._start_qemu, by_agent=self.oracle.ends
        )
        config = AgentConfig(
            name=host,
            state_dir=self.directory / f"s{host}",
            runtime_dir=self.directory / host,
            listen=Address(host, PORT),
            migration_ports=MIGRATION_PORTS,
            pki_dir=certificates() / host,
            peers={other: PeerConfig(other, (Address(other, PORT),))},
            qemu="qemu",
        )
        agent = Agent(config, clock=installed.clock, host=simulated)
        publish = agent.publish

        def listening(name: str, data: dict[str, Any]) -> None:
            self.oracle.published(life.process, name, data)
            publish(name, data)

        agent.publish = listening  # type: ignore[method-assign]
        await agent.start()
        life.agent = agent
        self.trace.tell(host, "agent is ready")

    def agent(self, host: str) -> Agent | None:
        """The agent that lives and is ready."""
        life = self.lives.get(host)
        return None if life is None or life.process.is_dead else life.agent

    def _start_qemu(self, host: str, argv: list[str]) -> SimQemu:
        installed = self.hosts[host]
        qemu = SimQemu(
            self.kernel,
            host,
            argv,
            installed.profile,
            clock=installed.clock,
            script=installed.script,
            told=self.oracle.told,
        )
        installed.qemus.append(qemu)
        self.oracle.born(qemu)
        return qemu

    # --- QEMUs ---

    def qemus(self, host: str) -> list[SimQemu]:
        """Those of the host that live, the oldest first."""
        return [qemu for qemu in self.hosts[host].qemus if not qemu.process.is_dead]

    # --- a person ---

    def command(self, host: str, name: str, then: Callable[[Answer], None] | None = None, **arguments: Any) -> Answer:
        """A command as a person gives it to the host's agent; the answer comes when it comes."""
        answer = Answer(f"{name} {arguments}")
        self.answers.append(answer)
        agent, life = self.agent(host), self.lives[host]
        if agent is None:
            self.trace.tell("person", f"{name} on {host}: no agent answers")
            return answer
        self.trace.tell("person", f"{name} on {host} {arguments}")

        async def ask() -> None:
            try:
                answer.value = await control.handle(agent, name, arguments)
            except VmferryError as error:
                answer.error = error
            answer.is_there = True
            told = f"refused: {answer.error}" if answer.error else "done"
            self.trace.tell("person", f"{name} on {host} {told}")
            if then is not None:
                then(answer)

        life.process.spawn(ask(), f"command-{name}")
        return answer
