"""An event loop whose time is a number: it jumps to the next timer as soon as nothing is left to do now.

Theory of operation
-------------------
Everything that asyncio runs is a *handle* with a context; the context says to which simulated process it belongs
(`OWNER`), and tasks and callbacks inherit it. So a process can be stopped like a real one, between any two steps of
any of its tasks: the handles of a frozen process are parked until it thaws, those of a dead one never run again.

Rule 1: nothing here depends on addresses, hashes of strings, threads, files or the real time: handles run in the
        order in which they became ready, timers in the order of (time, order of being made).
Rule 2: tasks hash to their number, so that a set of tasks is walked in the same order in every run.
Rule 3: what would run in a thread runs at once, inline.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

START_S = 1000.0
"""Not 0, so that nothing works only because the clock began just now."""
STEPS_AT_ONCE_MAX = 200_000
"""Handles at one and the same time: more is a loop that waits for nothing."""


class Stalled(Exception):
    """Nothing is ready, and there is no timer: whatever is waited for can never happen."""


class Spinning(Exception):
    """The same moment does not end: something runs round and round without waiting."""


class Owner(Protocol):
    """A simulated process, as the loop sees it."""

    is_dead: bool
    is_frozen: bool
    parked: list[Handle]

    def keep(self, task: SimTask) -> None:
        """A task of this process was made."""


OWNER: contextvars.ContextVar[Owner | None] = contextvars.ContextVar("owner", default=None)


class SimTask(asyncio.Task[Any]):
    """A task with a number of its own for a hash."""

    def __init__(self, coro: Any, *, number: int, **more: Any) -> None:
        self.number = number  # first: asyncio puts every new task into a set
        super().__init__(coro, **more)

    def __hash__(self) -> int:
        return self.number


class Handle(asyncio.TimerHandle):
    """One callback, due or to come."""

    owner: Owner | None

    def run(self) -> None:
        """Calls it, in its context."""
        self._run()


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop of one run. `steps` counts the handles that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.broken: list[str] = []
        """What callbacks raised: mistakes, since nobody else sees them."""
        self.on_step: Callable[[], None] | None = None
        self._now_s = START_S
        self._todo: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._timers_made = 0
        self._tasks_made = 0
        self._steps_now = 0
        self._is_running = False

    # --- running ---

    def run_until_complete(self, future: Coroutine[Any, Any, T]) -> T:  # type: ignore[override]
        """Runs until it is done. Raises Stalled or Spinning when that can never be."""
        task = self.create_task(future)
        asyncio.events._set_running_loop(self)
        self._is_running = True
        try:
            while not task.done():
                self._run_one()
        finally:
            self._is_running = False
            asyncio.events._set_running_loop(None)
        return task.result()

    def _run_one(self) -> None:
        if not self._todo:
            self._jump()
        handle = self._todo.popleft()
        owner = handle.owner
        if handle.cancelled() or (owner is not None and owner.is_dead):
            return
        if owner is not None and owner.is_frozen:
            owner.parked.append(handle)
            return
        self.steps += 1
        self._steps_now += 1
        if self._steps_now > STEPS_AT_ONCE_MAX:
            raise Spinning(f"{self._steps_now} steps at {self._now_s:.6f}, the last: {handle!r}")
        handle.run()
        if self.on_step is not None:
            self.on_step()

    def _jump(self) -> None:
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        if not self._timers:
            raise Stalled(f"nothing is left to happen after {self._now_s:.6f}")
        if self._timers[0][0] > self._now_s:
            self._now_s = self._timers[0][0]
            self._steps_now = 0
        while self._timers and self._timers[0][0] <= self._now_s:
            self._todo.append(heapq.heappop(self._timers)[2])

    def resume(self, parked: list[Handle]) -> None:
        """What a frozen process missed becomes ready, in its order."""
        self._todo.extend(parked)

    # --- what asyncio asks for ---

    def time(self) -> float:
        return self._now_s

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """Never: it would look at the real time."""
        self._debug = False

    def is_running(self) -> bool:
        return self._is_running

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = self._handle(self._now_s, callback, args, context)
        self._todo.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = self._handle(when, callback, args, context)
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def _handle(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> Handle:
        own = contextvars.copy_context() if context is None else context
        handle = Handle(when, callback, args, self, own)
        handle.owner = own.get(OWNER)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        self._tasks_made += 1
        number = self._tasks_made
        task = SimTask(coro, number=number, loop=self, name=name or f"task-{number}", context=context)
        owner = OWNER.get() if context is None else context.get(OWNER)
        if owner is not None:
            owner.keep(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Inline: what threads do is short, and its order must be the same in every run."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it is the caller's, as with a real executor
            done.set_exception(error)
        return done

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        message = str(context.get("message", ""))
        if "never retrieved" in message or "was destroyed" in message:
            return  # said when memory is freed, so at no moment of the run
        self.broken.append(f"{message}: {context.get('exception')!r}")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)


async def pass_s(seconds: float) -> None:
    """Lets virtual time go by. Only for what has a time of its own: a disk, a wire, a person."""
    loop = asyncio.get_running_loop()
    passed: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not passed.done():
            passed.set_result(None)

    loop.call_later(seconds, end)
    await passed
