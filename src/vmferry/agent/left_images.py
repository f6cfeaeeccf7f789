"""Images that a guest left on this host when it went with its disks: as long as nobody touches them, they are what its
disks were at that moment, and only what changed since has to come back.

Theory of operation
-------------------
At the switch both sides' images are equal. The destination's QEMU has a dirty bitmap on each disk from before the guest
runs there (`since_name`), which nothing ever clears: whatever differs from the image that was left is in it. The
source's agent writes down what its images look like after its QEMU has ended: device, inode, size, times. An image
that still looks so was not written to.

    1. switch: equal   2. bitmap there   3. the guest runs there   4. the QEMU here ends   5. LEFT is journalled

A copy that was whole, of a move that failed, is kept for a while in the same way, with a bitmap from before the copy on
the source (`tried_name`): what a second try sends is what was written since.

Rule 1: an image whose looks have changed is nobody's base any more; it is only a file that is in the way.
Rule 2: LEFT is written by the agent that has seen that QEMU end: after a restart nobody can say what came between.
Rule 3: an image is taken away only if it is what was written down, no guest of this host has it, its time is over, and
        either a person asked for that and the guest runs on the other host, or it is the copy of a try.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry import limits
from vmferry.agent.images import Stamp
from vmferry.agent.wants import Mirror, PlacedDisk
from vmferry.errors import Unfit, VmferryError
from vmferry.jobs.journal import Entry

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.destination import DestinationAttempt
    from vmferry.agent.source import SourceAttempt

log = logging.getLogger("vmferry.agent")

LOOK_S = 1.0
"""How often it is looked whether an image's time is over, and whether it may go then: less and less often."""
ASK_S = 3.0


@dataclass(frozen=True, slots=True)
class LeftImage:
    """The body of the journal's LEFT entry."""

    job: str
    """With which the guest went."""
    vm: str
    host: str
    """Where it went."""
    disk: str
    """`disk0` and so on."""
    path: str
    size_bytes: int
    """What the guest sees of it."""
    stamp: Stamp
    let_go_s: float | None = None
    """Wall time from which on it may be taken away; None: never."""
    is_tried: bool = False
    """No guest left it: it is the whole copy of a disk, of a move here that failed. `host` is where the guest is."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Why an image whose time is over is still here."""

    why: str
    pause_s: float
    until_s: float
    """When it is looked at again; the agent's own time."""
    is_over: bool = False
    """It is not: whether it may go is nothing that can be found out any more."""


class LeftImages:
    """Those of one host. Owned by its agent."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._left: dict[str, LeftImage] = {}
        """By path; the newest."""
        self._waits: dict[str, Wait] = {}
        """By path: images whose time is over, and that were kept when they were looked at last."""
        self._unwanted: set[str] = set()
        """Jobs that were cancelled: their copies are of no use."""
        self._tending: asyncio.Task[None] | None = None

    def restore(self, bodies: Mapping[str, dict[str, Any]]) -> None:
        """What the journal says, by path. What cannot be read is a line in the log; a file that is not there now may be
        in a folder that is mounted later, and is nobody's base until the next start."""
        for path, body in bodies.items():
            try:
                left = msgspec.convert(body, LeftImage)
            except msgspec.ValidationError as error:
                log.warning("image=%s journal=left result=%s", path, error)
                continue
            if self.agent.host.image_stamp(path) is not None:
                self._left[path] = left

    async def keep(self, attempt: SourceAttempt) -> None:
        """The guest went, and its QEMU here has just been ended. Trouble is a line in the log: it only means that the
        disks would have to come back as a whole.

        From the switch on nobody has the images locked: only one that looks as it did before the order to start was
        sent is what the guest left."""
        wanted = attempt.wanted
        now_s = self.agent.clock.wall_s()
        let_go_s = None if wanted.keep_images_s is None else now_s + wanted.keep_images_s
        for mirror in attempt.mirrors:
            stamp = attempt.copying.at_switch.get(mirror.path)
            if stamp is None or not mirror.size_bytes or not attempt.machine.is_gone:
                continue
            try:
                await self.agent.host.sync_image(mirror.path)
            except OSError as error:
                log.info("vm=%s image=%s result=no base: %s", attempt.vm, mirror.path, error)
                continue
            if self.agent.host.image_stamp(mirror.path) == stamp:
                await self._write(_left(attempt, mirror, stamp, let_go_s))
        self.tend()

    async def keep_tried(self, attempt: DestinationAttempt, disk: PlacedDisk, stamp: Stamp) -> bool:
        """The whole copy of a disk, of a place that failed. False: it could not be kept."""
        left = LeftImage(
            job=attempt.job,
            vm=attempt.vm,
            host=attempt.place.source,
            disk=disk.id,
            path=disk.path,
            size_bytes=disk.size_bytes,
            stamp=stamp,
            let_go_s=self.agent.clock.wall_s() + limits.DISK_TRIED_S,
            is_tried=True,
        )
        try:
            await self.agent.host.sync_image(disk.path)
        except OSError as error:
            log.info("vm=%s image=%s result=not kept: %s", left.vm, left.path, error)
            return False
        if left.job in self._unwanted:  # that took a while, and somebody cancelled the move
            return False
        await self._write(left)
        self.tend()
        return self._left.get(left.path) is left

    def is_whole(self, path: str, job: str) -> bool:
        """The image is what that job left, untouched."""
        left = self._left.get(path)
        return left is not None and left.job == job and self._is_untouched(left)

    def is_spent(self, path: str, vm: str) -> bool:
        """The image is the copy of a try to bring that very guest here, untouched. Whoever does not go on with it goes
        without: its QEMU was started anew, say, and nobody counts any more what was written since."""
        left = self._left.get(path)
        if left is None or not left.is_tried or left.vm != vm or self._is_used(left):
            return False
        return self._is_untouched(left)

    async def make_room(self, path: str, vm: str) -> None:
        """A place of that guest makes a new copy under this path: a spent one is taken away. Raises Unfit, OSError."""
        if self.is_spent(path, vm) and self.agent.host.remove_left_image(path, self._left[path].stamp):
            log.info("vm=%s image=%s result=removed: nobody counts what it lacks", vm, path)
            await self.forget([path])

    async def renew(self, path: str, stamp: Stamp | None) -> None:
        """A place's QEMU has written to the image, and it looked so when that ended. What differs from the guest's disk
        is still only what the guest's bitmap has."""
        left = self._left.get(path)
        if left is not None and stamp is not None:
            await self._write(replace(left, stamp=stamp))

    async def _write(self, left: LeftImage) -> None:
        try:
            await self.agent.journal.append(Entry.LEFT, left.path, msgspec.to_builtins(left))
        except Unfit as error:
            log.warning("vm=%s image=%s journal=left result=%s", left.vm, left.path, error)
            return
        self._left[left.path] = left
        self._waits.pop(left.path, None)

    def find(self, job: str, disk: str) -> LeftImage | None:
        """The image that this disk was when its guest went with that job, if it still is as it was left."""
        for left in self._left.values():
            if (left.job, left.disk) == (job, disk) and self._is_untouched(left):
                return left
        return None

    def _is_untouched(self, left: LeftImage) -> bool:
        return self.agent.host.image_stamp(left.path) == left.stamp

    def _is_awaited(self, left: LeftImage) -> bool:
        """The guest is on its way back into it, or is here, or another one has it."""
        places = (place for place in self.agent.places.values() if not place.ended.is_set())
        return (
            left.vm in self.agent.vms
            or self._is_used(left)
            or any(left.path == disk.path for each in places for disk in each.place.disks)
        )

    async def forget_tries(self, job: str) -> None:
        """That move was cancelled. Trouble is a line in the log: their time comes."""
        self._unwanted.add(job)
        for left in [each for each in self._left.values() if each.is_tried and each.job == job]:
            await self._try_let_go(left)

    async def forget(self, paths: Iterable[str]) -> None:
        """A guest is here that has these images: they are its disks, and nothing that was left. Raises Unfit."""
        for path in paths:
            if path in self._left:
                await self.agent.journal.append(Entry.LET_GO, path)
                del self._left[path]
                self._waits.pop(path, None)

    # --- letting go -------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """Lets go in time of what is not to be kept for ever."""
        is_tended = self._tending is not None and not self._tending.done()
        if not is_tended and any(left.let_go_s is not None for left in self._left.values()):
            self._tending = asyncio.create_task(self._let_go_in_time(), name="left-images")
            self.agent.keep_task(self._tending)

    async def _let_go_in_time(self) -> None:
        while await self.look():  # noqa: ASYNC110  what it waits for is time, and another host that tells nobody
            await asyncio.sleep(LOOK_S)

    async def look(self) -> bool:
        """Lets go of what may go now. False: nothing is left for which that will ever be known."""
        for left in self._due():
            wait = self._waits.get(left.path)
            if self._is_used(left):
                await self._try_forget(left)
            elif self.agent.clock.wall_s() < (left.let_go_s or 0.0):
                continue
            elif wait is None or self.agent.clock.now_s() >= wait.until_s:
                await self._try_let_go(left)
        return bool(self._due())

    def _due(self) -> list[LeftImage]:
        over = {path for path, wait in self._waits.items() if wait.is_over}
        return [left for left in self._left.values() if left.let_go_s is not None and left.path not in over]

    def _wait(self, left: LeftImage, why: str, *, is_over: bool = False) -> None:
        """It is kept, and looked at again later and later: nobody may ever start that guest again."""
        before = self._waits.get(left.path)
        pause_s = LOOK_S if before is None else min(2 * before.pause_s, limits.LEFT_IMAGE_ASK_S)
        self._waits[left.path] = Wait(why, pause_s, self.agent.clock.now_s() + pause_s, is_over)
        if before is None or before.why != why:
            log.info("vm=%s image=%s result=waits: %s", left.vm, left.path, why)

    def wire(self) -> list[dict[str, Any]]:
        """Each image that is kept, for people. `waits`: why it is still here although its time is over."""
        return [
            {
                "path": left.path,
                "vm": left.vm,
                "host": left.host,
                "let_go_s": left.let_go_s,
                "is_tried": left.is_tried,
                "waits": self._waits[left.path].why if left.path in self._waits else "",
            }
            for left in sorted(self._left.values(), key=lambda left: left.path)
        ]

    def _is_used(self, left: LeftImage) -> bool:
        """A VM of this host has it as a disk, and is not the one that is just leaving."""
        staying = (kept for kept in self.agent.vms.values() if not kept.is_leaving)
        return any(left.path == disk.path for kept in staying for disk in kept.definition.disks)

    async def _try_forget(self, left: LeftImage) -> None:
        try:
            await self.forget([left.path])
        except Unfit as error:
            log.info("vm=%s image=%s journal=let-go result=%s", left.vm, left.path, error)

    async def _try_let_go(self, left: LeftImage) -> None:
        try:
            await self._let_go(left)
        except (VmferryError, OSError) as error:
            self._wait(left, str(error))

    async def _let_go(self, left: LeftImage) -> None:
        """Takes one away, if the guest runs where it went. An image that somebody changed is left, and forgotten.
        Raises VmferryError, OSError: it is tried again."""
        agent = self.agent
        if self._is_awaited(left):
            return
        if self._is_untouched(left):
            if not left.is_tried and not await self._runs_there(left):
                return
            # Asked again: 1. it is untouched  2. the other host is asked  3. the guest comes back into it
            if self._left.get(left.path) is not left or self._is_awaited(left):
                return
            if agent.host.remove_left_image(left.path, left.stamp):
                log.info("vm=%s image=%s result=removed: its time is over", left.vm, left.path)
            elif self._is_untouched(left):
                self._wait(left, "a QEMU has it open")
                return
        await agent.journal.append(Entry.LET_GO, left.path)
        self._left.pop(left.path, None)
        self._waits.pop(left.path, None)

    async def _runs_there(self, left: LeftImage) -> bool:
        """Whether the guest runs where it went; else it is written down what is waited for. A host that does not have
        it any more says nothing of where it is: it may have moved on. Then nobody is asked again before a restart."""
        link = self.agent.peers.link(left.host)
        answer = await link.call("peer-runs", {"vm": left.vm}, deadline_s=ASK_S)
        if answer.get("runs"):
            return True
        if answer.get("known", True):
            self._wait(left, f"{left.vm} does not run on {left.host}")
        else:
            why = f"{left.host} does not have {left.vm} any more, and where it is now is not known here"
            self._wait(left, why, is_over=True)
        return False


def _left(attempt: SourceAttempt, mirror: Mirror, stamp: Stamp, let_go_s: float | None) -> LeftImage:
    return LeftImage(
        job=attempt.job,
        vm=attempt.vm,
        host=attempt.wanted.destination,
        disk=mirror.id,
        path=mirror.path,
        size_bytes=mirror.size_bytes,
        stamp=stamp,
        let_go_s=let_go_s,
    )
