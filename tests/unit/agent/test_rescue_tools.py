"""The rescue tools against a QEMU that is a few lines long and speaks the recovery: guards, order, what is put back."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from vmferry.agent import rescue, rescue_feed
from vmferry.agent.machine import Machine
from vmferry.clock import SystemClock
from vmferry.core.rescue import Evidence, NeverRan
from vmferry.errors import GuestHeld, QemuError, RescueRefused
from vmferry.qmp.errors import QmpCommandError
from vmferry.vm.spawn import ProcessIdentity
from vmferry.wire import encode
from vmferry.wire.events import AskBitmap, EndOfRam, EndOfSections, PostcopyResume, SectionFooter, SectionPart

RAMBLOCK = (
    "              Block Name    PSize              Offset               Used              Total\r\n"
    "                  pc.ram    4 KiB  0x0000000000000000 0x0000000000010000 0x0000000000010000\r\n"
)


def bytes_of(*events: Any) -> bytes:
    return b"".join(bytes(part) for event in events for part in encode.encode(event))


class FakeQemu:
    """A source as `rescue` sees one. `replies` overrides a command's answer (an exception is raised)."""

    def __init__(self, *, word: str | None = "postcopy-paused", run_state: str = "finish-migrate") -> None:
        self.vm, self.pid, self.version = "web1", os.getpid(), (11, 1)
        self.identity = ProcessIdentity(os.getpid(), 0, "")
        self.clock = SystemClock()
        self.is_gone = False
        self.word, self.state = word, run_state
        self.on = {"events": True, "return-path": True, "postcopy-ram": True, "release-ram": False}
        self.parameters: dict[str, Any] = {"tls-creds": "", "tls-hostname": "", "max-bandwidth": 1}
        self.sticky: set[str] = set()
        self.commands: list[str] = []
        self.replies: dict[str, Any] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.answers_resume = True
        self._sock: socket.socket | None = None
        self._subscribers: list[Callable[[Any], None]] = []

    async def attach(self) -> FakeQemu:
        return self

    def subscribe(self, callback: Callable[[Any], None]) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def run_state(self) -> str:
        return self.state

    async def migration(self) -> dict[str, Any]:
        return {} if self.word is None else {"status": self.word}

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        deadline_s: float = 5,
        fds: tuple[int, ...] = (),
    ) -> Any:
        self.commands.append(command)
        self.before.get(command, lambda: None)()
        if isinstance(reply := self.replies.get(command), Exception):
            raise reply
        given = dict(arguments or {})
        match command:
            case "x-query-ramblock":
                return {"human-readable-text": RAMBLOCK}
            case "query-migrate-capabilities":
                return [{"capability": name, "state": state} for name, state in self.on.items()]
            case "migrate-set-capabilities":
                for each in given["capabilities"]:
                    if each["capability"] not in self.sticky:
                        self.on[each["capability"]] = each["state"]
            case "query-migrate-parameters":
                return dict(self.parameters)
            case "migrate-set-parameters":
                self.parameters |= given
            case "getfd":
                self._sock = socket.socket(fileno=os.dup(fds[0]))
            case "closefd":
                self._close()
            case "migrate-pause":
                self.word = "postcopy-paused"
            case "migrate":
                assert given["uri"] == f"fd:{rescue.FD_NAME}"
                assert self._sock is not None
                sock, self._sock = self._sock, None
                self._thread = threading.Thread(target=self._migrate, args=(sock, bool(given.get("resume"))))
                self._thread.start()
            case "cont":
                self.state = "running"
        return {}

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _migrate(self, sock: socket.socket, resume: bool) -> None:
        with sock:
            if not resume:
                sock.sendall(b"QEVM" + bytes(100_000))
            elif self.answers_resume:
                sock.sendall(bytes_of(AskBitmap("pc.ram")))
                sock.recv(1 << 16)
                sock.sendall(bytes_of(PostcopyResume()))
                sock.recv(1 << 16)
                sock.sendall(bytes_of(SectionPart(1, last=True), EndOfRam(), SectionFooter(1), EndOfSections()))
                sock.recv(1 << 16)
            if not resume or self.answers_resume:
                self.word, self.state = "completed", "postmigrate"

    @property
    def machine(self) -> Machine:
        return cast(Machine, self)

    def close(self) -> None:
        self._close()
        if hasattr(self, "_thread"):
            self._thread.join(10)


@pytest.fixture
def qemu() -> Any:
    made = FakeQemu()
    yield made
    made.close()
    left = [each.name for each in threading.enumerate() if each.name.startswith(("stand-in", "throw-away"))]
    assert left == []


def proof(*answers: bool) -> NeverRan:
    """Its evidence stands as these answers say, the last one for ever."""
    left = list(answers) or [True]
    return NeverRan(
        evidence=Evidence.RENOUNCED, text="host-b", stands=lambda: left.pop(0) if len(left) > 1 else left[0]
    )


CHANGES = {"migrate", "cont", "migrate-pause", "migrate-set-parameters", "migrate-set-capabilities"}


def changes(qemu: FakeQemu) -> list[str]:
    return [each for each in qemu.commands if each in CHANGES]


@pytest.mark.proves("S59")
async def test_a_source_is_led_back_and_not_started(qemu: FakeQemu) -> None:
    told: list[dict[str, Any]] = []
    report = await rescue.bring_back(qemu.machine, proof(), tell=told.append)
    assert (report.tool, report.status, report.run_state) == ("bring-back", "completed", "postmigrate")
    assert changes(qemu) == ["migrate"]
    assert told[-1] == {"tool": "bring-back", "bytes": report.bytes, "pages": 0}
    assert report.to_wire()["vm"] == "web1"


async def test_it_is_started_if_that_is_asked_for(qemu: FakeQemu) -> None:
    report = await rescue.bring_back(qemu.machine, proof(), then_run=True)
    assert report.run_state == "running"
    assert changes(qemu) == ["migrate", "cont"]


async def test_tls_of_the_job_is_taken_off_first(qemu: FakeQemu) -> None:
    qemu.parameters["tls-creds"] = "vmferry-tls-1"
    await rescue.bring_back(qemu.machine, proof())
    assert changes(qemu) == ["migrate-set-parameters", "migrate"]
    assert qemu.parameters["tls-creds"] == ""


@pytest.mark.proves("S41")
@pytest.mark.parametrize(("answers", "done"), [((False,), []), ((True, False), []), ((True, True, False), ["migrate"])])
async def test_the_proof_is_asked_before_each_step_that_cannot_be_undone(
    answers: tuple[bool, ...], done: list[str], qemu: FakeQemu
) -> None:
    with pytest.raises(RescueRefused) as refused:
        await rescue.bring_back(qemu.machine, proof(*answers), then_run=True)
    assert changes(qemu) == done
    assert (refused.value.guest, refused.value.exit_code) == ("paused", 21)
    assert refused.value.hint


@pytest.mark.parametrize(("word", "run_state"), [("active", "running"), ("completed", "postmigrate"), (None, "paused")])
async def test_a_migration_that_is_well_is_left_alone(word: str | None, run_state: str, qemu: FakeQemu) -> None:
    qemu.word, qemu.state = word, run_state
    with pytest.raises(RescueRefused):
        await rescue.bring_back(qemu.machine, proof())
    with pytest.raises(RescueRefused):
        await rescue.throw_away(qemu.machine)
    assert changes(qemu) == []


async def test_a_migration_that_goes_on_meanwhile_is_left_alone(qemu: FakeQemu) -> None:
    def resumed() -> None:
        qemu.word = "postcopy-active"

    qemu.before["getfd"] = resumed
    with pytest.raises(RescueRefused, match="somebody else"):
        await rescue.bring_back(qemu.machine, proof())
    assert changes(qemu) == []
    assert qemu.commands[-1] == "closefd"


async def test_a_qemu_that_is_gone_is_said_to_be(qemu: FakeQemu) -> None:
    qemu.is_gone = True
    with pytest.raises(RescueRefused, match="is gone"):
        await rescue.bring_back(qemu.machine, proof())
    assert qemu.commands == []


async def test_postcopy_active_is_paused_first(qemu: FakeQemu) -> None:
    qemu.word = "postcopy-active"
    await rescue.bring_back(qemu.machine, proof())
    assert changes(qemu) == ["migrate-pause", "migrate"]


async def test_a_pause_that_is_refused_is_told_with_the_guest_paused(qemu: FakeQemu) -> None:
    qemu.word = "postcopy-recover"
    qemu.replies["migrate-pause"] = QmpCommandError(
        "migrate-pause", "GenericError", "only during postcopy", peer="QEMU"
    )
    with pytest.raises(GuestHeld, match="refuses to leave"):
        await rescue.bring_back(qemu.machine, proof())
    assert changes(qemu) == ["migrate-pause"]


async def test_a_refused_order_leaves_no_stand_in_behind(qemu: FakeQemu) -> None:
    qemu.replies["migrate"] = QmpCommandError("migrate", "GenericError", "no", peer="QEMU")
    with pytest.raises(QmpCommandError) as refused:
        await rescue.bring_back(qemu.machine, proof())
    assert refused.value.guest == "paused"  # QEMU's refusal knows nothing of it
    assert qemu.commands[-1] == "closefd"


async def test_a_source_that_hangs_up_is_told_as_held_and_may_be_tried_again(qemu: FakeQemu) -> None:
    qemu.answers_resume = False
    with pytest.raises(GuestHeld) as held:
        await rescue.bring_back(qemu.machine, proof())
    assert (held.value.guest, held.value.retry) == ("paused", "yes")
    assert "closed the connection" in str(held.value.cause)
    qemu.answers_resume = True
    assert (await rescue.bring_back(qemu.machine, proof())).status == "completed"


async def test_a_cancelled_rescue_ends_its_stand_in(qemu: FakeQemu) -> None:
    begun = asyncio.Event()
    qemu.before["migrate"] = begun.set

    def hang(sock: socket.socket, resume: bool) -> None:
        with sock:
            sock.recv(1)

    qemu._migrate = hang  # type: ignore[method-assign]
    task = asyncio.create_task(rescue.bring_back(qemu.machine, proof()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_guest_that_cannot_be_started_is_held(qemu: FakeQemu) -> None:
    qemu.replies["cont"] = QmpCommandError("cont", "GenericError", 'Failed to get "write" lock', peer="QEMU")
    with pytest.raises(GuestHeld, match="write") as held:
        await rescue.bring_back(qemu.machine, proof(), then_run=True)
    assert held.value.retry == "after-fix"


def stuck(qemu: FakeQemu) -> None:
    qemu.word = "failed"
    qemu.on |= {"release-ram": True, "multifd": True}


@pytest.mark.proves("S59")
async def test_a_throw_away_sends_without_any_option_and_puts_all_back(qemu: FakeQemu) -> None:
    stuck(qemu)
    before, parameters = dict(qemu.on), dict(qemu.parameters)
    seen: list[dict[str, bool]] = []
    qemu.before["migrate"] = lambda: seen.append(dict(qemu.on))
    report = await rescue.throw_away(qemu.machine)
    assert seen == [{**dict.fromkeys(before, False), "events": True}]
    assert (qemu.on, qemu.parameters) == (before, parameters)
    assert (report.status, report.run_state) == ("completed", "postmigrate")
    assert report.bytes > 100_000
    assert "cont" not in qemu.commands


async def test_memory_is_never_sent_away_while_qemu_would_give_it_up(qemu: FakeQemu) -> None:
    """release-ram would destroy the only copy."""
    stuck(qemu)
    qemu.sticky = {"release-ram"}
    with pytest.raises(QemuError, match="release-ram"):
        await rescue.throw_away(qemu.machine)
    assert "migrate" not in qemu.commands
    assert qemu.on["multifd"]  # put back


async def test_options_are_put_back_after_a_refused_order_too(qemu: FakeQemu) -> None:
    stuck(qemu)
    before, parameters = dict(qemu.on), dict(qemu.parameters)
    qemu.replies["migrate"] = QmpCommandError("migrate", "GenericError", "no", peer="QEMU")
    with pytest.raises(QmpCommandError):
        await rescue.throw_away(qemu.machine)
    assert (qemu.on, qemu.parameters) == (before, parameters)


async def test_a_throw_away_with_a_proof_asks_it_too(qemu: FakeQemu) -> None:
    stuck(qemu)
    with pytest.raises(RescueRefused):
        await rescue.throw_away(qemu.machine, proof(True, False))
    assert "migrate" not in qemu.commands


async def test_trouble_with_putting_back_does_not_hide_the_rescue(qemu: FakeQemu) -> None:
    stuck(qemu)

    def refuse_from_now_on() -> None:
        qemu.replies["migrate-set-capabilities"] = QmpCommandError("x", "GenericError", "busy", peer="QEMU")

    qemu.before["migrate"] = refuse_from_now_on
    assert (await rescue.throw_away(qemu.machine)).status == "completed"


@pytest.mark.parametrize(
    ("run_state", "was_paused", "text"),
    [
        ("finish-migrate", False, ""),
        ("postmigrate", False, ""),
        ("paused", True, ""),
        ("paused", False, "has run since"),  # QEMU started it after the migration broke, and somebody stopped it
        ("io-error", False, "has run since"),
        ("running", False, "runs"),
        ("running", True, "runs"),
    ],
)
async def test_pages_come_only_from_a_guest_that_has_stood_still_since_the_switchover(
    run_state: str, was_paused: bool, text: str
) -> None:
    source = FakeQemu(word="failed", run_state=run_state)
    if not text:
        await rescue_feed.require_still(source.machine, was_paused=was_paused)
        return
    with pytest.raises(RescueRefused, match=text) as refused:
        await rescue_feed.require_still(source.machine, was_paused=was_paused)
    assert (refused.value.guest, refused.value.retry) == ("unknown", "no")
