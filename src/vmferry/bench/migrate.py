"""`vmferry bench migrate`: the raw thing and vmferry by turns, in one run, on the same machine.

Theory of operation
-------------------
Two guests of each kind boot: one that a bare script moves (`bench.raw`), one that `vmferry migrate` moves, from
exec to exit of the process. In each round both move once, in an order that changes from round to round, always
to a QEMU that is started for it. The one that is not measured rests (SIGSTOP), so that it takes no CPU time.
One move of each before the rounds is not counted: it warms caches, and the link between the agents.

The guest's pause is the time between the arrival of its last tick at the source and of its first at the
destination. All numbers are medians; only those of the same run may be compared.

QEMU stops the guest as soon as it believes that the rest takes less than `downtime-limit`, 300 ms. For a guest of
this size that is in the midst of its first pass, so how long the pause is depends on which pages come last in its
memory. Hence both guests use the same pages (`fixed_layout`): with Linux's random addresses two boots of one guest
differed by a factor of three in all their pauses, which no number of rounds evens out.

How long QEMU itself takes (`memory_ms`, from `migrate` to the source's completion) differs from move to move by
more than what vmferry adds, above all where a guest dirties memory. So beside the difference of the wholes
(`added_ms`) stands the difference of what is left of each whole without QEMU's part (`added_around_ms`), and
beside each difference its standard error.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vmferry.bench import agents
from vmferry.bench.raw import RawGuest
from vmferry.cli.render import table
from vmferry.demo import guest as guests
from vmferry.demo.guest import GuestWish
from vmferry.demo.setup import AgentHost, TwoAgents, choose_qemu, find_guest
from vmferry.errors import QemuError, UsageError, from_wire
from vmferry.qmp.blocking import BlockingClient
from vmferry.testing.guest_report import Chunk, analyse, analyse_chain
from vmferry.testing.linux_guest import LinuxGuest
from vmferry.testing.serial_log import SerialReader
from vmferry.vm import spec as vm_spec

ROUNDS_MIN = 7
BOOT_S = 60.0
SETTLE_TICKS = 60
MEMORY_MIB = 512
TICK_MS = 5
KINDS = ("idle", "dirty")
"""An idle Linux guest, and one that rewrites memory all the time."""

ADDED_MS_MAX = 150.0
PAUSE_RATIO_MAX, PAUSE_EXTRA_MS_MAX = 1.1, 5.0
RSS_MB_MAX = 60.0
CPU_PERCENT_MAX = 1.0
LOAD_WINDOW_S = 6.0
LOAD_BANDWIDTH = "8M"
"""Slower than the guest dirties its memory: such a migration goes on until it is cancelled."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One move. `memory_ms` is QEMU's own part of the whole."""

    wall_ms: float
    memory_ms: float
    gap_ms: float
    stop_resume_ms: float

    @property
    def around_ms(self) -> float:
        """All but QEMU's own part: the start of the destination, set-up, hand-over, clean-up."""
        return self.wall_ms - self.memory_ms


NUMBERS = ("wall_ms", "memory_ms", "around_ms", "stop_resume_ms", "gap_ms")


@dataclass(slots=True)
class Ferried:
    """The guest that vmferry moves: where it is, its console there, and everything that it said before."""

    pair: TwoAgents
    wish: GuestWish
    host: AgentHost
    console: SerialReader
    pid: int
    told: list[list[Chunk]] = field(default_factory=list)
    timelines: list[list[dict[str, Any]]] = field(default_factory=list)

    def move(self) -> Sample:
        """Once to the other host. Raises the migration's error."""
        words = ["--mode", "precopy"]
        moved = guests.move(self.pair, self.host, self.wish.name, *words)
        if moved.code != 0 or moved.console is None:
            raise from_wire(moved.wire.get("error") or {"message": "vmferry migrate failed"})
        moved.console.wait_ticks(SETTLE_TICKS, timeout_s=BOOT_S)
        gap_ms = _gap_ms(self.console, moved.console)
        self.told.append(self.console.chunks())
        self.console.close()
        self.console, self.host = moved.console, self.pair.other(self.host)
        self.pid = int(guests.status(self.host, self.wish.name)["pid"])
        self.timelines.append(moved.wire["timeline"])
        at_ms = {str(row["what"]): float(row["at_ms"]) for row in moved.wire["timeline"]}
        memory_ms = at_ms["all-sent"] - at_ms["started"]
        return Sample(moved.wall_ms, memory_ms, gap_ms, float(moved.wire["downtime_ms"]))


@dataclass(slots=True)
class Scripted:
    """The guest that the bare script moves."""

    guest: RawGuest
    told: list[list[Chunk]] = field(default_factory=list)

    def move(self) -> Sample:
        """Once to a new QEMU."""
        moved, old = self.guest.move()
        self.guest.qemu.console.wait_ticks(SETTLE_TICKS, timeout_s=BOOT_S)
        gap_ms = _gap_ms(old.console, self.guest.qemu.console)
        self.told.append(old.console.chunks())
        old.close()
        return Sample(moved.wall_ms, moved.memory_ms, gap_ms, moved.stop_resume_ms)


def run_bench(*, rounds: int) -> dict[str, Any]:
    """Everything as one JSON object. Raises VmferryError when something cannot be measured."""
    if rounds < ROUNDS_MIN:
        raise UsageError(f"--rounds: medians of fewer than {ROUNDS_MIN} rounds say nothing")
    qemu, files = choose_qemu(), find_guest()
    kinds: dict[str, Any] = {}
    with TwoAgents(qemu) as pair:
        pids = [pair.a.agent_pid, pair.b.agent_pid]
        load: list[float] = []
        for kind in KINDS:
            _tell(f"{kind} guest of {MEMORY_MIB} MiB, {rounds} rounds …")
            with _guests(pair, kind, files, qemu) as (raw, ferried):
                kinds[kind] = _measure(raw, ferried, rounds)
                if kind == "dirty":
                    _tell(f"agents' CPU while a migration runs for {LOAD_WINDOW_S:g} s …")
                    load = _agents_under_load(ferried, pids)
        rss = [agents.resident_mb(pid) for pid in pids]
        return _result(kinds, rounds=rounds, rss=rss, load=load, qemu=qemu)


def _wish(kind: str, name: str) -> GuestWish:
    is_idle = kind == "idle"
    return GuestWish(
        name=name,
        memory_mib=MEMORY_MIB,
        dirty_mib_per_s=0 if is_idle else 30,
        checked_mib=96 if is_idle else 192,
        check_mib_per_s=4,
        tick_ms=TICK_MS,
        fixed_layout=True,
    )


@contextlib.contextmanager
def _guests(pair: TwoAgents, kind: str, files: LinuxGuest, qemu: str) -> Iterator[tuple[Scripted, Ferried]]:
    """Both guests of one kind, booted; gone at the end."""
    wish, twin = _wish(kind, kind), _wish(kind, f"{kind}-raw")
    wire, console = guests.start(pair.a, guests.write_spec(wish, files, pair.folder))
    ferried = Ferried(pair, wish, pair.a, console, int(wire["pid"]))
    spec = vm_spec.load(guests.write_spec(twin, files, pair.folder))
    pinned = vm_spec.pin(spec, machine=wire["machine"], accel=wire["accel"])
    raw = RawGuest(pinned, qemu, pair.folder, (pair.a.net, pair.b.net), with_tls=not pair.clear_text)
    try:
        raw.start()
        for serial in (console, raw.qemu.console):
            serial.wait_for(lambda line: line.words[:2] == ("W", "memory"), timeout_s=BOOT_S)
        yield Scripted(raw), ferried
    finally:
        raw.close()
        ferried.console.close()
    ferried.host.vmferry("stop", wish.name, "--force")


def _measure(raw: Scripted, ferried: Ferried, rounds: int) -> dict[str, Any]:
    samples: dict[str, list[Sample]] = {"raw": [], "vmferry": []}
    for number in range(rounds + 1):
        order = ("raw", "vmferry") if number % 2 else ("vmferry", "raw")
        for name in order:
            if name == "raw":
                with _resting(ferried.pid):
                    raw.guest.qemu.console.wait_ticks(
                        SETTLE_TICKS, timeout_s=BOOT_S, after=_said(raw.guest.qemu.console)
                    )
                    samples[name].append(raw.move())
            else:
                with _resting(raw.guest.qemu.process.pid):
                    ferried.console.wait_ticks(SETTLE_TICKS, timeout_s=BOOT_S, after=_said(ferried.console))
                    samples[name].append(ferried.move())
    logs = {"raw": [*raw.told, raw.guest.qemu.console.chunks()], "vmferry": [*ferried.told, ferried.console.chunks()]}
    complaints = [f"{name}: {words}" for name, log in logs.items() for words in analyse_chain(log).complaints()]
    warm_up = {name: round(all_of[0].wall_ms, 1) for name, all_of in samples.items()}
    counted = {name: all_of[1:] for name, all_of in samples.items()}
    return _compare(counted["raw"], counted["vmferry"]) | {
        "warm_up_wall_ms": warm_up,
        "vmferry_steps_ms": _steps(ferried.timelines[1:]),
        "guest_complaints": complaints,
    }


def _said(console: SerialReader) -> int:
    return len(console.lines())


@contextlib.contextmanager
def _resting(pid: int) -> Iterator[None]:
    """The process takes no CPU while the block runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _gap_ms(source: SerialReader, destination: SerialReader) -> float:
    gap_ms = analyse(source.chunks(), destination.chunks()).switch_gap_ms
    if gap_ms is None:
        raise QemuError("the guest does not tick after a move")
    return gap_ms


def _compare(raw: list[Sample], ferried: list[Sample]) -> dict[str, Any]:
    """Medians, and what follows from them."""
    middle = {
        name: {key: round(statistics.median(getattr(sample, key) for sample in all_of), 2) for key in NUMBERS}
        for name, all_of in (("raw", raw), ("vmferry", ferried))
    }
    bare, ours = middle["raw"], middle["vmferry"]
    return {
        **middle,
        "added_ms": round(ours["wall_ms"] - bare["wall_ms"], 2),
        "added_error_ms": _error([s.wall_ms for s in raw], [s.wall_ms for s in ferried]),
        "added_around_ms": round(ours["around_ms"] - bare["around_ms"], 2),
        "added_around_error_ms": _error([s.around_ms for s in raw], [s.around_ms for s in ferried]),
        "pause_added_ms": round(ours["gap_ms"] - bare["gap_ms"], 2),
        "pause_added_error_ms": _error([s.gap_ms for s in raw], [s.gap_ms for s in ferried]),
        "pause_ratio": round(ours["gap_ms"] / bare["gap_ms"], 3),
        "stop_resume_ratio": round(ours["stop_resume_ms"] / bare["stop_resume_ms"], 3),
        "pause_ok": ours["gap_ms"] <= PAUSE_RATIO_MAX * bare["gap_ms"] + PAUSE_EXTRA_MS_MAX,
        "all": {
            name: [{key: round(getattr(sample, key), 1) for key in NUMBERS} for sample in all_of]
            for name, all_of in (("raw", raw), ("vmferry", ferried))
        },
    }


def _error(*samples: list[float]) -> float:
    """The standard error of the difference of two medians, from the quartiles: outliers do not count."""
    spreads = [(statistics.quantiles(all_of)[2] - statistics.quantiles(all_of)[0]) / 1.349 for all_of in samples]
    squares = [(1.253 * spread) ** 2 / len(all_of) for spread, all_of in zip(spreads, samples, strict=True)]
    return round(math.sqrt(sum(squares)), 2)


STOP = "STOP on the source"


def _steps(timelines: list[list[dict[str, Any]]]) -> dict[str, float]:
    """For each row of vmferry's timeline when it came, as a median, in order. From the guest's stop on it is the time
    since then that counts: how long memory took before is another thing in each round."""
    times: dict[str, list[float]] = {}
    stops: list[float] = []
    after: set[str] = set()
    for timeline in timelines:
        at_ms = {str(row["what"]): float(row["at_ms"]) for row in timeline}
        stop_ms = at_ms.get(STOP, math.inf)
        stops.append(stop_ms)
        after |= {what for what, at in at_ms.items() if at > stop_ms}
        for what, at in at_ms.items():
            times.setdefault(what, []).append(at - stop_ms if at > stop_ms else at)
    stopped_ms = statistics.median(stops)
    medians = {what: statistics.median(v) + (stopped_ms if what in after else 0.0) for what, v in times.items()}
    return dict(sorted(((what, round(at, 2)) for what, at in medians.items()), key=lambda item: item[1]))


def _agents_under_load(ferried: Ferried, pids: list[int]) -> list[float]:
    """Percent of a core that each agent takes while memory moves. The migration is cancelled then."""
    host, name = ferried.host, ferried.wish.name
    there = ferried.pair.other(host)
    command = host.command("migrate", name, there.name, "--mode", "precopy", "--set", f"max-bandwidth={LOAD_BANDWIDTH}")
    with BlockingClient(str(host.socket_path), name="the agent") as news:
        process = subprocess.Popen([*command, "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for event in news.events(BOOT_S):
            if event.name == "MIGRATION" and event.data.get("status") == "active" and event.data.get("vm") == name:
                break
    before = [agents.cpu_s(pid) for pid in pids]
    try:
        process.wait(LOAD_WINDOW_S)
    except subprocess.TimeoutExpired:
        after = [agents.cpu_s(pid) for pid in pids]
        host.vmferry("cancel", name)
        process.wait(BOOT_S)
        return [(late - early) / LOAD_WINDOW_S * 100 for early, late in zip(before, after, strict=True)]
    raise QemuError("the migration that was to run for some seconds ended at once", side="source")


def _result(kinds: dict[str, Any], *, rounds: int, rss: list[float], load: list[float], qemu: str) -> dict[str, Any]:
    added_ms = max(kind["added_ms"] for kind in kinds.values())
    goals = {
        "added": added_ms <= ADDED_MS_MAX,
        "pause": all(kind["pause_ok"] for kind in kinds.values()),
        "rss": max(rss) <= RSS_MB_MAX,
        "cpu": max(load) < CPU_PERCENT_MAX,
    }
    return {
        "result": "ok" if not any(kind["guest_complaints"] for kind in kinds.values()) else "broken",
        "added_ms": added_ms,
        "added_around_ms": max(kind["added_around_ms"] for kind in kinds.values()),
        "pause_ratio": max(kind["pause_ratio"] for kind in kinds.values()),
        "pause_measure": "the guest's gap between its last tick at the source and its first at the destination",
        "rounds": rounds,
        "agent_rss_mb": round(max(rss), 1),
        "agent_cpu_percent": round(max(load), 2),
        "agents": {
            "rss_mb": [round(value, 1) for value in rss],
            "cpu_percent": [round(value, 2) for value in load],
        },
        "goals_met": goals,
        "qemu": qemu,
        "load_average": os.getloadavg()[0],
        "guests": kinds,
    }


def report_lines(result: dict[str, Any]) -> list[str]:
    """The table for people."""
    rows = []
    for kind, found in result["guests"].items():
        for name in ("raw", "vmferry"):
            row = found[name]
            rows.append((kind, name, *(f"{row[key]:.1f} ms" for key in NUMBERS)))
    lines = table(("GUEST", "BY", "WHOLE MOVE", "QEMU'S PART", "AROUND IT", "STOP TO RESUME", "GUEST'S GAP"), rows)
    lines += [""]
    for kind, found in result["guests"].items():
        verdict = "within" if found["pause_ok"] else "ABOVE"
        whole, around, pause = (
            f"{found[f'{name}_ms']:.0f} ±{found[f'{name}_error_ms']:.0f} ms"
            for name in ("added", "added_around", "pause_added")
        )
        lines.append(
            f"{kind}: vmferry adds {whole} (goal: at most {ADDED_MS_MAX:.0f}), {around} around QEMU's part; its "
            f"guest's gap is {pause} longer and {found['pause_ratio']:.2f} times raw, {verdict} 1.1 x raw + 5 ms"
        )
        lines += [f"{kind}: {words}" for words in found["guest_complaints"]]
    rss = " and ".join(f"{value:.1f}" for value in result["agents"]["rss_mb"])
    cpu = " and ".join(f"{value:.2f}" for value in result["agents"]["cpu_percent"])
    lines.append(f"agents: {rss} MB resident (goal: 60), {cpu} % of a core while a migration runs (goal: below 1)")
    lines.append(f"medians of {result['rounds']} rounds; the machine's load was {result['load_average']:.1f}")
    return lines


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
