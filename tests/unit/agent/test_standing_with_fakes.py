"""A postcopy breaks while the agents cannot talk: the source calls on the memory's own way, and the two are joined."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from vmferry import limits
from vmferry.agent import recovery, standing
from vmferry.agent.channel import Channel, ChannelEnd
from vmferry.agent.destination import DestinationAttempt
from vmferry.agent.relayed import RelayedChannel
from vmferry.agent.source import SourceAttempt
from vmferry.core.facts import Fact
from vmferry.errors import Busy, HostUnreachable, QemuError
from vmferry.testing.fake_site import MakeSite, Site

VERSIONS = ("7.2", "11.1")
PORTS = {"migration_ports": (49152, 49167)}


async def site_of(make_site: MakeSite, version: str = "11.1", **more: Any) -> Site:
    return await make_site(version, version, settings={"a": PORTS, "b": PORTS}, **more)


async def alone(site: Site, **script: Any) -> SourceAttempt:
    """The guest runs on b, its last pages are not there, and the agents cannot talk."""
    site.director.script("b", **script)
    attempt = await site.migrate_without_last_pages()
    await site.until(lambda: site.place().door is not None)
    site.part()
    return attempt


def cut(attempt: SourceAttempt | DestinationAttempt) -> None:
    for channel in attempt.channels:
        channel.cut()


def rounds(site: Site) -> list[int]:
    return [side.facts.last_round(Fact.RESUME_ACK) for side in (site.attempt(), site.place())]


class Heard:
    """A caller whose connection is a real one, and whose word is kept."""

    def __init__(self, channel: ChannelEnd, *, left: bool = False, deaf: bool = False) -> None:
        self.channel = channel
        self.words: list[dict[str, Any]] = []
        self._left, self._deaf = left, deaf

    def has_hung_up(self) -> bool:
        return self._left

    def answer(self, word: dict[str, Any]) -> None:
        if self._deaf:
            raise HostUnreachable("the source does not wait any more", side="source")
        self.words.append(word)


@pytest.fixture
async def ends() -> Any:
    """Both ends of a connection: the caller's, and what is left of it at the other side."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Any]()
    server = await asyncio.start_server(lambda r, w: arrived.put_nowait((r, w)), "127.0.0.1", 0)
    sock = socket.socket()
    sock.setblocking(False)
    await loop.sock_connect(sock, server.sockets[0].getsockname())
    reader, writer = await arrived.get()
    sock.setblocking(True)
    yield Channel("recovery", sock), reader
    writer.close()
    server.close()


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("hang", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.proves("S36", "S53", "S121", "S123")
async def test_a_postcopy_that_breaks_while_the_agents_cannot_talk_is_joined_again(
    make_site: MakeSite, version: str, hang: bool, tls: bool
) -> None:
    site = await site_of(make_site, version, tls=tls)
    attempt = await alone(site, **({"hang": True} if hang else {}))
    for number in (1, 2):
        cut(attempt)
        await site.until(lambda number=number: rounds(site) == [number, number])
        assert isinstance(site.place().channels[-1], RelayedChannel) is hang
    assert not attempt.context.peers.link("b").is_up
    await site.pages_arrive()
    assert site.attempt().wire()["outcome"] == "destination"
    assert site.place().door is None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.proves("S36", "S53", "S121", "S123")
async def test_an_agent_of_the_source_that_began_anew_remembers_where_to_call(
    make_site: MakeSite, version: str
) -> None:
    """It does not know either that the guest runs there: the word on the connection tells it."""
    site = await site_of(make_site, version)
    site.crash_at("a", Fact.LINK_LOST)
    cut(await alone(site))
    await site.noted_by("b", Fact.LINK_LOST)
    await site.restart("a")
    await site.until(lambda: rounds(site) == [1, 1])
    assert Fact.RUN_ACKED in site.attempt().facts
    await site.pages_arrive()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.proves("S36", "S53", "S121", "S123")
async def test_an_agent_of_the_destination_that_began_anew_listens_again(make_site: MakeSite, version: str) -> None:
    site = await site_of(make_site, version)
    attempt = await alone(site)
    await site.stop("b")
    cut(attempt)
    await site.noted_by("a", Fact.LINK_LOST)
    await site.restart("b")
    await site.until(lambda: rounds(site) == [1, 1])
    await site.pages_arrive()


@pytest.mark.proves("S36", "S53")
async def test_a_port_that_somebody_else_has_by_then_is_passed_over(make_site: MakeSite) -> None:
    site = await site_of(make_site)
    attempt = await alone(site)
    place = site.place()
    assert place.door is not None
    assert attempt.recovery_way is not None
    host, port = place.door.addresses[0]
    assert port == attempt.recovery_way.ports[0]
    await site.stop("b")
    server = await asyncio.start_server(lambda r, w: w.close(), host, port)
    cut(attempt)
    await site.restart("b")
    await site.until(lambda: rounds(site) == [1, 1])
    door = site.place().door
    assert door is not None
    assert door.addresses[0][1] == attempt.recovery_way.ports[1]
    server.close()
    await site.pages_arrive()


async def test_over_the_link_nobody_calls(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await site_of(make_site)
    attempt = await site.migrate_without_last_pages()
    monkeypatch.delattr(type(attempt.context.host), "call_door")
    cut(attempt)
    await site.until(lambda: rounds(site) == [1, 1])
    await site.pages_arrive()


async def test_a_link_that_is_up_and_slow_is_waited_for_where_nobody_can_be_called(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await site_of(make_site)
    attempt = await site.migrate_without_last_pages()
    ask, asked, calls, tried = attempt.ask_facts, [], [], asyncio.Event()

    async def slowly(command: str, *, deadline_s: float, **more: Any) -> dict[str, Any]:
        asked.append(command)
        await tried.wait()
        return await ask(command, deadline_s=deadline_s, **more)

    async def nobody(job: str, way: Any) -> Any:
        calls.append(job)
        if len(calls) > 1:
            tried.set()
        raise HostUnreachable("nobody there")

    monkeypatch.setattr(limits, "RECOVERY_LINK_S", 0.02)
    monkeypatch.setattr(attempt, "ask_facts", slowly)
    monkeypatch.setattr(attempt.context.host, "call_door", nobody, raising=False)
    cut(attempt)
    await site.until(lambda: rounds(site) == [1, 1])
    assert len(calls) > 1
    assert asked == ["peer-target"]
    await site.pages_arrive()


@pytest.mark.proves("S18", "S53")
async def test_a_second_call_while_qemu_is_being_given_a_channel_is_refused(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, ends: Any
) -> None:
    site = await site_of(make_site)
    attempt = await alone(site)
    place, pauses, go_on, pause = site.place(), asyncio.Event(), asyncio.Event(), recovery.pause

    async def slow(which: DestinationAttempt) -> bool:
        pauses.set()
        await go_on.wait()
        return await pause(which)

    monkeypatch.setattr(recovery, "pause", slow)
    cut(attempt)
    await pauses.wait()
    caller = Heard(ends[0])
    await standing.answer(place, caller)
    assert caller.words[0]["taken"] is False
    assert "at this moment" in caller.words[0]["reason"]
    assert caller.words[0]["facts"]["ran"]
    assert await ends[1].read() == b""  # it was cut
    with pytest.raises(Busy, match="at this moment"):
        await recovery.reconnect(place)
    go_on.set()
    await site.until(lambda: rounds(site) == [1, 1])
    await site.pages_arrive()


@pytest.mark.proves("S18", "S53")
async def test_an_order_of_before_a_call_that_comes_late_breaks_nothing(make_site: MakeSite) -> None:
    site = await site_of(make_site)
    cut(await alone(site))
    await site.until(lambda: rounds(site) == [1, 1])
    with pytest.raises(Busy, match="came late"):
        await recovery.reconnect(site.place(), after=0)
    assert not site.place().channels[-1].is_cut
    assert site.attempt().heard_round == site.place().rounds
    await site.pages_arrive()
    assert rounds(site) == [1, 1]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_caller_that_has_hung_up_gets_no_qemu(make_site: MakeSite, version: str, ends: Any) -> None:
    """Else QEMU would be in a recovery that broke half-way, which one before 8.0 never leaves."""
    site = await site_of(make_site, version)
    site.crash_at("a", Fact.LINK_LOST)
    cut(await alone(site))
    await site.noted_by("b", Fact.LINK_LOST)
    place, asked = site.place(), []
    assert place.machine is not None
    execute = place.machine.execute

    async def asking(command: str, *args: Any, **more: Any) -> Any:
        asked.append(command)
        return await execute(command, *args, **more)

    place.machine.execute = asking  # type: ignore[method-assign]
    await standing.answer(place, Heard(ends[0], left=True))
    assert not {"getfd", "migrate-recover"} & set(asked)
    assert await ends[1].read() == b""
    await site.restart("a")
    await site.until(lambda: rounds(site) == [1, 1])
    await site.pages_arrive()


@pytest.mark.proves("S18", "S53")
async def test_a_word_that_does_not_leave_cuts_the_channel_and_costs_qemu_nothing(
    make_site: MakeSite, ends: Any
) -> None:
    """QEMU has not had the connection yet: an old one would die of what breaks half-way. The next call heals."""
    site = await site_of(make_site)
    site.crash_at("a", Fact.LINK_LOST)
    cut(await alone(site))
    await site.noted_by("b", Fact.LINK_LOST)
    await standing.answer(site.place(), Heard(ends[0], deaf=True))
    assert await ends[1].read() == b""
    await site.restart("a")
    await site.noted_by("b", Fact.RESUME_ACK)
    await site.pages_arrive()
    assert site.place().facts.last_round(Fact.LINK_LOST) == 1


@pytest.mark.proves("S36", "S53")
async def test_no_order_to_resume_is_given_without_the_word(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals, the word of another place, and none at all."""
    site = await site_of(make_site)
    attempt = await alone(site)
    host, orders = attempt.context.host, []
    execute, call_door = attempt.machine.execute, host.call_door

    async def asking(command: str, *args: Any, **more: Any) -> Any:
        orders.append(command)
        return await execute(command, *args, **more)

    facts = site.place().facts_wire()
    bad: list[Any] = [
        {"taken": False, "reason": "no QEMU", "facts": facts},
        {"taken": True, "channel": "x", "facts": {**facts, "job": "another"}},
        {"taken": True, "channel": "x"},
        {"taken": True, "facts": facts},
        HostUnreachable("said no word"),
    ]
    lied, held = asyncio.Event(), list[socket.socket]()

    async def lying(job: str, way: Any) -> Any:
        if not bad:
            lied.set()
            return await call_door(job, way)
        word = bad.pop(0)
        if isinstance(word, Exception):
            raise word
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            held.append(server.accept()[0])
        return Channel("recovery", near), word

    monkeypatch.setattr(attempt.machine, "execute", asking)
    monkeypatch.setattr(host, "call_door", lying, raising=False)
    cut(attempt)
    await lied.wait()
    assert "migrate" not in orders
    assert len(held) == 4
    for end in held:
        assert end.recv(1) == b""
        end.close()
    await site.until(lambda: rounds(site) == [1, 1])
    await site.pages_arrive()


async def test_a_place_that_has_every_page_waits_for_no_caller(make_site: MakeSite, ends: Any) -> None:
    site = await site_of(make_site)
    await alone(site)
    place = site.place()
    await site.pages_arrive()
    caller = Heard(ends[0])
    await standing.answer(place, caller)
    assert caller.words[0]["taken"] is False
    assert caller.words[0]["facts"]["whole"]
    assert place.door is None


async def test_where_the_kernel_chooses_the_ports_no_way_is_told(make_site: MakeSite) -> None:
    site = await make_site()
    attempt = await site.migrate_without_last_pages()
    assert attempt.recovery_way is None
    assert site.place().door is None
    site.part()
    cut(attempt)
    await site.noted_by("b", Fact.LINK_LOST)
    site.join()
    await site.until(lambda: rounds(site) == [1, 1])
    await site.pages_arrive()


async def test_a_precopy_has_no_door_and_nothing_to_remember(make_site: MakeSite) -> None:
    site = await site_of(make_site)
    attempt = await site.migrate(mode="precopy")
    await site.settle()
    assert attempt.recovery_way is None or attempt.mode() == "precopy"
    assert site.place().door is None
    await site.check("b")


async def test_a_qemu_that_is_not_in_postcopy_is_left_alone(make_site: MakeSite, ends: Any) -> None:
    site = await site_of(make_site)
    attempt = await alone(site)
    place = site.place()

    async def refusing(which: DestinationAttempt) -> bool:
        raise QemuError("the destination's QEMU is in completed, not in postcopy", side="destination")

    before = recovery.pause
    recovery.pause = refusing  # type: ignore[assignment]
    try:
        caller = Heard(ends[0])
        await standing.answer(place, caller)
    finally:
        recovery.pause = before
    assert "not in postcopy" in caller.words[0]["reason"]
    cut(attempt)
    await site.until(lambda: rounds(site) == [1, 1])
    await site.pages_arrive()
