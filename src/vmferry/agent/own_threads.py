"""Blocking work in a thread of its own: for what must not wait for others, and whose end nobody may have to wait for.

The store's threads are few and may all be busy for hours, or hang with the store. A guest that stands waits for none of
them. The threads here are daemons: one that hangs does not keep the agent from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(name: str, work: Callable[[], T]) -> asyncio.Future[T]:
    """Begins the work at once. The future has its result or what it raised; to cancel that leaves the thread at work.

    Raises RuntimeError when the system gives no thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def answer(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # without an error it is a T

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - whoever waits for it decides
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(answer, result, failed)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
