"""The rescue tools: what leads a QEMU out of a place from which it never comes by itself.

Theory of operation
-------------------
Each tool makes a socket pair, keeps one end for a stand-in of `engine` and hands the other one to QEMU (`getfd`,
`fd:`); QEMU believes to speak with the other side of its migration.

    bring_back   a source in postcopy-paused, its destination gone without having run: claims to have every page, so
                 the source completes and its guest is an ordinary paused one (P15, P18, P20)
    throw_away   a source stuck in finish-migrate: a whole migration to nobody leads to postmigrate (P24)
    feed         a destination in postcopy-paused, its source gone or broken: serves the missing pages out of the
                 source's memory, which outlived it (P17, P22, P26); in `rescue_feed`

Rule 1: each tool asks `core.rescue` before it begins and again when it acts; a refusal is raised as RescueRefused and
        nothing was done then.
Rule 2: no tool starts a guest unless it is told to, and then only with the proof that it runs nowhere else.
Rule 3: everything that could fail is done before QEMU is told to connect: a QEMU before 8.0 does not forgive a
        connection that breaks in the handshake.
Rule 4: a tool that fails leaves QEMU where it was, so that it can be tried again; what it changed is put back.
Rule 5: the room of the endpoints is imported when a rescue begins, because an agent at rest shall have no numpy.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from vmferry import limits
from vmferry.agent import guest_memory
from vmferry.agent.machine import Machine
from vmferry.core.rescue import Answer, NeverRan, Tool, ended_well, has_settled, may_use
from vmferry.errors import Guest, GuestHeld, QemuError, RescueRefused, VmferryError
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpCommandError

if TYPE_CHECKING:
    from vmferry.engine.errand import ErrandOutcome

log = logging.getLogger("vmferry.agent")

POLL_S = 0.02
"""How long QEMU is left alone when no event comes: its words are asked for again."""
PROGRESS_S = 0.25
_STANDSTILL_S = limits.ENGINE_STAND_IN_SILENCE_S + 5.0
"""Longer than a stand-in's own patience, which knows better what it waits for."""
_REFUSED_S = 1.0
CONT_S = 10.0
FD_NAME = "vmferry-rescue"
_SEVERAL = ("multifd", "postcopy-preempt")
"""Capabilities with which QEMU opens more than one connection, and refuses a descriptor."""

P = ParamSpec("P")
T = TypeVar("T")
OnProgress = Callable[[dict[str, Any]], None]


def tell_nobody(progress: dict[str, Any]) -> None:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class RescueReport:
    """What a tool did. `ms`: from the order to QEMU until it had ended well; `notes`: what a person should know."""

    tool: str
    vm: str
    status: str
    run_state: str
    ms: float
    bytes: int
    pages: int
    notes: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


# --- questions ------------------------------------------------------------------------------------------------


async def status_word(machine: Machine) -> str | None:
    """QEMU's word for its migration, as it is."""
    word = (await machine.migration()).get("status")
    return None if word is None else str(word)


async def ask(tool: Tool, machine: Machine) -> Answer:
    """Whether the tool may be used on this QEMU now. Raises RescueRefused with the reason; nothing was done."""
    if machine.is_gone:
        raise RescueRefused(f"{machine.vm}: its QEMU (process {machine.pid}) is gone", guest="unknown", retry="no")
    answer = may_use(tool, await status_word(machine), await machine.run_state())
    if answer.refusal:
        raise RescueRefused(
            f"{machine.vm}: {answer.refusal}",
            side="destination" if tool is Tool.FEED else "source",
            guest="unknown",
        )
    return answer


async def _ask_again(tool: Tool, machine: Machine) -> None:
    """At the moment of acting nothing may have changed. Raises RescueRefused if somebody else was faster."""
    if (await ask(tool, machine)).pause_first:
        raise RescueRefused(
            f"{machine.vm}: its migration goes on again: somebody else has taken care of it", retry="yes"
        )


def _require(proof: NeverRan, machine: Machine) -> None:
    objection = proof.objection()
    if objection:
        raise RescueRefused(
            f"{machine.vm} may not go back: {objection}",
            hint="make sure that the destination's QEMU never ran the guest and is gone, then try again",
        )


async def pause(machine: Machine, tool: Tool) -> None:
    """Out of band, because QEMU's main loop may hang; returns when it is in a place where the tool may be used.

    Raises GuestHeld when QEMU refuses, QemuError when it does not get there; both sides then stay as they are."""
    try:
        await machine.execute("migrate-pause", oob=True)
    except QmpCommandError as error:
        # Refused also where the channel has gone already; then QEMU pauses by itself in a moment.
        with contextlib.suppress(QemuError):
            await until_word(machine, has_settled, deadline_s=_REFUSED_S)
            return
        raise GuestHeld(
            f"{machine.vm}: QEMU refuses to leave the recovery that it is in: {error.desc}",
            side="destination" if tool is Tool.FEED else "source",
            guest="paused",
            retry="no",
            hint="keep the process, its memory is whole: QEMU before 8.0 never leaves a recovery that broke half-way",
            cause=error,
        ) from error
    word = await until_word(
        machine, lambda said: not may_use(tool, said, "paused").pause_first, deadline_s=limits.RESCUE_PAUSE_S
    )
    if may_use(tool, word, "paused").refusal:
        raise QemuError(f"{machine.vm}: QEMU did not pause its migration but is in {word}", guest="paused")


async def until_word(machine: Machine, is_it: Callable[[str | None], bool], *, deadline_s: float) -> str | None:
    """The word of QEMU's migration once `is_it` likes it. Raises QemuError when it does not in time."""
    heard = asyncio.Event()

    def hear(event: Event) -> None:
        if event.name == "MIGRATION":
            heard.set()

    unsubscribe = (await machine.attach()).subscribe(hear)
    until_s = machine.clock.now_s() + deadline_s
    try:
        while True:
            heard.clear()
            word = await status_word(machine)
            if is_it(word):
                return word
            if machine.clock.now_s() >= until_s:
                raise QemuError(f"{machine.vm}: QEMU is still in {word} after {deadline_s:g} s", guest="paused")
            with contextlib.suppress(TimeoutError):  # an event may be lost with its session, or never be told
                async with asyncio.timeout(POLL_S):
                    await heard.wait()
    finally:
        unsubscribe()


# --- connections ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Line:
    """A connection that QEMU is to make to us: its URI, and our end of it, which `take` gives away."""

    uri: str
    _ours: socket.socket | None = None
    _listener: socket.socket | None = None
    _kept: list[socket.socket] = field(default_factory=list)
    _more: asyncio.Task[None] | None = None

    async def main(self) -> socket.socket:
        """Our end of the main channel; with a listener only after QEMU was told to connect. Raises QemuError."""
        if self._listener is None:
            assert self._ours is not None, "there is one main channel"
            ours, self._ours = self._ours, None
            return ours
        try:
            async with asyncio.timeout(limits.ENGINE_STAND_IN_SILENCE_S):
                found, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        except TimeoutError as error:
            raise QemuError("QEMU made no connection", guest="paused") from error
        self._more = asyncio.create_task(self._keep_more(self._listener), name="rescue-more")
        return found

    async def _keep_more(self, listener: socket.socket) -> None:
        """Connections beside the main channel: nothing comes on them, but QEMU wants them open."""
        while True:
            self._kept.append((await asyncio.get_running_loop().sock_accept(listener))[0])

    async def close(self) -> None:
        """Gives everything back that nobody took."""
        if self._more is not None:
            self._more.cancel()
            await asyncio.gather(self._more, return_exceptions=True)
        for sock in (self._ours, self._listener, *self._kept):
            if sock is not None:
                sock.close()


@contextlib.asynccontextmanager
async def line_to(machine: Machine, *, several: bool) -> AsyncIterator[Line]:
    """A socket pair whose other end QEMU has under FD_NAME, or, for `several` connections, a socket of our own in a
    directory that nobody else may enter. Nothing of it is left afterwards."""
    if several:
        with tempfile.TemporaryDirectory(prefix="vmferry-") as directory:
            listener = socket.socket(socket.AF_UNIX)
            line = Line(f"unix:{directory}/rescue", None, listener)
            try:
                listener.bind(os.path.join(directory, "rescue"))
                listener.listen(8)
                listener.setblocking(False)
                yield line
            finally:
                await line.close()
        return
    ours, theirs = socket.socketpair()
    line = Line(f"fd:{FD_NAME}", ours)
    try:
        with theirs:
            await machine.execute("getfd", {"fdname": FD_NAME}, fds=(theirs.fileno(),))
        yield line
    finally:
        await line.close()
        # QEMU gives the name up as soon as it uses it; otherwise it would keep the descriptor for good.
        with contextlib.suppress(QemuError):
            await machine.execute("closefd", {"fdname": FD_NAME})


async def capabilities(machine: Machine) -> dict[str, bool]:
    """QEMU's migration capabilities, and whether each is on."""
    return {str(c["capability"]): bool(c["state"]) for c in await machine.execute("query-migrate-capabilities")}


async def without_tls(machine: Machine) -> None:
    """The line is a socket on this host. Parameters may be set in every state on every QEMU (experiment X10)."""
    if (await machine.execute("query-migrate-parameters")).get("tls-creds"):
        await machine.execute("migrate-set-parameters", {"tls-creds": "", "tls-hostname": ""})


# --- errands --------------------------------------------------------------------------------------------------


class Errand(Protocol):
    """A stand-in at work; see `engine.errand`."""

    def outcome(self) -> ErrandOutcome: ...

    def stop(self) -> ErrandOutcome: ...


async def finish(
    errand: Errand, over: asyncio.Event, *, tell: OnProgress, tool: Tool, deadline_s: float
) -> ErrandOutcome:
    """Waits for the errand's end and tells how far it is. It is stopped in any case: when it is over, when it has not
    moved for a while, after `deadline_s`, and when this is cancelled."""
    loop = asyncio.get_running_loop()
    moved_s = begun_s = loop.time()
    before = None
    try:
        while not over.is_set() and loop.time() < min(begun_s + deadline_s, moved_s + _STANDSTILL_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROGRESS_S):
                    await over.wait()
            found = errand.outcome()
            if found != before:
                before, moved_s = found, loop.time()
                tell({"tool": tool.value, "bytes": found.bytes, "pages": found.pages})
    finally:
        outcome = await asyncio.to_thread(errand.stop)
    return outcome


def waker() -> tuple[asyncio.Event, Callable[[], None]]:
    """An event of the loop, and what a thread calls to set it."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(over.set)

    return over, tell


def _failed(machine: Machine, tool: Tool, word: str | None, cause: VmferryError | None) -> GuestHeld:
    """The tool did not get through. The guest is as it was: whole and paused."""
    return GuestHeld(
        f"{machine.vm}: {tool.value} did not get through; QEMU's migration is in {word or 'none'}",
        side="source",
        retry="yes",
        hint="the guest is whole and paused; the same command may be given again",
        cause=cause,
    )


def told_as(guest: Guest) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """A QEMU's own errors know nothing of the guest in the middle of a rescue: they say `guest`, not 'unharmed'."""

    def wrap(tool: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(tool)
        async def rescued(*args: P.args, **more: P.kwargs) -> T:
            try:
                return await tool(*args, **more)
            except QemuError as error:
                if error.guest == "unharmed":
                    error.guest = guest
                raise

        return rescued

    return wrap


# --- the tools ------------------------------------------------------------------------------------------------


@told_as("paused")
async def bring_back(
    machine: Machine,
    proof: NeverRan,
    *,
    then_run: bool = False,
    tell: OnProgress = tell_nobody,
    deadline_s: float = limits.RESCUE_S,
) -> RescueReport:
    """Leads a source out of postcopy: afterwards its migration is completed and its guest paused, or running if
    `then_run`.

    Raises RescueRefused (nothing was done), GuestHeld (it did not get through; whole and paused, may be tried again) or
    QemuError (QEMU does not answer, or refused a command; the guest is paused).
    """
    from vmferry.engine.stand_in import StandInReceiver

    _require(proof, machine)
    if (await ask(Tool.BRING_BACK, machine)).pause_first:
        await pause(machine, Tool.BRING_BACK)
    blocks = await guest_memory.sizes(machine)
    on = await capabilities(machine)
    several = any(on.get(name) for name in _SEVERAL)
    over, on_end = waker()
    async with line_to(machine, several=several) as line:
        await without_tls(machine)

        async def connect() -> StandInReceiver:
            stand_in = StandInReceiver(await line.main(), blocks, on_end=on_end)
            stand_in.start()
            return stand_in

        stand_in = None if several else await connect()
        try:
            _require(proof, machine)  # asked again: from the next command on the source may be had back
            await _ask_again(Tool.BRING_BACK, machine)
            begun_s = machine.clock.now_s()
            await machine.execute("migrate", {"uri": line.uri, "resume": True})
        except BaseException:
            if stand_in is not None:
                await asyncio.to_thread(stand_in.stop)
            raise
        stand_in = stand_in or await connect()
        outcome = await finish(stand_in, over, tell=tell, tool=Tool.BRING_BACK, deadline_s=deadline_s)
    word = await settled(machine)
    if not ended_well(word):
        raise _failed(machine, Tool.BRING_BACK, word, outcome.error)
    ms = (machine.clock.now_s() - begun_s) * 1000
    log.info("vm=%s tool=bring-back result=completed ms=%.1f proof=%s", machine.vm, ms, proof.text)
    if then_run:
        await run(machine, proof)
    return await _report(machine, Tool.BRING_BACK, ms, outcome)


async def settled(machine: Machine) -> str | None:
    """QEMU's word once it is no step on the way any more. Raises QemuError when that does not come."""
    return await until_word(machine, has_settled, deadline_s=limits.RESCUE_PAUSE_S)


async def run(machine: Machine, proof: NeverRan) -> None:
    """`cont`, under the proof, asked again. Raises RescueRefused, or GuestHeld when QEMU cannot start the guest."""
    _require(proof, machine)
    try:
        await machine.execute("cont", deadline_s=CONT_S)
    except QmpCommandError as error:
        raise GuestHeld(
            f"{machine.vm} is whole and paused, and QEMU cannot start it: {error.desc}",
            side="source",
            retry="after-fix",
            hint="free the disk that is locked elsewhere, then start it",
            cause=error,
        ) from error
    state = await machine.run_state()
    if state != "running":
        raise GuestHeld(f"{machine.vm}: cont had no effect, the guest is in {state}", side="source", retry="yes")


async def _report(machine: Machine, tool: Tool, ms: float, outcome: ErrandOutcome) -> RescueReport:
    word, state = await status_word(machine), await machine.run_state()
    return RescueReport(tool.value, machine.vm, word or "none", state, ms, outcome.bytes, outcome.pages)


@told_as("paused")
async def throw_away(
    machine: Machine,
    proof: NeverRan | None = None,
    *,
    then_run: bool = False,
    tell: OnProgress = tell_nobody,
    deadline_s: float = limits.RESCUE_S,
) -> RescueReport:
    """Leads a source out of finish-migrate, where `cont` is refused: afterwards its migration is completed and `cont`
    works as soon as its disks are free. `then_run` needs the proof that the guest runs nowhere else.

    Takes a second per GiB or so; options are put back as they were. Raises like `bring_back`.
    """
    from vmferry.engine.stand_in import ThrowAwaySink

    if then_run:
        assert proof is not None, "a guest is started under a proof only"
    if proof is not None:
        _require(proof, machine)
    await ask(Tool.THROW_AWAY, machine)
    over, on_end = waker()
    async with _plain_options(machine), line_to(machine, several=False) as line:
        if proof is not None:
            _require(proof, machine)
        await _ask_again(Tool.THROW_AWAY, machine)
        sink = ThrowAwaySink(await line.main(), on_end=on_end)
        sink.start()
        begun_s = machine.clock.now_s()
        try:
            await machine.execute("migrate", {"uri": line.uri})
        except BaseException:
            await asyncio.to_thread(sink.stop)
            raise
        outcome = await finish(sink, over, tell=tell, tool=Tool.THROW_AWAY, deadline_s=deadline_s)
        word = await settled(machine)
    if not ended_well(word):
        raise _failed(machine, Tool.THROW_AWAY, word, outcome.error)
    ms = (machine.clock.now_s() - begun_s) * 1000
    log.info("vm=%s tool=throw-away result=completed ms=%.1f bytes=%d", machine.vm, ms, outcome.bytes)
    if then_run:
        assert proof is not None
        await run(machine, proof)
    return await _report(machine, Tool.THROW_AWAY, ms, outcome)


_PLAIN_PARAMETERS: dict[str, Any] = {"max-bandwidth": 1 << 40, "tls-creds": "", "tls-hostname": "", "mode": "normal"}


@contextlib.asynccontextmanager
async def _plain_options(machine: Machine) -> AsyncIterator[None]:
    """Every capability off but `events`, for the time of a throw-away migration: no return path, one channel, and
    above all no release-ram, which would give the guest's only memory away page by page. Read back before anything
    is sent. Raises QemuError when QEMU keeps one on."""
    before = await capabilities(machine)
    on = [name for name, state in before.items() if state and name != "events"]
    known = await machine.execute("query-migrate-parameters")
    saved = {name: known[name] for name in _PLAIN_PARAMETERS if name in known}
    await _switch(machine, dict.fromkeys(on, False))
    try:
        left = [name for name, state in (await capabilities(machine)).items() if state and name != "events"]
        if left:
            raise QemuError(f"{machine.vm}: QEMU keeps {', '.join(left)} on", guest="paused")
        await machine.execute("migrate-set-parameters", {name: _PLAIN_PARAMETERS[name] for name in saved})
        yield
    finally:
        await _put_back(machine, lambda: _switch(machine, dict.fromkeys(on, True)))
        await _put_back(machine, lambda: machine.execute("migrate-set-parameters", saved))


async def _switch(machine: Machine, states: dict[str, bool]) -> None:
    if states:
        listed = [{"capability": name, "state": state} for name, state in states.items()]
        await machine.execute("migrate-set-capabilities", {"capabilities": listed})


async def _put_back(machine: Machine, put: Callable[[], Awaitable[Any]]) -> None:
    """Trouble here is not the rescue's: the guest is what counts, and the next migration sets its own options."""
    try:
        await put()
    except QemuError as error:
        log.warning("vm=%s effect=put-options-back result=%s", machine.vm, error)
