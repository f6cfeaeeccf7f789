"""Where and how a connection is cut at random, and both ends of it when it has been: for tests of the endpoints.

Theory of operation
-------------------
A `Plan` is drawn from a seed alone, so a seed says again what it said before; only the moments of the processes differ.
The connections go through a relay, which cuts them at a byte of the stream or of the answers, or is cut at a moment.
Only a cut by the owner goes without one, so nothing that was said is lost in between.

Rule 1: the relay notes whether the destination's last word has gone on. When it swallowed that word one end believes
        what the other never heard; nobody on the wire can know better, and nothing else excuses that they disagree.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.core.facts import Fact
from vmferry.engine.ledger import Ledger
from vmferry.testing.hosts import NEWEST, OLDEST
from vmferry.testing.relay import Relay, Trigger
from vmferry.testing.stream_peers import MIB

VERSIONS: Final = (OLDEST, NEWEST)
MODES: Final = ("precopy", "precopy", "multifd", "postcopy", "postcopy", "postcopy", "preempt")
WAYS: Final = ("stream", "stream", "devices", "answers", "network", "channel", "owner")
RAM_MIB, TOUCH_MIB = 16, 8
STREAM_BYTES: Final = 9_000_000
"""What such a guest's stream has, roughly."""
DEVICES_BYTES: Final = 14_000
"""What its device state has."""
A_DEVICE: Final = b"timer"
SHUT_0: Final = bytes.fromhex("00 01 00 04 00 00 00 00")


@dataclass(frozen=True, slots=True)
class Plan:
    """One cut.

    `way`: at byte `at` of the stream, of what follows a device's name in it, or of the answers; or `after_s` after
    `fact`: all connections in the network, one of them, or this side's own.
    `is_held`: the endpoint's owner takes its time: it gives its words when it has seen that all is there.
    `bytes_per_s`: how fast the source may send, 0 = as fast as it can.
    """

    seed: int
    source: str
    there: str
    mode: str
    way: str
    at: int
    fact: Fact
    after_s: float
    is_held: bool
    bytes_per_s: int

    @property
    def is_postcopy(self) -> bool:
        return self.mode in ("postcopy", "preempt")

    @property
    def channels(self) -> int:
        return 2 if self.mode == "multifd" else 0


def draw(role: str, seed: int, facts: tuple[Fact, ...]) -> Plan:
    """The plan of this seed. `facts`: after which a cut at a moment may come."""
    rng = random.Random(f"{role} {seed}")
    way = rng.choice(WAYS)
    if way == "stream":
        at = rng.choice((rng.randrange(STREAM_BYTES), int(STREAM_BYTES ** rng.random())))
    else:
        at = rng.randrange(DEVICES_BYTES if way == "devices" else 60)
    return Plan(
        seed,
        rng.choice(VERSIONS),
        rng.choice(VERSIONS),
        rng.choice(MODES),
        way,
        at,
        rng.choice(facts),
        rng.choice((0.0, rng.uniform(0, 0.01), rng.uniform(0, 0.2))),
        rng.random() < 0.5,
        rng.choice((0, 0, 20 * MIB)),
    )


class Network:
    """What the connections of a plan go through."""

    def __init__(self, plan: Plan, folder: Path, target: str, *, throttles: bool) -> None:
        self.plan = plan
        self._relay: Relay | None = None
        self._result: Trigger | None = None
        self.address = target
        if plan.way == "owner":
            return
        self._relay = relay = Relay(target, listen=str(folder / "relay"))
        assert isinstance(relay.address, str)
        self.address = relay.address
        # Before the cuts: of two marks at the same byte the first comes first.
        self._result = relay.to_client.at_pattern(SHUT_0, lambda: None, when="after")
        if throttles and plan.bytes_per_s:
            relay.to_target.throttle(plan.bytes_per_s)
        if plan.way == "stream":
            relay.to_target.at_offset(plan.at, relay.cut)
        elif plan.way == "answers":
            relay.to_client.at_offset(plan.at, relay.cut)
        elif plan.way == "devices":
            begin = relay.to_target.at_pattern(A_DEVICE, lambda: self._cut_behind(relay, begin), when="after")

    def _cut_behind(self, relay: Relay, begin: Trigger) -> None:
        assert begin.fired_at is not None
        relay.to_target.at_offset(begin.fired_at + self.plan.at, relay.cut)

    def cut_at_its_moment(self, ledger: Ledger, cut: Callable[[], None], ends: tuple[Fact, ...]) -> None:
        """For the ways that go by time: waits for the moment, or until one of `ends`: there is nothing to cut then."""
        plan = self.plan
        if plan.way not in ("network", "channel", "owner"):
            return
        if ledger.wait(plan.fact, *ends, timeout_s=30) is plan.fact:
            ledger.wait(*ends, timeout_s=plan.after_s)
        if self._relay is None:
            cut()
        elif plan.way == "network":
            self._relay.cut()
        else:
            self._relay.cut(number=plan.at)

    @property
    def has_swallowed_the_result(self) -> bool:
        """Whether the destination's last word may have been said and did not arrive."""
        return self._result is not None and not self._result.has_fired

    def heal(self) -> None:
        """Nothing is cut from here on."""
        if self._relay is not None:
            self._relay.to_target.triggers = []
            self._relay.to_client.triggers = []
            self._relay.to_target.throttle(None)

    def close(self) -> None:
        if self._relay is not None:
            self._relay.stop()


@contextmanager
def network(plan: Plan, folder: Path, target: str, *, throttles: bool = False) -> Iterator[Network]:
    """Opens one. No thread is left behind. `throttles`: for a source that does not limit its rate itself."""
    opened = Network(plan, folder, target, throttles=throttles)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def told(plan: Plan) -> Iterator[None]:
    """Says which plan it was, and that no thread is left of it."""
    print(f"\n{plan}")
    threads = threading.active_count()
    try:
        yield
    except BaseException as error:
        error.add_note(f"VMFERRY_CUTS_SEED={plan.seed}: {plan}")
        raise
    assert threading.active_count() == threads, threading.enumerate()
