"""How each kind of fault is done to a site, and undone.

Rule 1: faults act from outside of every process, between two steps of the loop, as a kernel or a person does.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vmferry.testing.sim.scenario import FOR_GOOD_S, LOCK_TEXT, Fault, Trigger
from vmferry.testing.sim.site import HOSTS, VM, Answer, Script, Site

STREAM_BACK_S = 1.0
"""How long the stream's way is blocked where the agents are left without their link."""


class Injector:
    """Waits for the triggers of a run's faults, and does them."""

    def __init__(self, site: Site, faults: tuple[Fault, ...]) -> None:
        self.site = site
        self.done: list[Fault] = []
        """Those that really were injected."""
        self.accepted_cancels: list[str] = []
        """Jobs whose cancel was accepted."""
        self.alone_s: float | None = None
        """When the stream's way was free again after it broke while the agents cannot talk."""
        self.job = ""
        self.is_over = False
        self._counts: dict[int, int] = {}
        self._waiting: dict[int, Fault] = dict(enumerate(faults))
        self._armed: list[tuple[int, Fault]] = []
        """(steps of the loop that are left, what then)."""
        self._jobs_made = 0
        self.disks: str | None = None
        """What is said of disks whenever somebody asks for a migration."""

    # --- triggers ---

    def begin(self) -> None:
        """The migration is asked for now."""
        self.site.trace.on_line = self._on_line
        for number, fault in list(self._waiting.items()):
            if not fault.trigger.text:
                del self._waiting[number]
                self._later(fault.trigger.after_s, lambda fault=fault: self._arm(fault))  # type: ignore[misc]

    def end(self) -> None:
        """No fault any more, and what lasts is undone."""
        self.is_over = True
        self.site.trace.on_line = None
        self.site.loop.on_step = None
        self._armed.clear()

    def _later(self, after_s: float, action: Callable[[], None]) -> None:
        self.site.loop.call_later(after_s, self._if_not_over, action, context=contextvars.Context())

    def _if_not_over(self, action: Callable[[], None]) -> None:
        if not self.is_over:
            action()

    def _on_line(self, actor: str, event: str) -> None:
        for number, fault in list(self._waiting.items()):
            trigger = fault.trigger
            if trigger.text in event and actor == (trigger.host or actor) and actor in HOSTS:
                self._counts[number] = self._counts.get(number, 0) + 1
                if self._counts[number] >= trigger.nth:
                    del self._waiting[number]
                    self._arm(fault)

    def _arm(self, fault: Fault) -> None:
        self._armed.append((fault.trigger.steps, fault))
        self.site.loop.on_step = self._on_step

    def _on_step(self) -> None:
        """Between two steps of the loop."""
        armed, self._armed = self._armed, []
        for left, fault in armed:
            if left > 0:
                self._armed.append((left - 1, fault))
            else:
                self._do(fault)
        if not self._armed:
            self.site.loop.on_step = None

    # --- faults ---

    def _do(self, fault: Fault) -> None:
        method = getattr(self, "_do_" + fault.kind.replace("-", "_"))
        if method(fault):
            self.done.append(fault)
            self.site.trace.tell("FAULT", str(fault))

    def _undo(self, fault: Fault, action: Callable[[], None]) -> None:
        """After as long as the fault lasts; one for good is undone when all is healed."""
        if fault.for_s < FOR_GOOD_S:
            self._later(fault.for_s, lambda: self._undone(fault, action))

    def _undone(self, fault: Fault, action: Callable[[], None]) -> None:
        self.site.trace.tell("FAULT", f"{fault.kind} {fault.host} is over")
        action()

    def _do_crash_agent(self, fault: Fault) -> bool:
        life = self.site.lives[fault.host]
        if life.process.is_dead:
            return False
        life.process.die()

        def again() -> None:
            if life.process.is_dead and self.site.lives[fault.host] is life:
                self.site.start(fault.host)

        self._undo(fault, again)
        return True

    def _do_freeze_agent(self, fault: Fault) -> bool:
        process = self.site.lives[fault.host].process
        if process.is_dead or process.is_frozen:
            return False
        process.freeze()
        self._undo(fault, process.thaw)
        return True

    def _do_kill_qemu(self, fault: Fault) -> bool:
        found = self.site.qemus(fault.host)
        if found:
            self.site.oracle.copies[found[-1].process.pid].killed_by_fault = True
            found[-1].process.die()
        return bool(found)

    def _do_freeze_qemu(self, fault: Fault) -> bool:
        found = [qemu.process for qemu in self.site.qemus(fault.host) if not qemu.process.is_frozen]
        if found:
            process = found[-1]
            process.freeze()
            self._undo(fault, lambda: self._thaw(process))
        return bool(found)

    def _thaw(self, process: Any) -> None:
        process.thaw()
        self.site.oracle.thawed()

    def _do_cut_agents(self, fault: Fault) -> bool:
        return self._block("agents", fault)

    def _do_cut_stream(self, fault: Fault) -> bool:
        return self._block("stream", fault)

    def _block(self, kind: str, fault: Fault) -> bool:
        ways = [("a", "b"), ("b", "a")] if fault.more["way"] == "both" else [tuple(fault.more["way"].split(">"))]
        paths = [self.site.net.path(kind, source, target) for source, target in ways]
        for path in paths:
            self.site.net.block(path)

        def free() -> None:
            for path in paths:
                self.site.net.unblock(path)

        self._undo(fault, free)
        return True

    def _do_reset_agents(self, fault: Fault) -> bool:
        return self.site.kernel.reset("agents")

    def _do_reset_stream(self, fault: Fault) -> bool:
        return self.site.kernel.reset("stream")

    def _do_unplugged_stream(self, fault: Fault) -> bool:
        """Broken at once, and nothing gets through for a while."""
        was_there = self.site.kernel.reset("stream")
        return self._block("stream", Fault(fault.kind, fault.trigger, fault.host, fault.for_s, {"way": "both"})) or (
            was_there
        )

    def _do_alone(self, fault: Fault) -> bool:
        """The agents cannot talk, and the stream is broken: it gets through again soon, they do not."""
        self._block("agents", replace(fault, more={"way": "both"}))
        was_there = self.site.kernel.reset("stream")
        if was_there:
            self.alone_s = self.site.loop.time() + STREAM_BACK_S
        return self._block("stream", replace(fault, for_s=STREAM_BACK_S, more={"way": "both"})) or was_there

    def _do_hung_stream(self, fault: Fault) -> bool:
        """Broken, and for a while each QEMU whose pages are out of reach answers nothing in band until they come."""
        for host in HOSTS:
            self._script(host)["hang"] = True

        def free() -> None:
            for host in HOSTS:
                self._script(host).pop("hang", None)

        self._undo(fault, free)
        return self.site.kernel.reset("stream")

    def _do_drop(self, fault: Fault) -> bool:
        return self._spoil(fault, drop=fault.more["share"])

    def _do_double(self, fault: Fault) -> bool:
        return self._spoil(fault, double=fault.more["share"])

    def _spoil(self, fault: Fault, *, drop: float = 0.0, double: float = 0.0) -> bool:
        other = HOSTS[1 - HOSTS.index(fault.host)]
        path = self.site.net.path("agents", fault.host, other)
        path.drop, path.double = max(path.drop, drop), max(path.double, double)

        def good() -> None:
            path.drop = path.double = 0.0

        self._undo(fault, good)
        return True

    def _do_slow(self, fault: Fault) -> bool:
        paths = [self.site.net.path("agents", *way) for way in (("a", "b"), ("b", "a"))]
        before = [path.latency_s for path in paths]
        for path in paths:
            path.latency_s = fault.more["latency_s"]

        def good() -> None:
            for path, latency_s in zip(paths, before, strict=True):
                path.latency_s = latency_s

        self._undo(fault, good)
        return True

    def _script(self, host: str) -> Script:
        script = self.site.hosts[host].script
        assert isinstance(script, Script)
        return script

    def _do_refuse_cont(self, fault: Fault) -> bool:
        script = self._script(fault.host)
        script["cont"], script.refusals = LOCK_TEXT, int(fault.more["times"])
        self._undo(fault, lambda: script.pop("cont", None))
        return True

    def _do_refuse_relock(self, fault: Fault) -> bool:
        script = self._script("a")
        script["relock"] = LOCK_TEXT
        self._undo(fault, lambda: script.pop("relock", None))
        return True

    def _do_fail_step(self, fault: Fault) -> bool:
        step = str(fault.more["step"])
        host = "b" if step.startswith("in-") else "a"
        self._script(host)["steps"] = {step: "fail"}
        return True

    def _do_disk_full(self, fault: Fault) -> bool:
        disk = self.site.hosts[fault.host].disk
        disk.is_full = True

        def room() -> None:
            disk.is_full = False

        self._undo(fault, room)
        return True

    def _do_clock_jump(self, fault: Fault) -> bool:
        self.site.hosts[fault.host].clock.ahead_s += float(fault.more["by_s"])
        return True

    # --- what people do meanwhile ---

    def migrate(self, source: str, **more: Any) -> Answer:
        """Asks for a migration away from the host."""
        self._jobs_made += 1
        self.job = f"{self._jobs_made:032x}"
        other = HOSTS[1 - HOSTS.index(source)]
        if self.disks:
            more["disks"] = self.disks
        return self.site.command(source, "vm-migrate", vm=VM, destination=other, job=self.job, **more)

    def _do_cancel(self, fault: Fault) -> bool:
        for _ in range(int(fault.more["times"])):
            self.site.command(fault.host, "vm-cancel", self._cancelled, vm=VM)
        return True

    def _cancelled(self, answer: Answer) -> None:
        if answer.error is None and isinstance(answer.value, dict) and not answer.value.get("over", True):
            self.accepted_cancels.append(str(answer.value["job"]))

    def _do_start_postcopy(self, fault: Fault) -> bool:
        self.site.command(fault.host, "vm-start-postcopy", vm=VM)
        return True

    def _do_finalize(self, fault: Fault) -> bool:
        self.site.command(fault.host, "job-finalize", id=self.job)
        return True

    def _do_pause(self, fault: Fault) -> bool:
        self.site.command(fault.host, "job-pause", id=self.job)
        return True

    def _do_resume(self, fault: Fault) -> bool:
        self.site.command(fault.host, "job-resume", id=self.job)
        return True

    def _do_migrate_again(self, fault: Fault) -> bool:
        self.migrate(fault.host, mode="precopy")
        return True


def heal(site: Site) -> None:
    """Everything works again. Agents that are dead are somebody else's to start."""
    site.net.heal()
    for host in HOSTS:
        installed = site.hosts[host]
        installed.disk.is_full = False
        installed.script.pop("cont", None)
        installed.script.pop("relock", None)
        installed.script.pop("hang", None)
        installed.script.pop("steps", None)
        installed.script.pop("dirty", None)
        installed.clock.ahead_s = 0.0
    for process in site.kernel.processes:
        if process.is_frozen:
            process.thaw()
            site.oracle.thawed()


__all__ = ["Fault", "Injector", "Trigger", "heal"]
