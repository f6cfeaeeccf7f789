"""Fences: how a source gets sure that a silent destination does not run its guest and never will.

Theory of operation
-------------------
One protocol, three implementations. `ask` answers FENCED only with a proof that holds from then on, until `release`:

    GenerationFence   the other agent's durable word: it holds no newer generation any more (both agents in touch)
    LocksFence        QEMU's own locks on shared disks: who can take them has proof that no QEMU runs on these disks,
                      and while they are held none can begin to
    PersonFence       a person says that the other side is dead

What a lock cannot prove is that nobody *ran* in between, and stopped again. So LocksFence also wants every image
untouched since the order to start was sent: then nothing of such a run can have reached a disk.

Rule 1: whatever cannot be asked is UNKNOWN, which leaves everything as it is.
Rule 2: all images or none: a fence that could be taken in part is given back at once.

    1. the fence is taken: FENCED  2. it is given back, so that the source's QEMU can take its disks
    3. the destination's QEMU, which was told to start long ago, takes them in between  4. the source's is refused

Then nothing runs twice: QEMU itself takes the locks or does not start. The source asks the fence anew (`broken`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from vmferry.agent.peers import PeerLink
from vmferry.errors import HostUnreachable, NotTrusted, VmferryError
from vmferry.vm.image_locks import WriteLock

log = logging.getLogger("vmferry.agent")

ASK_S = 1.5


class Verdict(Enum):
    """What a fence says."""

    FENCED = "fenced"
    """The guest does not run on the other side and cannot begin to."""
    RUNS = "runs"
    """Somebody has the guest, or its disks, over there."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict and its reason, in words that follow 'because'."""

    verdict: Verdict
    text: str


class Fence(Protocol):
    """See the module. `testing.fence_contract` proves that an implementation keeps to it."""

    name: str

    async def ask(self) -> Finding:
        """Never raises for trouble of the world's; may be asked again at any time."""

    def release(self) -> None:
        """What is held is given back; the proof does not hold any more."""


@dataclass(frozen=True, slots=True)
class ImageStamp:
    """What of an image changes with every write."""

    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: str) -> ImageStamp:
        """Raises OSError."""
        status = os.stat(path)
        return cls(status.st_size, max(status.st_mtime_ns, status.st_ctime_ns))


def stamps(paths: Iterable[str]) -> dict[str, ImageStamp]:
    """Taken when the source has given its disks away and before anybody else may have them. What cannot be looked at
    has none, and then there is no fence by locks."""
    found = {}
    for path in paths:
        try:
            found[path] = ImageStamp.of(path)
        except OSError as error:
            log.info("path=%s effect=stamp result=%s", path, error)
            return {}
    return found


def busy_image(paths: Iterable[str]) -> str:
    """Words on an image that somebody else has for writing, '' if there is none that can be seen. May block."""
    for path in paths:
        try:
            lock = WriteLock.take(path)
        except OSError as error:
            log.info("path=%s effect=look-at-lock result=%s", path, error)
            continue
        if lock is None:
            return f"somebody has its disk {path} for writing"
        lock.release()
    return ""


class LocksFence:
    """QEMU's own image locks. `before`: every writable image, as it was when the order to start was sent; both hosts
    must have been seen to share the locks of each."""

    name = "locks"

    def __init__(self, before: Mapping[str, ImageStamp]) -> None:
        self._before = dict(before)
        self._held: list[WriteLock] = []

    async def ask(self) -> Finding:
        """In a thread: an image may lie on a network that hangs."""
        if not self._before:
            return Finding(Verdict.UNKNOWN, "it has no writable image on which both hosts see each other's locks")
        work = asyncio.ensure_future(asyncio.to_thread(self._take_all))
        try:
            async with asyncio.timeout(ASK_S):
                return await asyncio.shield(work)
        except TimeoutError:
            # A thread cannot be stopped: what it takes after all, nobody knows of, and the source itself wants.
            work.add_done_callback(lambda _: self.release())
            return Finding(Verdict.UNKNOWN, "its images cannot be looked at")

    def _take_all(self) -> Finding:
        self.release()
        taken: list[WriteLock] = []
        try:
            for path, before in self._before.items():
                lock = WriteLock.take(path)
                if lock is None:
                    return Finding(Verdict.RUNS, f"somebody else has the image {path}")
                taken.append(lock)
                if ImageStamp.of(path) != before:
                    return Finding(
                        Verdict.UNKNOWN, f"the image {path} was changed since the destination was told to start"
                    )
            self._held, taken = taken, []
        except OSError as error:
            return Finding(Verdict.UNKNOWN, f"an image cannot be looked at: {error}")
        finally:
            for lock in taken:
                lock.release()
        return Finding(Verdict.FENCED, f"the locks of {', '.join(self._before)} are held here and nothing was written")

    def release(self) -> None:
        """Gives every lock back."""
        for lock in self._held:
            lock.release()
        self._held = []


class GenerationFence:
    """The other agent's durable word."""

    name = "generation"

    def __init__(self, link: PeerLink, question: Mapping[str, object]) -> None:
        self._link, self._question = link, dict(question)

    async def ask(self) -> Finding:
        try:
            facts = await self._link.call("peer-target", self._question, deadline_s=ASK_S)
        except (HostUnreachable, NotTrusted) as error:
            return Finding(Verdict.UNKNOWN, str(error))
        except VmferryError as error:
            return Finding(Verdict.UNKNOWN, f"it answers: {error}")
        if facts.get("gone"):
            return Finding(Verdict.FENCED, "its agent gave the guest up for good without having run it")
        if facts.get("ran"):
            return Finding(Verdict.RUNS, "its agent says that the guest runs there")
        return Finding(Verdict.UNKNOWN, "its agent has not decided")

    def release(self) -> None:
        """A durable word is not given back."""


class PersonFence:
    """A person's word, which counts only where nothing that is known speaks against it."""

    name = "person"

    def __init__(self, *, says_dead: bool, against: str = "") -> None:
        self._says_dead, self._against = says_dead, against

    async def ask(self) -> Finding:
        if self._against:
            return Finding(Verdict.RUNS, self._against)
        if self._says_dead:
            return Finding(Verdict.FENCED, "a person says that the other side is dead")
        return Finding(Verdict.UNKNOWN, "nobody said anything")

    def release(self) -> None:
        """A word is not given back."""
