"""What a seed means: the two hosts, the migration that is asked for, and what goes wrong when.

Theory of operation
-------------------
A `Scenario` is drawn from the seed alone, before anything runs. Each fault has a *trigger*: a time after the migration
was asked for, or the n-th line of the trace that holds a text (a fact of an agent, a step of a QEMU, an entry of a
journal), and then a number of steps of the loop, so that it falls between any two steps of any task around the moments
that matter.

Rule 1: a new kind of fault goes at the end of `KINDS`; the drawing of a seed changes only when this file does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, Final

VERSIONS: Final = ("7.2", "11.1")
FOR_GOOD_S: Final = 1e9
"""Until everything is healed."""

MOMENTS: Final = (
    "fact=planned", "fact=prepare ", "journal place-wanted", "fact=listening", "fact=prepared", "fact=configured",
    "fact=started", "step setup", "step active", "step converge", "step pre-switchover", "fact=switchover",
    "fact=target-ready", "fact=continue", "step device", "step package", "step in-load", "step in-loaded",
    "fact=loaded", "step completed", "fact=all-sent", "journal committed", "fact=committed", "fact=grant-sent",
    "fact=granted", "fact=start-sent", "step cont", "step cont-answer", "RESUME", "fact=target-ran", "journal kept",
    "fact=run-acked", "step postcopy-active", "step pages", "step in-pages", "fact=start-refused", "journal forgotten",
    "fact=source-retired", "fact=link-lost", "fact=error", "fact=cancel", "fact=release", "fact=target-gone",
    "journal renounced", "fact=source-resumed", "fact=cleanup", "journal ended", "step cleanup", "row=",
)  # fmt: skip
"""Texts of the trace; some come in one mode only, and a fault whose moment never comes is not injected."""

DISK_MOMENTS: Final = (
    "fact=disks-wanted", "journal image-made", "fact=disks-served", "journal mirrors", "fact=disks-started",
    "step mirror", "fact=disk-ready", "fact=disks-ready", "step drain", "fact=disks-drained", "fact=disks-closed",
    "fact=disk-failed", "fact=disks-dropped",
)  # fmt: skip
"""The same for guests with local disks."""

KINDS: Final = (
    "crash-agent", "freeze-agent", "kill-qemu", "freeze-qemu", "cut-agents", "reset-agents", "drop", "double", "slow",
    "cut-stream", "reset-stream", "refuse-cont", "refuse-relock", "disk-full", "cancel", "start-postcopy",
    "migrate-again", "clock-jump", "fail-step", "unplugged-stream", "hung-stream", "alone",
)  # fmt: skip
WEIGHTS: Final = (6, 2, 2, 2, 4, 2, 1, 1, 1, 3, 3, 4, 1, 2, 5, 1, 2, 1, 1, 1, 2, 2)
DISKS_SHARE: Final = 0.3
"""Of all seeds."""
FAILING_STEPS: Final = ("in-load", "in-header", "device", "setup", "package")
SETTLED: Final = (0.3, 1.0, 3.0, 8.0, 20.0, FOR_GOOD_S)
LOCK_TEXT: Final = 'Failed to get "write" lock'


@dataclass(frozen=True, slots=True)
class Trigger:
    """When: `after_s` from the order to migrate, or at the `nth` line that holds `text` of `host` ('' any); then
    `steps` of the loop later."""

    after_s: float = 0.0
    text: str = ""
    host: str = ""
    nth: int = 1
    steps: int = 0

    def __str__(self) -> str:
        when = f"'{self.text.strip()}' #{self.nth} of {self.host or 'any'}" if self.text else f"{self.after_s:.3f} s"
        return f"{when} + {self.steps} steps"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, or that a person does meanwhile."""

    kind: str
    trigger: Trigger
    host: str = "a"
    for_s: float = FOR_GOOD_S
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lasts = "" if self.for_s >= FOR_GOOD_S else f" for {self.for_s:g} s"
        more = "".join(f" {key}={value}" for key, value in self.more.items())
        return f"{self.kind} {self.host}{lasts}{more} at {self.trigger}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What one seed means."""

    seed: str
    profiles: dict[str, str]
    mode: str
    settings: tuple[str, ...]
    multifd: int
    dirty: bool
    """The guest writes faster than memory moves: only postcopy ends that."""
    owner_paused: bool
    """Its owner had paused it before."""
    latency_s: float
    faults: tuple[Fault, ...]
    restart_all: bool
    """In the end every agent is restarted, and not only those that are dead."""
    postcopy_after_passes: int | None = None
    clear_text: bool = False
    """Asked for by name; else the job has credentials of its own."""
    disks: bool = False
    """The guest has two local disks, which go with it."""
    holds: bool = False
    """The switchover waits for a person's leave."""


CALM = Scenario(
    seed="by hand",
    profiles={"a": "11.1", "b": "11.1"},
    mode="precopy",
    settings=(),
    multifd=0,
    dirty=False,
    owner_paused=False,
    latency_s=0.001,
    faults=(),
    restart_all=False,
)
"""A precopy in which nothing happens: what a scenario by hand begins with."""


def draw(seed: str) -> Scenario:
    """The scenario of a seed. Disks are drawn beside everything else, so that other seeds mean what they meant."""
    chance = random.Random(f"disks {seed}")
    scenario = _draw(seed)
    if chance.random() >= DISKS_SHARE:
        return scenario
    around = [replace(_fault(chance), trigger=_disk_trigger(chance)) for _ in range(chance.choice((0, 1, 1, 2)))]
    return replace(scenario, disks=True, faults=(*scenario.faults, *around))


def _disk_trigger(chance: random.Random) -> Trigger:
    return Trigger(text=chance.choice(DISK_MOMENTS), steps=chance.choice((0, chance.randrange(40))))


def _draw(seed: str) -> Scenario:
    chance = random.Random(f"scenario {seed}")
    mode = chance.choice(("precopy", "precopy", "postcopy", "postcopy", "auto"))
    rate = chance.choice((None, 20_000_000, 2_000_000, 1_000_000))
    settings = [] if rate is None else [f"max-bandwidth={rate}"]
    if mode == "postcopy":
        late = chance.choice((None, 1_000_000, 3_000_000))
        settings += [] if late is None else [f"max-postcopy-bandwidth={late}"]
    count = chance.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 4))
    holds, words = _people(random.Random(f"people {seed}"), mode)
    return Scenario(
        seed=seed,
        profiles={host: chance.choice(VERSIONS) for host in ("a", "b")},
        mode=mode,
        settings=tuple(settings),
        multifd=2 if mode == "precopy" and chance.random() < 0.1 else 0,
        dirty=mode == "postcopy" and chance.random() < 0.7,
        owner_paused=chance.random() < 0.08,
        latency_s=chance.choice((0.0002, 0.001, 0.02)),
        faults=(*(_fault(chance) for _ in range(count)), *words),
        holds=holds,
        restart_all=chance.random() < 0.5,
        postcopy_after_passes=chance.choice((None, 1, 0)) if mode == "postcopy" else None,
        clear_text=chance.random() < 0.4,
    )


def _people(chance: random.Random, mode: str) -> tuple[bool, list[Fault]]:
    """Whether the switchover waits for leave, and what people say to the job; drawn apart from all that goes wrong."""
    holds, words = chance.random() < 0.12, list[Fault]()
    if holds and chance.random() < 0.75:  # else nobody gives it
        trigger = Trigger(text="row=M-hold", host="a", nth=chance.choice((1, 1, 2)), steps=chance.randrange(100))
        words.append(Fault("finalize", trigger, host="a"))
    if mode == "postcopy" and chance.random() < 0.2:
        moment = chance.choice(("fact=package-loaded", "fact=run-acked", "fact=link-lost"))
        words.append(Fault("pause", Trigger(text=moment, host="a", steps=chance.randrange(100)), host="a"))
        if chance.random() < 0.7:
            after = Trigger(text="row=G-ran-broken-hold", host="a", steps=chance.randrange(200))
            words.append(Fault("resume", after, host="a"))
    return holds, words


def _trigger(chance: random.Random) -> Trigger:
    if chance.random() < 0.2:
        return Trigger(after_s=chance.choice((0.05, 0.3, 1.5, 5.0)) * chance.random(), steps=chance.randrange(50))
    return Trigger(
        text=chance.choice(MOMENTS),
        host=chance.choice(("", "", "", "a", "b")),
        nth=chance.choice((1, 1, 1, 1, 1, 1, 2, 3)),
        steps=chance.choice((0, chance.randrange(5), chance.randrange(40), chance.randrange(200))),
    )


def _fault(chance: random.Random) -> Fault:
    kind = chance.choices(KINDS, WEIGHTS)[0]
    more: dict[str, Any] = {}
    match kind:
        case "cut-agents" | "cut-stream":
            more["way"] = chance.choice(("both", "both", "a>b", "b>a"))
        case "drop" | "double":
            more["share"] = chance.choice((0.1, 0.3, 1.0))
        case "slow":
            more["latency_s"] = chance.choice((0.2, 1.0, 3.0))
        case "refuse-cont":
            more["times"] = chance.choice((1, 2, 0))
        case "cancel":
            more["times"] = chance.choice((1, 1, 2))
        case "clock-jump":
            more["by_s"] = chance.choice((-3600.0, -5.0, 5.0, 86400.0))
        case "fail-step":
            more["step"] = chance.choice(FAILING_STEPS)
    return Fault(
        kind, _trigger(chance), host=chance.choice(("a", "b", "b")), for_s=chance.choice(SETTLED), more=more
    )  # fmt: skip
