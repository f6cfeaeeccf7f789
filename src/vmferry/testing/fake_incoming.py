"""The destination's side of a migration in a fake QEMU. Steps: `in-listen`, `in-header`, `in-ack`, `in-load`,
`in-loaded`, `in-pages`.

7.2 says postcopy-active as soon as it listens for pages, 11.1 only when the package is loaded. A load that fails
ends the process unless it was told to stay. Autostart is not modelled: a fake is always started with -S.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from vmferry.testing.fake_link import Link, LinkLost
from vmferry.testing.fake_state import Refused, State, StepFailed


class Incoming:
    """One incoming migration, with its recoveries."""

    def __init__(self, state: State, accept: Callable[[], Awaitable[Link]], *, exits_on_error: bool) -> None:
        self.state = state
        self.link: Link | None = None
        self._accept = accept
        self._exits = exits_on_error
        self._has_all_pages = False
        self._loaded = False
        self._recovered: asyncio.Queue[Callable[[], Awaitable[Link]]] = asyncio.Queue()

    def yank(self) -> None:
        """Cuts the channel."""
        if self.link is not None:
            self.link.cut()

    def pause(self) -> None:
        """migrate-pause."""
        if self.state.word not in ("postcopy-active", "postcopy-recover"):
            raise Refused("migrate-pause is currently only supported during postcopy-active state")
        self.yank()

    def check_recovers(self) -> None:
        """Whether migrate-recover may come now. Raises Refused."""
        if self.state.word != "postcopy-paused":
            raise Refused("Migrate recover can only be run when postcopy is paused.")

    def recover(self, accept: Callable[[], Awaitable[Link]]) -> None:
        """migrate-recover. A later one takes the place of an earlier one to which nobody came."""
        self._recovered.put_nowait(accept)

    async def run(self) -> None:
        """Until everything is here, or nothing ever will be."""
        state = self.state
        state.set_word("setup")
        try:
            await state.step("in-listen")
            self.link = await self._accept()
            await self._take_all()
        except (LinkLost, StepFailed, OSError) as error:
            self._fail(str(error) or "load of migration failed: Input/output error")

    async def _take_all(self) -> None:
        while not self._has_all_pages:
            assert self.link is not None
            try:
                await self._take(await self.link.receive())
            except LinkLost:
                if not self._loaded or self.state.word == "completed":
                    raise
                await self._paused()
        self.state.set_word("completed")
        assert self.link is not None
        self.link.close()

    async def _take(self, message: dict[str, Any]) -> None:
        state, link = self.state, self.link
        assert link is not None
        match message["kind"]:
            case "header":
                state.set_word("active")
                await state.step("in-header", lost=link.lost)
                if state.capabilities.get("switchover-ack"):
                    await state.step("in-ack", lost=link.lost)
                    link.send("ack")
            case "ram":
                state.sent_bytes += int(message["bytes"])
            case "device":
                await state.step("in-load", lost=link.lost)
                await self._finish_load(link)
                await state.step("in-loaded", lost=link.lost)
                self._has_all_pages = True
                link.send("result", ok=True)
            case "package":
                state.set_word("postcopy-device" if state.profile.has_proof else "postcopy-active")
                await state.step("in-load", lost=link.lost)
                await self._finish_load(link)
                if state.profile.has_proof:
                    state.set_word("postcopy-active")
                await state.step("in-loaded", lost=link.lost)
                if message["wants_proof"]:
                    link.send("proof")
            case "pages":
                await state.step("in-pages", lost=link.lost)
                self._has_all_pages = True
                link.send("result", ok=True)
            case other:
                raise AssertionError(f"a source does not send {other}")

    async def _finish_load(self, link: Link) -> None:
        """A link that was cut while the load was held back ended the load."""
        if link.lost.is_set():
            raise LinkLost
        self._loaded = True
        self.state.set_run_state("paused")

    async def _paused(self) -> None:
        state = self.state
        while True:
            if self.link is not None:
                self.link.close()
            if state.script.get("hang"):
                state.audible.clear()
            state.set_word("postcopy-paused")
            self.link = await self._accept_again()
            state.set_word("postcopy-recover")
            try:
                message = await self.link.receive()
            except LinkLost:
                if state.script.get("frail"):
                    state.outside.exit_soon(139)
                    await asyncio.Event().wait()
                continue
            assert message["kind"] == "resume", message
            self.link.send("resumed")
            state.set_word("postcopy-active")
            state.audible.set()
            return

    async def _accept_again(self) -> Link:
        """The first connection to the newest migrate-recover."""
        accept = await self._recovered.get()
        while True:
            taking = asyncio.ensure_future(accept())
            again = asyncio.ensure_future(self._recovered.get())
            await asyncio.wait({taking, again}, return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                again.cancel()
                return taking.result()
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
            accept = again.result()

    def _fail(self, text: str) -> None:
        state = self.state
        state.error_desc = text
        state.outside.complain(text)
        if self.link is not None:
            self.link.send("result", ok=False)
            self.link.close()
        state.set_word("failed")
        if self._exits:
            state.outside.exit_soon(1)
