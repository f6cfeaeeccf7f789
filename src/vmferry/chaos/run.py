"""One run: a guest, a migration, a fault in its phase, the outcome, what outsiders saw. See `cells` and `verdict`."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import threading
from pathlib import Path
from typing import Any

from vmferry.agent.destination import ORPHAN_S
from vmferry.chaos import guest as guests
from vmferry.chaos.cells import ALONE, Cell
from vmferry.chaos.faults import Doing
from vmferry.chaos.ground import PROXY_PORT, Ground
from vmferry.chaos.stage import NotReached, Stage
from vmferry.chaos.told import facts_of, now_s, views_of
from vmferry.chaos.verdict import Seen
from vmferry.chaos.witness import Life, first_run_after, longest_pause_s, overlap_s
from vmferry.core.facts import Fact
from vmferry.errors import VmferryError
from vmferry.model.pairs import PAIRS
from vmferry.vm.image_locks import image_locks

OUTCOME_S = 25.0
SETTLE_S = 1.5
"""How long a row must hold before its named action is taken."""
ACTION_S = 20.0
ACTIONS = 2
GIVE_UP_S = 4.0
"""A row whose action is none of vmferry's commands is waited for so long."""
LEFT_S = 4.0
GOES_ON_S = 10.0
_ACTION = re.compile(r"vmferry ((?:rescue|recover) [^;,.]*)")
"""Commands that a named action may have. `resolve` is a person's word about a host, which nobody here can give."""
_FOLDERS = re.compile(r"/\S*/")
"""Where this machine has what was left behind is of no interest elsewhere."""
EOF_S = 0.02
"""A killed QEMU's end is seen when its monitor closes, so much later at most."""


class Run:
    """One cell on one ground."""

    def __init__(self, ground: Ground, cell: Cell, name: str, stop: threading.Event) -> None:
        assert ground.witness is not None
        self.ground, self.cell, self.name, self.stop = ground, cell, name, stop
        self.witness = ground.witness
        self.seen = Seen(cell.name)
        self.life: guests.Guest = guests.MAKE[cell.guest](ground.folder / "guests", ground.disks, name)
        self.guest = self.life.files
        if ground.disks_b != ground.disks:
            for disk in self.guest.disks:
                shutil.copy(disk, ground.disks_b / disk.name)
        self.stage = Stage(ground, cell, self.guest, stop)
        self.doing = Doing(ground, cell.fault, self.guest, self.stage)

    def go(self) -> Seen:
        """The whole run. Raises Stopped; every other trouble is in what it returns."""
        began_s = now_s()
        for log in self.ground.logs.values():
            log.forget()
        self.witness.sample(self.guest.disks)
        try:
            self._boot()
            self.doing.prepare()
            self.stage.reach(self.doing.begin)
            self._inject()
            self._outcome()
            self._measure()
            self._judge_guest()
        except NotReached as error:
            self.seen.injected = False
            self.seen.why_not = f"{error} (status {self.stage.status()}; rows {self.stage.source.rows(self.name)[-4:]})"
        finally:
            self.doing.close()
            self.ground.link.clear()
            self.stage.let_go()
            self.ground.streams.refuse(refusing=False)
            self._clean()
            self.ground.streams.forget()
            self.seen.wall_s = now_s() - began_s
        return self.seen

    def _boot(self) -> None:
        self.ground.a.execute("vm-run", path=str(self.guest.spec))
        self.stage.wait(lambda: self.life.has_booted(self._logs()), self.life.boot_s, "the guest does not boot")
        self.stage.wait(lambda: self.witness.running(self.name), 5.0, "no second monitor")

    def _logs(self) -> list[bytes]:
        """What the guest said on either side."""
        found = []
        for host in (self.ground.a, self.ground.b):
            logs = [folder / "serial.log" for folder in (host.runtime / "vms").glob(f"{self.name}-*")]
            found.append(b"".join(log.read_bytes() for log in logs if log.exists()))
        return found

    # --- the fault ---

    def _inject(self) -> None:
        of_message = self.stage.fault_rule is not None
        before = of_message or self.stage.is_in_phase()
        self.doing.do()
        after = self.stage.is_in_phase(self.doing.done_s)
        if not before or not after:
            self.seen.why_not = f"the phase was over: {self.stage.status(self.doing.done_s)}"
        in_phase = before and after
        self._let_go()
        if self.cell.fault.what != "source-agent":
            self.stage.hurry()
        end_s = now_s() + self.cell.fault.lasts_s
        self.stage.wait(lambda: now_s() >= end_s, 60)
        self.doing.undo()
        self.stage.hurry()
        if self.doing.started_s:
            self._reattach()
        self.seen.injected = in_phase
        self.seen.proof = self.doing.proof

    def _let_go(self) -> None:
        self.stage.let_go()
        if self.cell.fault.kind == "reset" and self.cell.fault.what != "link":
            self.ground.streams.refuse(refusing=True)  # until the fault is undone

    def _reattach(self) -> None:
        """From the start of the new agent's process until it answers with the VM's state."""
        host = self.ground.host(self.cell.fault.what)

        def answers() -> bool:
            with contextlib.suppress(VmferryError, OSError):
                return bool(host.execute("vm-status", vm=self.name))
            return False

        with contextlib.suppress(NotReached):
            self.stage.wait(answers, 10.0)
            self.seen.reattach_ms = (now_s() - self.doing.started_s) * 1000

    # --- the outcome ---

    def job(self) -> dict[str, Any]:
        """What vmferry says of the migration; empty when nobody says anything."""
        for host in (self.ground.a, self.ground.b):
            with contextlib.suppress(VmferryError, OSError):
                return dict(host.execute("job-status", vm=self.name, job=self.stage.job))
        return {}

    def _outcome(self) -> None:
        end_s, row, since_s = now_s() + OUTCOME_S, "", now_s()
        while now_s() < end_s:
            wire = self.job()
            self._take_down(wire)
            if self._is_settled(wire):
                break
            self.stage.hurry()
            if wire.get("row") != row:
                row, since_s = str(wire.get("row")), now_s()
            action = _ACTION.search(self.seen.action)
            if len(self.seen.taken) >= ACTIONS and now_s() - since_s >= GIVE_UP_S:
                break
            if self._is_for_a_person(action) and now_s() - since_s >= GIVE_UP_S:
                break
            if action is not None and now_s() - since_s >= SETTLE_S and len(self.seen.taken) < ACTIONS:
                self._act(action[1])
                since_s = now_s()
            self.stage.wait(_after(0.05), 1.0)
        views, in_postcopy = views_of(self.stage.source.read(), self.name), self.cell.mode == "postcopy"
        self.seen.through = [
            pair.name
            for pair in PAIRS
            if any(pair.holds(view, in_postcopy=in_postcopy, is_cancelled=cancelled) for view, cancelled in views)
        ]
        log = facts_of(self.stage.source.read(), self.name)
        over, gone = log.stamp(Fact.CLEANUP), log.stamp(Fact.SOURCE_GONE)
        self.seen.ended_first = over is not None and (gone is None or over < gone)

    def _take_down(self, wire: dict[str, Any]) -> None:
        self.seen.over = bool(wire.get("over"))
        self.seen.outcome = str(wire.get("outcome") or "none")
        self.seen.row = str(wire.get("row") or "")
        self.seen.action = str(wire.get("action") or "")
        self.seen.status = str(wire.get("status") or "")
        self.seen.qemus_left = sum(life.gone_s is None for life in self.witness.of_vm(self.name))
        self.seen.running_on = [self._host_of(life) for life in self.witness.running(self.name)]

    def _is_settled(self, wire: dict[str, Any]) -> bool:
        if not wire and not self.seen.qemus_left:
            return True
        if self.seen.over:
            return True
        return self.seen.outcome == "lost" or not self.seen.qemus_left

    def _is_for_a_person(self, action: re.Match[str] | None) -> bool:
        """Something is to be done that no command of vmferry does, or there is no word of anything."""
        unsettled = self.seen.outcome in ("held", "degraded", "lost")
        return unsettled and action is None and not self.seen.action.startswith("none needed")

    def _act(self, words: str) -> None:
        command = [word.replace("NAME", self.name) for word in shlex.split(words)]
        done = self.ground.a.cli(*command, timeout_s=ACTION_S)
        self.seen.taken.append(f"vmferry {words.strip()} -> {done.code}")

    def _host_of(self, life: Life) -> str:
        return "host-a" if f"{self.ground.a.runtime}/" in life.words else "host-b"

    # --- judging ---

    def _measure(self) -> None:
        lives, until_s = self.witness.of_vm(self.name), now_s()
        for index, life in enumerate(lives):
            for other in lives[index + 1 :]:
                both_s = overlap_s(life, other, until_s=until_s)
                ended = life.gone_s is not None or other.gone_s is not None
                self.seen.overlap_ms += 0.0 if ended and both_s < EOF_S else both_s * 1000
        done_s = self.doing.done_s
        running = first_run_after(lives, done_s)
        if running is not None and self.seen.running_on:
            last = max((begin for life in lives for begin, _ in life.ran), default=done_s)
            self.seen.to_running_ms = max(0.0, (running - done_s) * 1000)
            self.seen.pause_ms = longest_pause_s(lives, done_s, max(until_s, last)) * 1000
        whole = Fact.LOADED if self.cell.mode == "precopy" else Fact.ALL_SENT
        self.seen.complete_there = self.stage.target.has(self.name, whole) is not None
        self.seen.cancels = self.doing.cancels
        self.seen.two_writers, self.seen.lock_samples = self.witness.two_writers, self.witness.lock_samples
        if self.doing.undone_s:
            ack = self.stage.source.has(self.name, Fact.RESUME_ACK, since_s=done_s)
            if ack is not None:
                self.seen.heal_ms = (ack.at_s - (self.doing.stream_back_s or self.doing.undone_s)) * 1000
            if self.cell.fault == ALONE:
                self.seen.waited_for_link = ack is None or ack.at_s >= self.doing.undone_s
        refused = self.stage.target.has(self.name, Fact.START_REFUSED)
        resumed = self.stage.source.has(self.name, Fact.SOURCE_RESUMED)
        if refused is not None and resumed is not None:
            self.seen.resumed_ms = (resumed.at_s - refused.at_s) * 1000
        self.doing.settle_proof()
        self.seen.proof = self.doing.proof
        if not self.seen.proof:
            self.seen.injected = False
            self.seen.why_not = self.seen.why_not or "nothing shows that the fault was done"
        self.seen.troubles = [line for log in self.ground.logs.values() for line in log.troubles]

    def _judge_guest(self) -> None:
        running = self.witness.running(self.name)
        if len(running) != 1:
            return
        side = 0 if self._host_of(running[0]) == "host-a" else 1
        done = self.life.progress([self._logs()[side]])
        with contextlib.suppress(NotReached):
            self.stage.wait(lambda: self.life.progress([self._logs()[side]]) >= done + 2, GOES_ON_S)
            self.seen.makes_progress = True
        self.seen.letters = self.life.complaint(self._logs())
        folder = (self.ground.disks, self.ground.disks_b)[side]
        for disk in self.guest.disks:
            holders = {holder.pid for holder in image_locks(str(folder / disk.name)).writers}
            if running[0].pid not in holders:
                self.seen.unlocked.append(disk.name)
        if self.seen.over and not self.seen.letters and self.life.has_pages:
            self._judge_pages(running[0])

    def _judge_pages(self, life: Life) -> None:
        """The boot sector's memory, page by page."""
        before, _ = guests.passes(b"".join(self._logs()))
        dump = Path(f"{self.ground.folder}/memory-{os.getpid()}-{self.name}")
        size = (guests.RAM_MIB - 1) * guests.MIB
        try:
            self.witness.ask(life, "pmemsave", val=guests.MIB, size=size, filename=str(dump))
            after, self.seen.letters = guests.passes(b"".join(self._logs()))
            if self.stage.checks_memory:
                self.seen.wrong_pages = guests.wrong_pages(dump.read_bytes(), before, after)
        except (TimeoutError, VmferryError) as error:
            self.seen.letters = f"its memory cannot be read: {error}"
        finally:
            dump.unlink(missing_ok=True)

    # --- the end ---

    def _clean(self) -> None:
        """Ends the guest; what is then still there is left behind. A ground that is not clean is given up."""
        running = self.seen.running_on
        try:
            for host in (self.ground.a, self.ground.b):
                if host.is_dead:
                    host.restart()
            if self.seen.over and running:
                host = self.ground.a if running[0] == "host-a" else self.ground.b
                host.execute("vm-stop", vm=self.name, force=True)
                self.seen.left = self._wait_clean()
            else:
                self.ground.is_broken = True
        except (VmferryError, OSError, AssertionError) as error:
            self.seen.left.append(f"the end: {type(error).__name__}: {error}"[:300])
        if self.seen.left:
            self.ground.is_broken = True
        self.witness.sample(())
        for disk in self.guest.disks:
            disk.unlink(missing_ok=True)

    def _wait_clean(self) -> list[str]:
        # A place whose source could not release it, as the link was away, asks by itself whether it is still wanted.
        end_s = now_s() + (LEFT_S + ORPHAN_S if self.cell.fault.what in ("link", "both") else LEFT_S)
        while True:
            ours = {PROXY_PORT, *self.ground.streams.ports}
            left = [
                words
                for words in self.ground.agents.left_behind()
                if not any(words.endswith(f": port {port}") for port in ours)
            ]
            if not left or now_s() > end_s:
                return [_FOLDERS.sub("", words) for words in left]
            self.stage.wait(_after(0.05), 1.0)


def _after(delay_s: float) -> Any:
    end_s = now_s() + delay_s
    return lambda: now_s() >= end_s
