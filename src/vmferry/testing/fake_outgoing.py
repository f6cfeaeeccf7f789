"""The source's side of a migration in a fake QEMU: the sequences of 7.2 and 11.1, with their differences.

Theory of operation
-------------------
`run` walks the steps; whatever ends the attempt raises inside it, and `_end` turns that into the words of the
version: 11.1 says `failing`, RESUME, `failed`; 7.2 says `failed` at once. In postcopy-active (7.2: from the moment
the package is built) a lost link is `postcopy-paused` instead, which only `resume` leaves.

Memory is a number of bytes; `max-bandwidth` decides how long they take. Steps: `setup`, `active`, `converge`,
`pre-switchover`, `device`, `package`, `postcopy-active`, `pages`, `completed`, `cleanup`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from vmferry.testing.fake_link import Link, LinkLost
from vmferry.testing.fake_state import Refused, State, StepFailed

T = TypeVar("T")
WIRE_BYTES = 512 << 10
"""What the guest's memory comes to on the wire: mostly empty pages."""
PASS_S = 0.03
"""A round over the memory of a guest that writes faster than it is sent."""
IN_POSTCOPY = frozenset({"postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"})
OVER = frozenset({None, "none", "completed", "failed", "cancelled"})


class Ended(Exception):
    """The attempt cannot go on: `text` is the error, or the cancel asked for it."""


class Outgoing:
    """One attempt."""

    def __init__(self, state: State, connect: Callable[[], Awaitable[Link]]) -> None:
        self.state = state
        self.link: Link | None = None
        self.ended = asyncio.Event()
        """A cancel, a yank or the end of the link: every wait but that of pre-switchover notices it."""
        self.continued = asyncio.Event()
        self.postcopy_wanted = asyncio.Event()
        self.is_cancelled = False
        self.started_s = state.outside.now_s()
        self.stopped_s: float | None = None
        self.downtime_ms: int | None = None
        self.postcopy_bytes_left = WIRE_BYTES
        self._connect = connect
        self._run_state_before = state.run_state
        self._resumed: asyncio.Queue[Callable[[], Awaitable[Link]]] = asyncio.Queue()
        state.passes, state.sent_bytes, state.error_desc = 0, 0, None
        state.set_word("setup")  # before `migrate` is answered: the next command finds it

    # --- what the monitor asks for ---

    def cancel(self) -> None:
        """migrate_cancel. Refused in postcopy by 11.1; 7.2 takes it there and loses the guest."""
        word = self.state.word
        if word in OVER or word == "cancelling":
            return
        if self.state.profile.has_proof and (word in IN_POSTCOPY or word == "postcopy-device"):
            raise Refused("Postcopy migration in progress, cannot cancel.")
        if self.state.script.get("cancel") != "failed":
            self.is_cancelled = True
            self.state.set_word("cancelling")
        self.yank()
        self.continued.set()

    def yank(self) -> None:
        """Cuts the channel."""
        if self.link is not None:
            self.link.cut()
        self.ended.set()

    def resume(self, connect: Callable[[], Awaitable[Link]]) -> None:
        """migrate with resume."""
        if self.state.word != "postcopy-paused":
            raise Refused("Cannot resume if there is no paused migration")
        self._resumed.put_nowait(connect)

    # --- the course ---

    async def run(self) -> None:
        """From setup to an end that stays."""
        state = self.state
        try:
            self.link = await self._or_end(self._open(self._connect))
            await self._step("setup")
            self.link.send("header")
            state.set_word("active")
            await self._step("active")
            if state.capabilities.get("background-snapshot"):
                await self._background()
                return
            goes_post = await self._or_end(self._memory())
            await self._step("converge")
            await self._stop()
            await (self._postcopy() if goes_post else self._precopy())
        except (Ended, LinkLost, StepFailed, OSError) as error:
            await self._end(str(error))
        state.audible.set()
        if self.link is not None:
            self.link.close()

    async def _open(self, connect: Callable[[], Awaitable[Link]]) -> Link:
        link = await connect()
        asyncio.ensure_future(self._watch(link)).add_done_callback(lambda task: task.result())
        return link

    async def _watch(self, link: Link) -> None:
        await link.lost.wait()
        if link is self.link:
            self.ended.set()

    async def _memory(self) -> bool:
        """Rounds over memory; True when it goes on in postcopy."""
        state = self.state
        state.count_pass()
        while not self.postcopy_wanted.is_set():
            left = WIRE_BYTES - state.sent_bytes
            if left > 0:
                await self._send_some(left, int(state.parameters["max-bandwidth"]))
            elif state.script.get("dirty"):
                state.count_pass()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.postcopy_wanted.wait(), PASS_S)
            else:
                state.count_pass()
                await self._devices_agree()
                return False
        return True

    async def _devices_agree(self) -> None:
        """With the capability, rounds go on until the destination's devices have said that they are ready."""
        if not self.state.capabilities.get("switchover-ack"):
            return
        answer = asyncio.ensure_future(self._the_link().receive())
        try:
            while not (await asyncio.wait({answer}, timeout=PASS_S))[0]:
                self.state.count_pass()
            assert answer.result()["kind"] == "ack", answer
        finally:
            answer.cancel()

    async def _send_some(self, left: int, bytes_per_s: int) -> None:
        """As much as the limit lets through in a tenth of a second, or until a parameter changes."""
        state = self.state
        share = left if bytes_per_s <= 0 else min(left, max(1, bytes_per_s // 10))
        if share < left:
            state.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(state.changed.wait(), 0.1)
        assert self.link is not None
        self.link.send("ram", bytes=share)
        state.sent_bytes += share

    async def _stop(self) -> None:
        """The guest stops; with the capability QEMU then waits for leave. It notices no lost link here."""
        state = self.state
        self.stopped_s = state.outside.now_s()
        self._run_state_before = state.run_state
        state.set_run_state("finish-migrate")
        if not state.capabilities["pause-before-switchover"]:
            return
        state.set_word("pre-switchover")
        await state.step("pre-switchover")
        await self.continued.wait()
        if self.is_cancelled:
            raise Ended("")

    async def _background(self) -> None:
        """The guest stops for a moment, and its memory of that moment is sent while it goes on. Nobody answers."""
        state = self.state
        self.stopped_s, before = state.outside.now_s(), state.run_state
        state.set_run_state("paused")
        await self._step("instant")
        state.set_run_state(before)
        self.downtime_ms = int((state.outside.now_s() - self.stopped_s) * 1000)
        self.stopped_s = None  # from here on an end does not concern the guest
        await self._or_end(self._memory())
        await self._step("converge")
        self._the_link().send("device", run_state=before)
        await self.state.step("completed", lost=self.ended)
        state.set_word("completed")

    async def _precopy(self) -> None:
        state, link = self.state, self._the_link()
        state.set_word("device")
        await self._step("device")
        link.send("device", run_state=self._run_state_before)
        await self._result()

    async def _postcopy(self) -> None:
        state, link = self.state, self._the_link()
        if state.profile.has_proof:
            state.set_word("device")
            await self._step("device")
            link.send("package", wants_proof=True)
            state.set_word("postcopy-device")
            await self._step("package")
            await self._expect("proof")
            state.set_word("postcopy-active")
        else:
            state.set_word("postcopy-active")
            await self._step("device")
            link.send("package", wants_proof=False)
            await self._step("package")
        while True:
            try:
                await self._step("postcopy-active")
                await self._or_end(self._pages())
                await self._result()
            except (Ended, LinkLost):
                await self._paused()
            else:
                return

    async def _pages(self) -> None:
        state = self.state
        while self.postcopy_bytes_left > 0:
            limit = int(state.parameters["max-postcopy-bandwidth"])
            before = state.sent_bytes
            await self._send_some(self.postcopy_bytes_left, limit)
            self.postcopy_bytes_left -= state.sent_bytes - before
        await self._step("pages")
        self._the_link().send("pages")

    async def _result(self) -> None:
        answer = await self._expect("result")
        if not answer["ok"]:
            raise Ended("Sibling indicated error 1")
        # With the result in hand the other side may close: it is not missed any more.
        await self.state.step("completed", lost=self.ended)
        assert self.stopped_s is not None
        self.downtime_ms = int((self.state.outside.now_s() - self.stopped_s) * 1000)
        self.state.set_run_state("postmigrate")
        self.state.set_word("completed")

    async def _paused(self) -> None:
        """Until a resume has worked. 7.2 takes a cancel here and then never ends."""
        state = self.state
        while True:
            state.audible.set()
            self._the_link().cut()
            self._the_link().close()
            state.set_word("postcopy-paused")
            self.ended.clear()
            connect = await self._resumed.get()
            try:
                if state.profile.has_proof:
                    state.set_word("postcopy-recover-setup")
                self.link = await self._or_end(self._open(connect))
                state.set_word("postcopy-recover")
                self.link.send("resume")
                if (await self._expect("resumed")).get("has_all"):
                    self.postcopy_bytes_left = 0
            except (Ended, LinkLost, OSError):
                continue
            state.set_word("postcopy-active")
            return

    # --- ends ---

    async def _end(self, text: str) -> None:
        """An error or a cancel while the guest is still whole here."""
        state = self.state
        has_failing = state.profile.has_proof
        # An old one does not start its guest again when a postcopy fails, and leaves finish-migrate a moment later.
        is_late = state.word == "postcopy-active"
        state.audible.set()
        if not self.is_cancelled:
            state.error_desc = text or "Unable to write to socket: Broken pipe"
            state.set_word("failing" if has_failing else "failed")
        if self.stopped_s is not None and not is_late and not state.script.get("relock"):
            state.set_run_state(self._run_state_before)  # else it cannot take its disks back, and stays as it is
        await state.step("cleanup")
        if self.is_cancelled:
            state.set_word("cancelled")
        elif has_failing:
            state.set_word("failed")
        if is_late and state.run_state == "finish-migrate" and not state.script.get("relock"):
            await state.step("postmigrate")
            state.set_run_state("postmigrate")

    # --- helpers ---

    def _the_link(self) -> Link:
        assert self.link is not None
        return self.link

    async def _step(self, name: str) -> None:
        """A step that a lost link or a cancel interrupts."""
        await self.state.step(name, lost=self.ended)
        if self.ended.is_set():
            raise Ended("")

    async def _expect(self, kind: str) -> dict[str, Any]:
        message = await self._or_end(self._the_link().receive())
        if message["kind"] == "result" and not message["ok"]:
            raise Ended("Sibling indicated error 1")
        assert message["kind"] == kind, f"{message} instead of {kind}"
        return message

    async def _or_end(self, work: Awaitable[T]) -> T:
        """What `work` gives, unless the attempt ends first. Raises Ended then."""
        doing = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self.ended.wait())
        await asyncio.wait({doing, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if doing.done():
            return doing.result()
        doing.cancel()
        await asyncio.wait({doing})
        raise Ended("")
