"""What a fake QEMU is at this moment, and what its script makes of the next step.

Theory of operation
-------------------
`State` has the run state, the migration's status word, options, objects and descriptors. Every turning point of a
migration is a *step* with a name. `State.step` tells the director (see `fake_director`) that it was reached and
does what the script says there:

* `hold`: wait until the director says `go`;
* `die`: SIGKILL to itself;
* `fail`: an error of its own, as a broken device gives it;
* `silent`: the monitor answers nothing in-band until the channel is gone, and this step waits for that;
* `{"show": WORD}`: the status becomes WORD, and then as `hold`;
* `{"halt": STATE}`: the guest stops by itself, with this run state and QEMU's event for it if there is one.

Other keys of a script: `cont` (refuse it with this text), `refuse` and `wrong` (option to text, option to the value
that is read back), `dirty` (memory never converges), `cancel` (`failed`: as 7.2 does at times), `relock` (a source
that gave its disks away cannot take them back, with this text), `hang` (a destination without its channel answers
nothing in band until pages come, as one whose main loop waits for one), `frail` (a destination dies of a
recovery that breaks off before the source has said a word, as one before 8.2).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmferry.testing.fake_outside import Outside, OwnProcess
from vmferry.testing.fake_profile import Profile

_HALTS: dict[str, tuple[str, dict[str, Any]]] = {
    "guest-panicked": ("GUEST_PANICKED", {"action": "pause"}),
    "io-error": ("BLOCK_IO_ERROR", {"device": "", "node-name": "disk0", "operation": "write", "action": "stop"}),
    "shutdown": ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}),
}


class Refused(Exception):
    """QEMU's answer to a command that it does not carry out."""

    def __init__(self, desc: str, qmp_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc, self.qmp_class = desc, qmp_class


class StepFailed(Exception):
    """The script wants an error of this QEMU's own at this step."""


class Director:
    """The wire to the test. Without one (a script file, or none) telling goes nowhere and `hold` is for ever."""

    def __init__(self) -> None:
        self.script: dict[str, Any] = {}
        self._going: dict[str, asyncio.Event] = {}
        self._socket: socket.socket | None = None
        self._rest = b""

    def connect(self, place: str | None, hello: dict[str, Any]) -> None:
        """`place` is a JSON file or the director's socket. On the latter, the first line back is the script."""
        if place is None:
            return
        if Path(place).is_file():
            self.script = json.loads(Path(place).read_text())
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(place)
        self.tell(hello)
        while b"\n" not in self._rest:
            data = self._socket.recv(65536)
            if not data:
                raise SystemExit("the director is gone")
            self._rest += data
        self._take_lines()

    def watch(self) -> None:
        """From now on the loop reads what the director says; its end is this process's end."""
        if self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket, self._on_readable)

    def tell(self, message: dict[str, Any]) -> None:
        """One line to the director, sent before this returns."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendall(json.dumps({**message, "at_s": time.monotonic()}).encode() + b"\n")

    def going(self, step: str) -> asyncio.Event:
        """Set once the director has said `go` for this step."""
        return self._going.setdefault(step, asyncio.Event())

    def _on_readable(self) -> None:
        assert self._socket is not None
        data = self._socket.recv(65536)
        if not data:
            os._exit(0)
        self._rest += data
        self._take_lines()

    def _take_lines(self) -> None:
        while b"\n" in self._rest:
            line, _, self._rest = self._rest.partition(b"\n")
            message = json.loads(line)
            if "script" in message:
                self.script = message["script"]
            if "go" in message:
                self.going(message["go"]).set()
            if message.get("die"):
                die(self, OwnProcess())


def die(director: Director, outside: Outside) -> None:
    """As a crash: nothing is flushed, nobody is told but the director."""
    director.tell({"running": False})
    outside.die()


class State:
    """One fake QEMU. Lives on one loop; the monitor's commands and the migration's tasks share it."""

    def __init__(self, profile: Profile, director: Director, outside: Outside | None = None) -> None:
        self.profile, self.director = profile, director
        self.outside: Outside = outside or OwnProcess()
        self.run_state = "prelaunch"
        self.word: str | None = None
        """The migration's status; None: never had one."""
        self.error_desc: str | None = None
        self.capabilities = profile.capabilities()
        self.parameters = profile.parameters()
        self.objects: dict[str, str] = {}
        self.descriptors: dict[str, int] = {}
        self.changed = asyncio.Event()
        """Set when a parameter changed, so that a throttled sender looks again."""
        self.audible = asyncio.Event()
        self.audible.set()
        self.emit: Callable[[str, dict[str, Any] | None], None] = lambda name, data: None
        self.passes = 0
        self.sent_bytes = 0

    @property
    def script(self) -> dict[str, Any]:
        """What the director wants of this process."""
        return self.director.script

    @property
    def is_running(self) -> bool:
        """Do the CPUs run?"""
        return self.run_state == "running"

    def set_run_state(self, state: str) -> None:
        """STOP and RESUME follow from it."""
        was, self.run_state = self.is_running, state
        if self.is_running and not was:
            self.director.tell({"running": True})
            self.emit("RESUME", None)
        elif was and not self.is_running:
            self.director.tell({"running": False})
            self.emit("STOP", None)

    def halt(self, state: str) -> None:
        """As when the guest panics, shuts down, or cannot write; an internal error of QEMU has no event of its own."""
        event = _HALTS.get(state)
        if event is not None:
            self.emit(*event)
        self.set_run_state(state)

    def set_word(self, word: str) -> None:
        """The status, with its event if events are on."""
        self.word = word
        if self.capabilities["events"]:
            self.emit("MIGRATION", {"status": word})

    def count_pass(self) -> None:
        """One more round over memory began."""
        self.passes += 1
        if self.capabilities["events"]:
            self.emit("MIGRATION_PASS", {"pass": self.passes})

    async def step(self, name: str, *, lost: asyncio.Event | None = None) -> None:
        """The turning point `name` is reached. Raises StepFailed when the script says so."""
        self.director.tell({"step": name, "word": self.word})
        action = self.script.get("steps", {}).get(name)
        if action == "die":
            die(self.director, self.outside)
        elif action == "fail":
            raise StepFailed(f"scripted failure at {name}")
        elif action == "silent":
            self.audible.clear()
            assert lost is not None, f"{name} cannot be silent"
            await lost.wait()
            self.audible.set()
        elif isinstance(action, dict) and "halt" in action:
            self.halt(str(action["halt"]))
        elif isinstance(action, dict):
            self.set_word(str(action["show"]))
            await self._held(name, lost)
        elif action == "hold":
            await self._held(name, lost)

    async def _held(self, name: str, lost: asyncio.Event | None) -> None:
        going = self.director.going(name)
        waits = [asyncio.ensure_future(event.wait()) for event in (going, lost) if event is not None]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        going.clear()
