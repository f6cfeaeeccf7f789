"""Two real agents in one process, each with fake QEMUs, joined by a relay that a test can cut.

Theory of operation
-------------------
Host `a` reaches host `b` through `relay`. Agents are the product's own, with journals on disk; `restart` closes one
and makes a new one on the same directories, while its QEMUs go on; `stop` leaves a time in between. `crash_at` stops
an agent dead at a fact: from the moment the fact is recorded that agent carries out nothing more, until it is
restarted.

Rule 1: `check` holds at the end of every test: one process runs the guest, never two did, and the host whose QEMU
runs it is the one that keeps it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmferry.agent import control
from vmferry.agent.agent import Agent
from vmferry.agent.config import Address, AgentConfig, PeerConfig
from vmferry.agent.destination import DestinationAttempt
from vmferry.agent.host import LocalHost
from vmferry.agent.loop import AttemptLoop
from vmferry.agent.source import SourceAttempt
from vmferry.clock import Clock, SystemClock
from vmferry.core.effects import DestinationEffect, Effect
from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.pki import authority
from vmferry.testing.fake_director import Director
from vmferry.testing.fake_rescue import SocketRescue
from vmferry.testing.relay import Relay

SETTLE_S = 40.0
"""Until something is called stuck that takes a second: on a host with ten times its load it took eleven."""
MakeSite = Callable[..., Awaitable["Site"]]


class JumpClock(SystemClock):
    """Goes as the real one and leaps when it is told to; the date is the real one."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self._ahead_s

    def leap(self, seconds: float) -> None:
        """So many seconds have passed."""
        self._ahead_s += seconds


class Site:
    """Hosts `a` and `b`. Lives on the test's loop; `close` ends agents and fakes."""

    def __init__(
        self,
        directory: Path,
        profiles: dict[str, str],
        *,
        clock: Clock | None = None,
        tls: bool = False,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """`tls`: the agents have certificates; else they speak in clear text. `settings`: by host, fields of its
        agent's configuration."""
        self.directory = directory
        self.director = Director(directory)
        self.agents: dict[str, Agent] = {}
        self.relay: Relay | None = None
        self.noted: list[tuple[str, Fact]] = []
        """(host, fact) over all agents, in their order."""
        self.did: list[tuple[str, str]] = []
        """(host, effect) in the order in which they began."""
        self.marks: list[tuple[str, str]] = []
        """Both of them in one order: (host, name)."""
        self._profiles, self._clock, self._tls, self._settings = profiles, clock, tls, settings or {}
        self._crash: tuple[str, Fact] | None = None
        self._crashed: set[str] = set()
        self._changes: dict[str, asyncio.Event] = {}
        self._hooks: dict[tuple[str, Fact], Callable[[], object]] = {}
        self._moved = asyncio.Event()
        # By chance, as several runs of the tests may share a machine and no process knows of the others.
        first, second, third = os.urandom(3)
        self._address = f"127.{first % 250 + 1}.{second}.{third % 250 + 1}"

    async def start(self) -> None:
        """Agents that know each other."""
        await self.director.start()
        if self._tls:
            addresses = dict.fromkeys(("a", "b"), (self._address,))
            authority.init(self.directory / "pki", addresses, now=datetime.now(UTC))
        self.relay = Relay((self._address, 7602), listen=(self._address, 7603))
        for host in ("a", "b"):
            await self._start(host)

    async def close(self) -> None:
        """Everything ends."""
        for agent in self.agents.values():
            await agent.close()
        await self.director.close()
        if self.relay is not None:
            await asyncio.to_thread(self.relay.stop)

    async def stop(self, host: str) -> None:
        """The host has no agent, until `restart`. Its QEMUs do not notice."""
        await self.agents.pop(host).close()
        self._crashed.discard(host)

    async def restart(self, host: str) -> None:
        """A new agent on the old one's directories. Its QEMUs do not notice."""
        self._crash = None
        if host in self.agents:
            await self.stop(host)
        await self._start(host)

    async def _start(self, host: str) -> None:
        other = "b" if host == "a" else "a"
        ports = {"a": 7601, "b": 7602}
        seen_at = {"a": 7601, "b": 7603}
        machine_room = LocalHost()
        self.disks(host).mkdir(exist_ok=True)
        machine_room.rescue = SocketRescue()
        agent = Agent(
            AgentConfig(
                name=host,
                state_dir=self.directory / f"s{host}",
                runtime_dir=self.directory / host,
                listen=Address(self._address, ports[host]),
                clear_text=not self._tls,
                pki_dir=self.directory / "pki" / host if self._tls else None,
                peers={other: PeerConfig(other, (Address(self._address, seen_at[other]),))},
                qemu=str(self.director.wrapper(host, self._profiles[host])),
                disk_dir=self.disks(host),
                **{"migration_ports": (0, 0), **self._settings.get(host, {})},
            ),
            clock=self._clock,
            host=machine_room,
        )
        self._hook(host, agent)
        self.agents[host] = agent
        await agent.start()

    def disks(self, host: str) -> Path:
        """Where the host puts the copies of disks: both see one file system, so they cannot have the same paths."""
        return self.directory / f"disks-{host}"

    def _hook(self, host: str, agent: Agent) -> None:
        """Effects pass by here, so that a crashed agent does nothing and the order is seen."""
        source, destination = agent.source_hands, agent.destination_hands

        async def source_hands(attempt: SourceAttempt, effect: Effect) -> None:
            await self._before(host, effect.value)
            await source(attempt, effect)

        async def destination_hands(attempt: DestinationAttempt, effect: DestinationEffect) -> None:
            await self._before(host, effect.value)
            await destination(attempt, effect)

        agent.source_hands, agent.destination_hands = source_hands, destination_hands
        changes = self._changes[host] = asyncio.Event()
        publish = agent.publish

        def listening(name: str, data: dict[str, Any]) -> None:
            publish(name, data)
            changes.set()
            changes.clear()
            self._moved.set()

        agent.publish = listening  # type: ignore[method-assign]

    async def _before(self, host: str, effect: str) -> None:
        if host in self._crashed:
            await asyncio.Event().wait()
        self.did.append((host, effect))
        self.marks.append((host, effect))

    # --- for the patched AttemptLoop.note ---

    def on_note(self, attempt: AttemptLoop[Any], fact: Fact) -> None:
        """A fact was recorded by an attempt of one of our agents."""
        owners = [h for h, agent in self.agents.items() if getattr(attempt, "context", None) is agent]
        if not owners:
            return
        host = owners[0]
        self.noted.append((host, fact))
        self.marks.append((host, fact.value))
        self._moved.set()
        hook = self._hooks.pop((host, fact), None)
        if hook is not None:
            hook()
        if self._crash == (host, fact):
            self._crashed.add(host)
            task = asyncio.current_task()
            if task is not None and task.get_name().startswith(attempt.job):
                raise asyncio.CancelledError  # the effect that recorded it goes no further

    # --- orders ---

    def crash_at(self, host: str, fact: Fact) -> None:
        """The agent of the host does nothing more once it has recorded the fact."""
        self._crash = (host, fact)

    def when(self, host: str, fact: Fact, action: Callable[[], object]) -> None:
        """Calls `action` in the moment in which the host's agent records the fact, once."""
        self._hooks[host, fact] = action

    def part(self) -> None:
        """`a` cannot reach `b` any more."""
        assert self.relay is not None
        self.relay.refuse()
        self.relay.cut()

    def join(self) -> None:
        """It can again."""
        assert self.relay is not None
        self.relay.refuse(refusing=False)

    async def command(self, host: str, name: str, /, **arguments: Any) -> Any:
        """A command as a person gives it to the host's agent."""
        return await control.handle(self.agents[host], name, arguments)

    async def run_vm(self, name: str = "g", host: str = "a", machine: str = "pc-q35-7.2", *, more: str = "") -> None:
        """A guest of 32 MiB that runs on the host. `more`: lines of its spec."""
        path = self.directory / f"{name}.toml"
        path.write_text(f'name = "{name}"\nmemory = "32M"\nmachine = "{machine}"\naccel = "tcg"\n{more}\n')
        await self.command(host, "vm-run", path=str(path))

    async def migrate(self, to: str = "b", *, vm: str = "g", mode: str = "precopy", **more: Any) -> SourceAttempt:
        """Begins a migration."""
        source = "a" if to == "b" else "b"
        self.director.change(source, dirty=mode == "postcopy")
        await self.command(source, "vm-migrate", vm=vm, destination=to, mode=mode, **more)
        return self.agents[source].attempts[vm]

    async def migrate_without_last_pages(self) -> SourceAttempt:
        """A postcopy: the guest runs on b and both agents know it, and its last pages are held back on a."""
        self.director.script("a", {"pages": "hold"})
        attempt = await self.migrate(mode="postcopy")
        await self.noted_by("b", Fact.RUN_ACKED)
        await self.noted_by("a", Fact.RUN_ACKED)
        return attempt

    async def pages_arrive(self) -> None:
        """They may come: the job ends, and the guest runs on b alone."""
        self.director.go("a", "pages")
        await self.settle()
        await self.check("b")

    async def noted_by(self, host: str, fact: Fact) -> None:
        """Waits until an agent of the host has recorded the fact."""
        await self.until(lambda: (host, fact) in self.noted)

    async def until(self, holds: Any, *, deadline_s: float = SETTLE_S) -> None:
        """Waits until `holds()` after one of the next facts. Raises TimeoutError."""
        async with asyncio.timeout(deadline_s):
            while not holds():
                self._moved.clear()
                await self._moved.wait()

    async def until_outcome(self, attempt: SourceAttempt, outcome: Outcome) -> None:
        """Waits until the attempt's row says so."""
        await self.until_seen(attempt, lambda: attempt.outcome() is outcome)

    async def until_row(self, attempt: SourceAttempt, label: str) -> None:
        """Waits until this row holds for the attempt and its loop has entered it."""
        await self.until_seen(attempt, lambda: attempt.entered == label)

    async def until_seen(self, attempt: SourceAttempt, holds: Callable[[], bool]) -> None:
        """Waits until `holds()` of the attempt; a reading may change that without a fact, so its events are heard."""
        async with asyncio.timeout(SETTLE_S):
            while not holds():
                await self._changes[attempt.context.config.name].wait()

    async def settle(self) -> None:
        """Waits until every attempt of every agent is over. Raises TimeoutError naming the rows that are left."""
        tasks = {
            task
            for agent in self.agents.values()
            for task in agent._tasks
            if task.get_name().startswith(("source-", "destination-"))
        }
        if not tasks:
            return
        _, left = await asyncio.wait(tasks, timeout=SETTLE_S)
        if left:
            loops: list[AttemptLoop[Any]] = []
            for agent in self.agents.values():
                loops += [*agent.attempts.values(), *agent.places.values()]
            rows = [(type(x).__name__, x.current_row().label, list(x.facts)) for x in loops if not x.ended.is_set()]
            raise TimeoutError(str(rows))
        for task in tasks:
            task.result()

    # --- what must hold ---

    async def check(self, host: str | None, vm: str = "g") -> None:
        """The guest runs on this host, once, and its agent keeps it; None: nowhere any more."""
        self.director.never_two_ran()
        assert [p.host for p in self.director.running(vm)] == ([host] if host else [])
        keepers = [h for h, agent in self.agents.items() if vm in agent.vms]
        assert keepers == ([host] if host else keepers)

        def only_that_one_lives() -> bool:
            living = [p.host for p in self.director.puppets if p.vm == vm and not p.is_gone]
            return living == ([host] if host else [])

        await self.director.until(only_that_one_lives)

    def attempt(self, host: str = "a", vm: str = "g") -> SourceAttempt:
        """The newest migration away from the host."""
        return self.agents[host].attempts[vm]

    def place(self, host: str = "b", vm: str = "g") -> DestinationAttempt:
        """The newest place made on the host."""
        found = self.agents[host].place_of(vm)
        assert found is not None, f"{host} has no place for {vm}"
        return found

    def result(self, job: str) -> dict[str, Any]:
        """How a job ended."""
        return self.agents["a"].results[job]
