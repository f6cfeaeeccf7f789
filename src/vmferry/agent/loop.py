"""The loop of one attempt: look, decide, act. The same on both sides, the same after a restart.

Theory of operation
-------------------
An attempt owns a fact log. Anything that happens (an event of QEMU, a message of the other agent, a command
of a person, an effect's result) is recorded as a fact or a reading and wakes the loop. The loop finds the row,
asks whether its effect is due, and carries it out in a task of its own, whose first step re-checks the guard on a
fresh view. Nothing else acts.

Rule 1: at most one effect is under way. One that may be interrupted (`interruptible`) is cancelled as soon as
        the table asks for something else; all others end by their own deadline first.
Rule 2: an effect whose row has not changed is tried again with a growing pause, never in a tight loop.
Rule 3: while it is held back (a person's rescue is at work) it looks and does nothing.
Rule 4: an exception of an effect never stops or kills a guest: it becomes a fact, a reading, or a line in the
        log, as `on_trouble` says.

What a restart of the agent loses is only the log; facts that matter are read again from QEMU, the journal and
the other side.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from vmferry.clock import Clock
from vmferry.core.decide import effect_now
from vmferry.core.effects import DestinationEffect, Effect
from vmferry.core.facts import ROUNDED, Fact, FactLog
from vmferry.core.table import Row
from vmferry.errors import VmferryError

log = logging.getLogger("vmferry.agent")
E = TypeVar("E", Effect, DestinationEffect)

MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
"""What an answer of other types than ours ends in. A loop that ended with it would leave the guest paused for ever."""
RETRY_FIRST_S = 0.05
RETRY_LAST_S = 5.0
"""Pauses between tries of the same effect in the same row: doubled from first to last."""
DOUBLINGS_MAX = 20
"""Beyond any last pause; an effect may be tried for days."""
RESCAN_S = 1.0
"""The loop looks again at least this often, so that a lost wake-up costs a second and never a guest."""


class AttemptLoop(ABC, Generic[E]):
    """Base of the source's and the destination's attempt; runs on the agent's event loop only."""

    def __init__(self, *, job: str, vm: str, clock: Clock) -> None:
        self.job, self.vm, self.clock = job, vm, clock
        self.facts = FactLog()
        self.revision = 0
        """Grows with everything that is new of the job."""
        self.ended = asyncio.Event()
        self._wake = asyncio.Event()
        self._row: Row[E] | None = None
        self._row_since_s = 0.0
        self._last: E | None = None
        self._tries = 0
        self._not_before_s = 0.0
        self.doing: E | None = None
        """The effect that is under way."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._held_back = False

    @property
    def entered(self) -> str | None:
        """The label of the row that the loop has entered last."""
        return self._row.label if self._row is not None else None

    # What a side must say.

    @abstractmethod
    def row(self) -> Row[E]:
        """The row for what is known now."""

    @abstractmethod
    def allows(self, effect: E) -> bool:
        """The guard of the effect on a fresh view."""

    @abstractmethod
    async def act(self, effect: E) -> None:
        """Carries the effect out: the one match over effects of this side."""

    @abstractmethod
    def interruptible(self, effect: E) -> bool:
        """True if the effect may be cancelled half-way without harm."""

    @abstractmethod
    def on_trouble(self, effect: E, error: Exception) -> None:
        """An effect raised: record what that proves."""

    def pause_last_s(self, effect: E) -> float:
        """The longest pause between two tries of the effect."""
        return RETRY_LAST_S

    def on_facts(self, before: FactLog, after: FactLog) -> None:
        """Called after a fact was added: publish what changed."""

    def on_row(self, row: Row[E]) -> None:
        """Called when another row holds."""

    async def look(self) -> None:
        """Called at least every RESCAN_S and after each wake-up: refresh the readings."""

    # What everybody uses.

    def note(self, fact: Fact, *, round_no: int = 0, text: str = "", by: str = "") -> None:
        """Records a fact (once) and wakes the loop."""
        before = self.facts
        self.facts = before.with_fact(fact, round_no=round_no, text=text, at_s=self.clock.wall_s(), by=by)
        if self.facts is not before:
            log.info("job=%s vm=%s fact=%s round=%d by=%s text=%r", self.job, self.vm, fact, round_no, by, text)
            if fact not in ROUNDED:
                self._not_before_s = 0.0  # the world moved: what failed before may work now
            self.on_facts(before, self.facts)
            self.wake()  # only for news: `look` repeats what it sees, and must not wake itself for ever

    def wake(self) -> None:
        """Makes the loop look again."""
        self._wake.set()

    async def hold_back(self) -> None:
        """Nothing more is carried out until `go_on`; returns when nothing is under way any more."""
        self._held_back = True
        self.wake()
        await self._idle.wait()

    def go_on(self) -> None:
        """Ends `hold_back`."""
        self._held_back = False
        self.wake()

    @property
    def is_held_back(self) -> bool:
        """Somebody else acts on this guest."""
        return self._held_back

    def current_row(self) -> Row[E]:
        """The row that holds now (for status)."""
        return self.row()

    async def run(self) -> None:
        """Runs until the attempt has ended."""
        while not self.ended.is_set():
            self._wake.clear()
            await self.look()
            self.note_view()
            row = self._enter(self.row())
            effect = effect_now(row, (self.clock.now_s() - self._row_since_s) * 1000)
            if effect is not None and self._due(effect) and self.allows(effect) and not self._held_back:
                await self._perform(effect)
                continue
            await self._sleep(self._pause_s(row, effect))

    def note_view(self) -> None:
        """What the table is asked about may be told in the log, where it has changed."""

    def _enter(self, row: Row[E]) -> Row[E]:
        if row is not self._row:
            log.info("job=%s vm=%s row=%s outcome=%s", self.job, self.vm, row.label, row.outcome.value)
            self._row, self._row_since_s = row, self.clock.now_s()
            self._last, self._tries, self._not_before_s = None, 0, 0.0
            self.on_row(row)
        return row

    def _due(self, effect: E) -> bool:
        return effect is not self._last or self.clock.now_s() >= self._not_before_s

    def _pause_s(self, row: Row[E], effect: E | None) -> float:
        now = self.clock.now_s()
        pauses = [RESCAN_S]
        if row.limit_ms is not None:
            pauses.append(self._row_since_s + row.limit_ms / 1000 - now)
        if effect is not None:
            pauses.append(self._not_before_s - now)
        return max(0.001, min(p for p in pauses if p > 0))

    async def _sleep(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _guarded(self, effect: E) -> None:
        # 1. the loop finds the grant due and allowed, and makes its task  2. a cancel is accepted  3. the task begins
        if self.allows(effect):
            await self.act(effect)

    async def _perform(self, effect: E) -> None:
        if effect is not self._last:
            self._last, self._tries = effect, 0
        self._tries += 1
        self.doing = effect
        self._idle.clear()
        task = asyncio.create_task(self._guarded(effect), name=f"{self.job}-{effect.value}")
        try:
            while not task.done():
                self._wake.clear()
                waker = asyncio.create_task(self._wake.wait(), name=f"{self.job}-wake")
                await asyncio.wait({task, waker}, return_when=asyncio.FIRST_COMPLETED)
                waker.cancel()
                is_wanted = self.row().do is effect and not self._held_back
                if not task.done() and self.interruptible(effect) and not is_wanted:
                    task.cancel()
                    await asyncio.wait({task})
            if not task.cancelled():
                task.result()
        except (VmferryError, OSError, *MALFORMED) as error:
            words = str(error) if isinstance(error, VmferryError | OSError) else f"a malformed answer: {error!r}"
            log.warning("job=%s vm=%s effect=%s result=trouble error=%s", self.job, self.vm, effect.value, words)
            self.on_trouble(effect, error)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})  # what it holds, a socket or a thread, is given back before this has ended
            raise
        finally:
            self.doing = None
            self._idle.set()
            pause_s = min(RETRY_FIRST_S * 2 ** min(self._tries - 1, DOUBLINGS_MAX), self.pause_last_s(effect))
            self._not_before_s = self.clock.now_s() + pause_s
            self._wake.set()
