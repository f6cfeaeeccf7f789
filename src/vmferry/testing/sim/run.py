"""One seed, from two empty hosts to a verdict.

Theory of operation
-------------------
1. a guest is started on host a, and a migration to b is asked for
2. *safety phase*: what the scenario says goes wrong goes wrong
3. *liveness phase*: faults stop, everything is healed, agents are restarted; then nothing but the agents acts, and a
   person who takes the action that a row names, and only such a one
4. the guest must run on exactly one side, or be lost with every complete copy of it, by faults; nobody may be left
   with a process, a connection or a file of the migration
5. a guest that runs is moved once more, to the other side, without any fault

Rule 1: `run(seed)` gives the same trace in every process on every machine.
"""

from __future__ import annotations

import gc
import logging
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.agent.agent import Agent
from vmferry.agent.loop import AttemptLoop
from vmferry.agent.source import SourceAttempt
from vmferry.core.status import source_status
from vmferry.core.table import Remedy
from vmferry.testing.sim.faults import Injector, heal
from vmferry.testing.sim.loop import Spinning, Stalled, pass_s
from vmferry.testing.sim.scenario import Scenario, draw
from vmferry.testing.sim.site import HOSTS, VM, Site
from vmferry.testing.sim.trace import LogTrace

READY_S = 1.0
SAFETY_S = 40.0
"""Longer than every limit of the tables but those of half a minute."""
LIVENESS_S = 400.0
HEALS_S = 2.0
"""From the moment in which the stream gets through again to two QEMUs that are joined."""
PERSON_S = 20.0
"""How long a row must stay before a person acts on it."""
SPEC = 'name = "g"\nmemory = "32M"\nmachine = "pc-q35-7.2"\naccel = "tcg"\n'
DISK = '[[disk]]\npath = "/images/{name}.img"\nshared = false\n'
IMAGES = ("one", "two")
RESCUE = re.compile(r"vmferry rescue NAME (\S+)")
NOT_SIMULATED = frozenset({"feed"})
"""Rescue tools that read memory: fake QEMUs have none. A run that ends at one is told apart."""


@dataclass
class Verdict:
    """What became of a seed."""

    seed: str
    ok: bool = True
    faults: list[str] = field(default_factory=list)
    """Those that were injected."""
    virtual_ms: float = 0.0
    outcome: str = ""
    """'a', 'b': the guest is there; 'lost'; 'waits: ROW' for a person's hands that the simulator has not."""
    violations: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    steps: int = 0

    def to_wire(self) -> dict[str, Any]:
        """The one object of `--json`."""
        return {
            "seed": self.seed,
            "ok": self.ok,
            "faults": self.faults,
            "virtual_ms": round(self.virtual_ms, 3),
            "outcome": self.outcome,
            "violations": self.violations,
        }


def run(seed: str) -> Verdict:
    """Runs the seed."""
    return run_scenario(draw(seed))


def run_scenario(scenario: Scenario) -> Verdict:
    """Runs a scenario, drawn or made by hand."""
    with tempfile.TemporaryDirectory(prefix="vf") as directory:
        site = Site.make(Path(directory), scenario.seed, scenario.profiles, scenario.latency_s)
        log = logging.getLogger("vmferry")
        handler, level, propagates = LogTrace(site.trace), log.level, log.propagate
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        collects = gc.isenabled()
        gc.disable()  # what it frees runs code; no run may depend on when
        try:
            return _verdict(site, scenario)
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagates
            site.kernel.end()
            site.loop.close()
            if collects:
                gc.enable()


def _verdict(site: Site, scenario: Scenario) -> Verdict:
    course = Course(site, scenario)
    site.trace.tell("SEED", f"{scenario.seed}: {scenario.profiles} {scenario.mode} {' '.join(scenario.settings)}")
    for fault in scenario.faults:
        site.trace.tell("SEED", f"plans {fault}")
    try:
        site.loop.run_until_complete(course.run())
    except (Spinning, Stalled) as error:
        site.trace.violate(f"{type(error).__name__}: {error}")
    for broken in site.loop.broken:
        site.trace.violate(f"a callback broke: {broken}")
    return Verdict(
        seed=scenario.seed,
        ok=not site.trace.violations,
        faults=[str(fault) for fault in course.injector.done],
        virtual_ms=site.trace.now_ms,
        outcome=course.outcome,
        violations=list(site.trace.violations),
        trace=site.trace.lines,
        steps=site.loop.steps,
    )


class Course:
    """The phases of one run."""

    def __init__(self, site: Site, scenario: Scenario) -> None:
        self.site, self.scenario = site, scenario
        self.injector = Injector(site, scenario.faults)
        self.outcome = ""
        self._has_moved = False
        """A job ended with the guest at its destination: where it came from its images are left."""
        self._since: dict[str, tuple[str, float]] = {}
        self._acted: set[str] = set()

    async def run(self) -> None:
        """All of them."""
        site = self.site
        for host in HOSTS:
            site.start(host)
        await pass_s(READY_S)
        await self._begin()
        await pass_s(SAFETY_S)
        self._judge_alone()
        self.injector.end()
        site.trace.tell("PHASE", "everything is healed")
        heal(site)
        for host in HOSTS:
            if self.scenario.restart_all:
                site.crash(host)
            if site.lives[host].process.is_dead:
                site.start(host)
        await self._until_settled()
        self._judge()
        await self._move_once_more()

    async def _begin(self) -> None:
        site, scenario = self.site, self.scenario
        path = site.directory / "g.toml"
        path.write_text(SPEC + "".join(DISK.format(name=name) for name in IMAGES if scenario.disks))
        site.hosts["a"].images.update({f"/images/{name}.img": (0, 0) for name in IMAGES if scenario.disks})
        started = site.command("a", "vm-run", path=str(path))
        await pass_s(READY_S)
        assert started.is_there, "a guest is started before anything goes wrong"
        assert started.error is None, started.error
        if scenario.owner_paused:
            kept = site.agent("a")
            assert kept is not None
            machine = kept.vms[VM].require_machine()
            site.lives["a"].process.spawn(machine.execute("stop"), "owner")
            await pass_s(READY_S)
        if scenario.dirty:
            site.hosts["a"].script["dirty"] = True
        self.injector.begin()
        more: dict[str, Any] = {"mode": scenario.mode, "settings": list(scenario.settings)}
        if scenario.clear_text:
            more["clear_text"] = True
        self.injector.disks = "copy" if scenario.disks else None
        if scenario.holds:
            more["auto_finalize"] = False
        if scenario.multifd:
            more["multifd"] = scenario.multifd
        if scenario.postcopy_after_passes is not None:
            more["postcopy_after_passes"] = scenario.postcopy_after_passes
        self.injector.migrate("a", **more)

    # --- liveness ---

    def _open(self) -> list[tuple[str, AttemptLoop[Any]]]:
        """Attempts that are not over, with their hosts."""
        found: list[tuple[str, AttemptLoop[Any]]] = []
        for host in HOSTS:
            agent = self.site.agent(host)
            if agent is not None:
                loops: list[AttemptLoop[Any]] = [*agent.attempts.values(), *agent.places.values()]
                found += [(host, loop) for loop in loops if not loop.ended.is_set()]
        return found

    async def _until_settled(self) -> None:
        site = self.site
        end_s = site.loop.time() + LIVENESS_S
        quiet = 0
        while site.loop.time() < end_s:
            await pass_s(1.0)
            is_quiet = not self._open() and all(site.agent(host) is not None for host in HOSTS)
            quiet = quiet + 1 if is_quiet else 0
            if quiet >= 3:
                return
            for host, loop in self._open():
                self._act_for(host, loop)

    def _act_for(self, host: str, loop: AttemptLoop[Any]) -> None:
        """The person: takes the action that a row has named for a while, once."""
        row, key = loop.current_row(), f"{host} {loop.job}"
        label, since_s = self._since.get(key, ("", 0.0))
        if label != row.label:
            self._since[key] = (row.label, self.site.loop.time())
            return
        if row.remedy is Remedy.TRY_AGAIN and self.site.loop.time() - since_s >= PERSON_S:
            self._since[key] = (row.label, self.site.loop.time())
            self.site.command(host, "job-resume", id=loop.job)
            return
        tool = RESCUE.search(row.action)
        if tool is None or self.site.loop.time() - since_s < PERSON_S or tool[1] in NOT_SIMULATED:
            return
        self._since[key] = (row.label, self.site.loop.time())  # again after as long, if it did not help
        self.site.command(host, f"rescue-{tool[1]}", vm=VM)

    async def _move_once_more(self) -> None:
        """A guest that was handed back is one that can be moved: nothing of the trouble is left in its way."""
        site, was_at = self.site, self.outcome
        if site.trace.violations or was_at not in HOSTS or self._open():
            return
        site.trace.tell("PHASE", f"once more, from {was_at}")
        site.hosts[HOSTS[1 - HOSTS.index(was_at)]].images.clear()  # a person takes the old images away
        answer = self.injector.migrate(was_at, mode="precopy")
        await pass_s(READY_S)
        await self._until_settled()
        if answer.error is not None:
            site.trace.violate(f"the guest on {was_at} cannot be moved any more: {answer.error}")
            return
        self._judge()
        if self.outcome == was_at:
            wire = site.oracle.ended_jobs.get(self.injector.job) or {}
            site.trace.violate(f"without any fault the guest stayed on {was_at}: {wire.get('error')}")
        self.outcome = was_at

    def _judge_alone(self) -> None:
        """Nothing else is wrong than the link between the agents: a broken postcopy does not wait for that."""
        injector, now_s = self.injector, self.site.loop.time()
        only_alone = all(fault.kind == "alone" for fault in injector.done)
        if injector.alone_s is None or not only_alone or now_s < injector.alone_s + HEALS_S:
            return
        for host, loop in self._open():
            if isinstance(loop, SourceAttempt) and "broken" in loop.current_row().label:
                self.site.trace.violate(f"{host} stays in {loop.current_row().label}, and only the agents' link is cut")

    # --- the end ---

    def _judge(self) -> None:
        site, oracle = self.site, self.site.oracle
        self._has_moved = any(job["outcome"] == "destination" for job in oracle.ended_jobs.values())
        for host in HOSTS:
            if site.agent(host) is None:
                site.trace.violate(f"the agent of {host} does not come up again")
        running = [c for c in oracle.copies.values() if c.is_running]
        waits = self._waiting_rows()
        if not oracle.is_recoverable():
            self.outcome = "lost"
            self._judge_lost()
        elif self.scenario.owner_paused and not running:
            self._judge_paused(waits)
        elif len(running) == 1:
            self.outcome = running[0].qemu.host
            self._judge_kept(self.outcome, waits)
        elif waits:
            self.outcome = f"waits: {', '.join(waits)}"
        else:
            self.outcome = "stopped"
            site.trace.violate("the guest stands still and nobody says what to do")
        self._judge_cancels()

    def _waiting_rows(self) -> list[str]:
        """Rows at which the agents stopped. At least one must name what a person can do: a place that waits for its
        source may leave that to it."""
        waiting = [(host, loop.current_row()) for host, loop in self._open()]
        if all(not row.action or row.action.startswith("none needed") for _, row in waiting):
            for host, row in waiting:
                self.site.trace.violate(f"{host} stays in {row.label} ({row.action or 'no action'})")
        return [f"{host} {row.label}" for host, row in waiting]

    def _judge_lost(self) -> None:
        if not any(copy.killed_by_fault for copy in self.site.oracle.copies.values()):
            self.site.trace.violate("the guest is lost although no fault ended a process of it")

    def _judge_paused(self, waits: list[str]) -> None:
        holders = [c.qemu.host for c in self.site.oracle.copies.values() if c.is_alive]
        self.outcome = ",".join(holders)
        if not waits and len(holders) == 1:
            self._judge_kept(holders[0], waits)
        elif not waits:
            self.site.trace.violate(f"processes of the paused guest are on {holders}")

    def _judge_kept(self, host: str, waits: list[str]) -> None:
        """The agents agree with what is so, and nothing is left over."""
        site = self.site
        for name in HOSTS:
            agent = site.agent(name)
            if agent is None:
                continue
            keeps = VM in agent.vms
            if keeps != (name == host) and not waits:
                site.trace.violate(
                    f"the guest is on {host}, and the agent of {name} {'keeps' if keeps else 'has not'} it"
                )
            if not waits:
                self._judge_left_overs(agent, name, keeps=name == host)

    def _judge_left_overs(self, agent: Agent, name: str, *, keeps: bool) -> None:
        site = self.site
        left = [str(qemu.process) for qemu in site.qemus(name)][1 if keeps else 0 :]
        ports = [f"{what.what}:{key[1]}" for key, what in site.kernel.listeners.items() if key[0] == name]
        left += [port for port in ports if not port.startswith("agents:")]
        sockets = [s.label for p in site.kernel.processes if p.host == name and not p.is_dead for s in p.held]
        left += [label for label in sockets if label.startswith("stream")]
        left += [path.name for path in agent.job_directory.iterdir()]
        for qemu in site.qemus(name):
            left += [f"object {what}" for what in qemu.state.objects]
            left += [f"descriptor {what}" for what in qemu.state.descriptors]
        kept = {Path(k.directory).name for k in agent.vms.values()}
        for path in sorted(agent.vm_directory.iterdir()):
            if path.name not in kept and any(entry.suffix != ".log" for entry in path.iterdir()):
                left.append(f"directory of {VM}")
        images = sorted(site.hosts[name].images) if not keeps and name == "b" and not self._has_moved else []
        left += [f"image {path}" for path in images]
        if left:
            site.trace.violate(f"left over on {name}: {', '.join(left)}")

    def _judge_cancels(self) -> None:
        for job in self.injector.accepted_cancels:
            status = (self.site.oracle.ended_jobs.get(job) or {}).get("status")
            for host in HOSTS:
                agent = self.site.agent(host)
                for attempt in agent.attempts.values() if agent else ():
                    if attempt.job == job:
                        status = source_status(attempt.facts).value
            if status == "completed":
                self.site.trace.violate(f"the cancel of {job} was accepted, and it ended completed")
