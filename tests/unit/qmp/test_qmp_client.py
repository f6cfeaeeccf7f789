"""The asyncio client over a fake transport: pairing, turns, deadlines, events, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vmferry import limits
from vmferry.errors import PlanRefused, QemuError
from vmferry.qmp.client import QmpClient
from vmferry.qmp.codec import (
    Command,
    Decoder,
    Event,
    NeedData,
    encode_error,
    encode_event,
    encode_greeting,
    encode_object,
    encode_reply,
)
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout

SOON_S = 0.02  # a deadline that is meant to pass


class FakeWire:
    """A transport whose other end is the test: `sent` has the commands, `reply` and the like answer them."""

    peer_pid = 42

    def __init__(self, client: QmpClient) -> None:
        self.client = client
        self.sent: asyncio.Queue[Command] = asyncio.Queue()
        self.fds: list[tuple[int, ...]] = []
        self.is_closed = False
        self._decoder = Decoder()
        client.attach(self)

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        self._decoder.feed(data)
        while not isinstance(message := self._decoder.next(), NeedData):
            assert isinstance(message, Command)
            self.sent.put_nowait(message)
            self.fds.append(tuple(fds))

    def abort(self) -> None:
        self.is_closed = True

    async def close(self) -> None:
        self.abort()

    def say(self, data: bytes) -> None:
        self.client.data_received(data)

    def reply(self, command: Command, value: Any = None) -> None:
        self.say(encode_reply({} if value is None else value, id=command.id))


async def connected(*, capabilities: Sequence[str] = ("oob",), **options: Any) -> tuple[QmpClient, FakeWire]:
    client = QmpClient(name="the QEMU of web1", session_id="s", **options)
    wire = FakeWire(client)
    negotiating = asyncio.create_task(client.negotiate())
    wire.say(encode_greeting({"qemu": {"major": 11, "minor": 1, "micro": 2}}, capabilities))
    command = await wire.sent.get()
    assert command.name == "qmp_capabilities"
    assert command.arguments == ({"enable": ["oob"]} if "oob" in capabilities else {})
    wire.reply(command)
    await negotiating
    return client, wire


def start(client: QmpClient, name: str, arguments: Mapping[str, Any] | None = None, **options: Any) -> Any:
    return asyncio.create_task(client.execute(name, arguments, **options))


async def test_negotiation_takes_oob_when_it_is_offered() -> None:
    client, _ = await connected()
    assert client.oob
    assert client.version == (11, 1, 2)
    assert client.peer_pid == 42
    assert client.greeting is not None


async def test_without_oob_nothing_is_asked_for_and_oob_commands_are_not_sent() -> None:
    client, wire = await connected(capabilities=())
    assert not client.oob
    with pytest.raises(QemuError, match="takes no out-of-band commands"):
        await client.execute("yank", oob=True)
    assert wire.sent.empty()


async def test_before_anything_is_attached_there_is_no_version_and_no_peer() -> None:
    client = QmpClient(name="q")
    assert client.version == (0, 0, 0)
    assert client.peer_pid is None
    await client.close()


async def test_replies_find_their_commands_in_any_order_and_any_cut() -> None:
    client, wire = await connected()
    tasks = [start(client, "a"), start(client, "b", {"x": 1}), start(client, "c", oob=True)]
    commands = [await wire.sent.get() for _ in tasks]
    assert [(command.name, command.oob) for command in commands] == [("a", False), ("b", False), ("c", True)]
    assert len({command.id for command in commands}) == 3
    stream = b"".join(encode_reply(command.name, id=command.id) for command in reversed(commands))
    for at in range(len(stream)):
        wire.say(stream[at : at + 1])
    assert [await task for task in tasks] == ["a", "b", "c"]


async def test_a_refusal_has_the_servers_words_and_leaves_the_guest_unharmed() -> None:
    client, wire = await connected()
    task = start(client, "cont")
    wire.say(encode_error("GenericError", "no way", id=(await wire.sent.get()).id))
    with pytest.raises(QmpCommandError) as caught:
        await task
    error = caught.value
    assert (error.command, error.qmp_class, error.desc) == ("cont", "GenericError", "no way")
    assert error.message == "the QEMU of web1 refused cont: no way"
    assert (error.guest, error.remote) == ("unharmed", None)


async def test_an_agents_refusal_comes_back_as_the_error_it_was() -> None:
    client, wire = await connected()
    task = start(client, "plan")
    theirs = PlanRefused("no room", guest="paused", retry="yes", hint="free some")
    wire.say(encode_error("GenericError", "no room", id=(await wire.sent.get()).id, data=theirs.to_wire()))
    with pytest.raises(QmpCommandError) as caught:
        await task
    remote = caught.value.remote
    assert isinstance(remote, PlanRefused)
    assert remote.to_wire() == theirs.to_wire()
    assert (caught.value.guest, caught.value.retry, caught.value.hint) == ("paused", "yes", "free some")


async def test_after_a_timeout_the_session_goes_on_and_the_late_reply_is_dropped() -> None:
    client, wire = await connected()
    with pytest.raises(QmpTimeout, match=r"did not answer slow within 0\.02 s") as caught:
        await client.execute("slow", deadline_s=SOON_S)
    assert caught.value.was_sent
    assert caught.value.guest == "unknown"
    slow = await wire.sent.get()
    next_one = start(client, "next")
    command = await wire.sent.get()
    wire.reply(slow, "late")
    wire.reply(command, "mine")
    assert await next_one == "mine"
    assert client.late_replies == 1


async def test_a_cancelled_call_leaves_nothing_behind() -> None:
    client, wire = await connected()
    task = start(client, "slow")
    slow = await wire.sent.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wire.say(encode_error("GenericError", "late", id=slow.id))
    assert client.late_replies == 1
    await client.close()


async def test_few_in_band_commands_are_unanswered_at_a_time_and_oob_still_gets_through() -> None:
    client, wire = await connected()
    most = limits.QMP_IN_BAND_UNANSWERED_MAX
    tasks = [start(client, f"c{number}") for number in range(most + 2)]
    first = [await wire.sent.get() for _ in range(most)]
    oob = start(client, "yank", oob=True)
    yank = await wire.sent.get()
    assert yank.name == "yank"
    assert wire.sent.empty()
    wire.reply(yank)
    await oob
    wire.reply(first[0], 0)
    assert (await wire.sent.get()).name == f"c{most}"
    assert wire.sent.empty()
    assert await tasks[0] == 0
    await client.close()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_command_that_gets_no_turn_was_not_sent_and_given_up_ones_keep_theirs() -> None:
    client, wire = await connected()
    most = limits.QMP_IN_BAND_UNANSWERED_MAX
    calls = [client.execute("hang", deadline_s=SOON_S) for _ in range(most + 1)]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [error.was_sent for error in errors if isinstance(error, QmpTimeout)] == [True] * most + [False]
    assert errors[-1].guest == "unharmed"  # type: ignore[union-attr]
    blocked = start(client, "blocked", deadline_s=SOON_S)
    with pytest.raises(QmpTimeout, match="left no turn for blocked"):
        await blocked
    hung = [wire.sent.get_nowait() for _ in range(most)]
    waiting = start(client, "waiting")
    wire.reply(hung[0])  # the late reply frees the turn
    command = await wire.sent.get()
    assert command.name == "waiting"
    wire.reply(command)
    await waiting


async def test_a_waiting_command_that_is_cancelled_hands_on_its_turn() -> None:
    client, wire = await connected()
    most = limits.QMP_IN_BAND_UNANSWERED_MAX
    running = [start(client, "running") for _ in range(most)]
    sent = [await wire.sent.get() for _ in range(most)]
    cancelled, patient = start(client, "cancelled"), start(client, "patient")
    await asyncio.sleep(0)  # both are waiting for a turn now
    wire.reply(sent[0])  # the turn goes to the first of them ...
    cancelled.cancel()  # ... in the same moment as it is cancelled
    command = await wire.sent.get()
    assert command.name == "patient"
    for late in sent[1:]:
        wire.reply(late)
    wire.reply(command)
    await asyncio.gather(*running, patient)
    assert cancelled.cancelled()


async def test_commands_with_descriptors_go_one_at_a_time() -> None:
    client, wire = await connected()
    first, second = start(client, "getfd", fds=(1,)), start(client, "getfd", fds=(2,))
    plain = start(client, "query-status")
    sent = [await wire.sent.get(), await wire.sent.get()]
    assert [command.name for command in sent] == ["getfd", "query-status"]
    assert wire.fds[-2:] == [(1,), ()]
    wire.reply(sent[0])
    third = await wire.sent.get()
    assert wire.fds[-1] == (2,)
    wire.reply(third)
    wire.reply(sent[1])
    await asyncio.gather(first, second, plain)


async def test_a_command_that_json_cannot_say_takes_no_turn() -> None:
    client, wire = await connected()
    for _ in range(limits.QMP_IN_BAND_UNANSWERED_MAX + 1):
        with pytest.raises(TypeError):
            await client.execute("a", {"b": object()})
    task = start(client, "ok")
    wire.reply(await wire.sent.get(), 1)
    assert await task == 1


# --- events ---


async def test_events_come_in_order_to_every_subscriber_until_it_ends() -> None:
    seen: list[tuple[str, str]] = []
    client, wire = await connected(on_event=lambda event: seen.append(("first", event.name)))
    end_second = client.subscribe(lambda event: seen.append(("second", event.name)))
    wire.say(encode_event("A", timestamp_us=1) + encode_event("B", timestamp_us=2))
    await asyncio.sleep(0)
    end_second()
    end_second()
    wire.say(encode_event("C", timestamp_us=3))
    await asyncio.sleep(0)
    assert seen == [("first", "A"), ("second", "A"), ("first", "B"), ("second", "B"), ("first", "C")]


async def test_an_event_before_a_reply_is_seen_before_it() -> None:
    order: list[str] = []
    client, wire = await connected(on_event=lambda event: order.append(event.name))

    async def call() -> None:
        await client.execute("stop")
        order.append("reply")

    task = asyncio.create_task(call())
    command = await wire.sent.get()
    wire.say(encode_event("STOP", timestamp_us=1) + encode_reply({}, id=command.id))
    await task
    assert order == ["STOP", "reply"]


async def test_a_subscriber_that_fails_harms_nobody_else() -> None:
    seen: list[Event] = []
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))

    def fail(event: Event) -> None:
        raise RuntimeError(event.name)

    client, wire = await connected(on_event=fail)
    client.subscribe(seen.append)
    wire.say(encode_event("A", {"x": 1}, timestamp_us=7))
    await asyncio.sleep(0)
    assert seen == [Event("A", {"x": 1}, 7)]
    assert [str(failure) for failure in failures] == ["A"]
    assert not client.closed.done()


# --- ends ---


async def test_when_the_connection_ends_everything_that_waits_is_told_what_is_known() -> None:
    client, wire = await connected()
    most = limits.QMP_IN_BAND_UNANSWERED_MAX
    tasks = [start(client, "cont") for _ in range(most + 1)]
    for _ in range(most):
        await wire.sent.get()
    client.connection_lost("reset")
    client.connection_lost("a second time")
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, QmpDisconnected) for error in errors)
    guests = [error.guest for error in errors if isinstance(error, QmpDisconnected)]
    assert guests == ["unknown"] * most + ["unharmed"]  # the last was never sent
    assert "before it answered cont: reset" in str(errors[0])
    assert await client.closed == "reset"
    with pytest.raises(QmpDisconnected, match="is not connected: reset") as caught:
        await client.execute("cont")
    assert caught.value.guest == "unharmed"


async def test_a_turn_that_comes_in_the_moment_of_the_end_sends_nothing() -> None:
    client, wire = await connected()
    tasks = [start(client, f"c{number}") for number in range(limits.QMP_IN_BAND_UNANSWERED_MAX + 1)]
    first = await wire.sent.get()
    await asyncio.sleep(0)
    wire.reply(first)  # the last one's turn ...
    client.connection_lost("reset")  # ... before it runs again
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(errors[-1], QmpDisconnected)
    assert errors[-1].guest == "unharmed"


@pytest.mark.parametrize("garbage", [b"hello\n", b"[]", b'{"execute":"a"}', b'{"a":1}'], ids=repr)
async def test_a_server_that_does_not_speak_qmp_ends_the_session(garbage: bytes) -> None:
    client, wire = await connected()
    task = start(client, "a")
    await wire.sent.get()
    wire.say(garbage + encode_event("AFTER", timestamp_us=1))
    with pytest.raises(QmpDisconnected, match="no QMP"):
        await task
    assert wire.is_closed


async def test_replies_to_nobody_are_dropped() -> None:
    """QEMU sends the reply to a departed client's command to the next client."""
    client, wire = await connected()
    wire.say(encode_reply({}, id="other-0") + encode_reply({}) + encode_error("GenericError", "x", id=7))
    wire.say(encode_object({"return": {}, "id": ["s-0"]}))
    assert client.late_replies == 4
    task = start(client, "a")
    wire.reply(await wire.sent.get(), "ok")
    assert await task == "ok"


async def test_no_greeting_in_time() -> None:
    client = QmpClient(name="q")
    FakeWire(client)
    with pytest.raises(QmpTimeout, match="another client may hold it") as caught:
        await client.negotiate(deadline_s=SOON_S)
    assert not caught.value.was_sent
    await client.close()


async def test_the_connection_ends_instead_of_a_greeting() -> None:
    client = QmpClient(name="q")
    FakeWire(client)
    task = asyncio.create_task(client.negotiate())
    await asyncio.sleep(0)
    client.connection_lost("gone")
    with pytest.raises(QmpDisconnected, match="gone"):
        await task


async def test_a_second_greeting_changes_nothing() -> None:
    client, wire = await connected()
    wire.say(encode_greeting({"qemu": {}}))
    assert client.version == (11, 1, 2)


async def test_random_ids_differ_between_sessions() -> None:
    ids = set()
    for _ in range(3):
        client = QmpClient(name="q")
        wire = FakeWire(client)
        task = start(client, "a")
        ids.add((await wire.sent.get()).id)
        await client.close()
        with pytest.raises(QmpDisconnected, match="closed by this side"):
            await task
    assert len(ids) == 3
