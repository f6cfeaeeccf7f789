"""A store that fails on purpose, around any other: errors, lost answers, torn writes, a full disk, slowness, death.

`FailingStore(inner, fault_of)` asks `fault_of(call)` before each call; None lets it pass. Calls are numbered from 0, so
"fails at its nth call" is `lambda call: Fault.DIES if call.number == n else None`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from vmferry.store.backend import Backend, Entry
from vmferry.store.errors import StorePermanent, StoreTransient


class Fault(Enum):
    """What happens to one call."""

    REFUSED = auto()
    """Nothing is done; StoreTransient."""
    ANSWER_LOST = auto()
    """It is done; StoreTransient."""
    FULL = auto()
    """Nothing is done by a put; StorePermanent. Other calls pass: a full disk can be read and emptied."""
    DENIED = auto()
    """Nothing is done by any call; StorePermanent: a key that has run out."""
    DIES = auto()
    """The process is gone before the call: `Died`, from this call and from every later one."""
    DIES_AFTER = auto()
    """The process is gone after the call."""
    DIES_TORN = auto()
    """A put leaves half of its object under the name (the contract forbids it, bad hardware does it), then `Died`."""
    SLOW = auto()
    """The call waits until the test sets `may_go_on`; `is_waiting` tells the test that it does."""


class Died(BaseException):
    """The process is gone. Not an Exception: no handler of the product may see it and tidy up."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a method of the store."""

    number: int
    method: str
    name: str


class FailingStore:
    """A `Backend` around another."""

    def __init__(self, inner: Backend, fault_of: Callable[[Call], Fault | None]) -> None:
        self.inner = inner
        self.calls: list[Call] = []
        self.is_waiting, self.may_go_on = threading.Event(), threading.Event()
        self._fault_of = fault_of
        self._is_dead = False

    def put(self, name: str, data: bytes) -> None:
        """See `Backend`."""
        fault = self._before("put", name)
        if fault is Fault.FULL:
            raise StorePermanent(f"{name}: No space left on device")
        if fault is Fault.DIES_TORN:
            self.inner.put(name, data[: len(data) // 2])
            self._die()
        self.inner.put(name, data)
        self._after(fault, name)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Backend`."""
        fault = self._before("get", name)
        data = self.inner.get(name, offset, length)
        self._after(fault, name)
        return data

    def size(self, name: str) -> int:
        """See `Backend`."""
        fault = self._before("size", name)
        size = self.inner.size(name)
        self._after(fault, name)
        return size

    def list(self, prefix: str) -> list[Entry]:
        """See `Backend`."""
        fault = self._before("list", prefix)
        entries = self.inner.list(prefix)
        self._after(fault, prefix)
        return entries

    def delete(self, name: str) -> None:
        """See `Backend`."""
        fault = self._before("delete", name)
        self.inner.delete(name)
        self._after(fault, name)

    def close(self) -> None:
        """See `Backend`."""
        self.inner.close()

    def _before(self, method: str, name: str) -> Fault | None:
        if self._is_dead:
            raise Died
        call = Call(len(self.calls), method, name)
        self.calls.append(call)
        fault = self._fault_of(call)
        match fault:
            case Fault.REFUSED:
                raise StoreTransient(f"{name}: refused on purpose")
            case Fault.DENIED:
                raise StorePermanent(f"{name}: denied on purpose")
            case Fault.DIES:
                self._die()
            case Fault.SLOW:
                self.is_waiting.set()
                self.may_go_on.wait()
            case _:
                pass
        return fault

    def _after(self, fault: Fault | None, name: str) -> None:
        if fault is Fault.ANSWER_LOST:
            raise StoreTransient(f"{name}: the answer was lost on purpose")
        if fault in (Fault.DIES_AFTER, Fault.DIES_TORN):
            self._die()

    def _die(self) -> None:
        self._is_dead = True
        raise Died
