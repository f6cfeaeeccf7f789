"""Stands between two agents, reads their messages (clear text), and does to single ones what a bad network does.

Theory of operation
-------------------
A `LinkProxy` listens where one agent is told that the other is, and connects to the real one. Messages are lines of
JSON. `Rule`s say what happens to a command's request or to its answer: it is held until `release`, dropped, delayed,
sent twice, or another answer is put in its place. `on_offer` may rewrite where the memory stream is to be sent, so
that a relay of ours stands in its way, too.

Rule 1: a message that is held or delayed holds up what comes after it in its direction, as TCP does.
Rule 2: every thread ends by `close`, whatever the agents do.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Endpoint = tuple[str, int]

CONNECT_S = 3.0
JOIN_S = 5.0
DUPLICATE = "chaos-twice-"


@dataclass(slots=True)
class Rule:
    """What happens to the next message of this command; `seen` is set when it has happened."""

    command: str
    """A command, or `event NAME` for what an agent tells by itself."""
    side: str
    """request, or answer."""
    action: str
    """hold, hold-all (and everything after it that comes back), drop, delay, duplicate, replace."""
    delay_s: float = 0.0
    replace: bytes = b""
    """Instead of the answer; `%ID%` in it is the request's id."""
    times: int = 1
    seen: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    after: Rule | None = None
    """Only once that one has happened."""
    until: Rule | None = None
    """Only as long as that one has not happened."""
    about: str = ""
    """Only news in which this is true."""
    count: int = 0
    at_s: float = 0.0
    """When it happened first, wall time."""

    def release(self) -> None:
        """Lets go what is held, and what would be."""
        self.times = 0
        self.go.set()


class LinkProxy:
    """Made inside of a host's network (`Host.inside`): its sockets and threads stay there."""

    def __init__(self, listen: Endpoint, target: Endpoint, on_offer: Callable[[dict[str, Any]], None]) -> None:
        self.target, self._on_offer = target, on_offer
        self._rules: list[Rule] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._is_refusing = False
        self._is_closed = False
        self._hold_answers: Rule | None = None
        self._door = socket.create_server(listen, reuse_port=False)
        self.address: Endpoint = self._door.getsockname()[:2]
        self._start(self._accept)

    # --- what the owner does ---

    def add(self, rule: Rule) -> Rule:
        """From now on."""
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """No rules any more; what is held goes on."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.release()
        self._hold_answers = None

    def hold_back(self, rule: Rule) -> Rule:
        """From now on nothing that comes back gets through, events neither, until the rule is released and `let_back`
        is called."""
        self._hold_answers = rule
        return rule

    def let_back(self, rule: Rule) -> None:
        """The end of `hold_back`, or of a rule with `hold-all`."""
        if self._hold_answers is rule:
            self._hold_answers = None
        rule.release()

    def cut(self, *, refusing: bool = False) -> int:
        """Resets every connection; how many there were."""
        self._is_refusing = refusing
        with self._lock:
            mine = list(self._sockets)
        for end in mine:
            _reset(end)
        return len(mine) // 2

    def refuse(self, *, refusing: bool) -> None:
        """Whether new connections are closed at once."""
        self._is_refusing = refusing

    def close(self) -> None:
        """Ends everything."""
        self._is_closed = True
        self.clear()
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self.cut(refusing=True)
        for thread in self._threads:
            thread.join(JOIN_S)

    # --- the threads ---

    def _start(self, body: Callable[..., None], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=body, args=arguments, name="chaos-link", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                near, _ = self._door.accept()
            except OSError:
                return
            if self._is_refusing:
                _reset(near)
                near.close()
                continue
            try:
                far = socket.create_connection(self.target, CONNECT_S)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {near, far}
            asked: dict[str, str] = {}
            self._start(self._pump, near, far, asked, "request")
            self._start(self._pump, far, near, asked, "answer")

    def _pump(self, source: socket.socket, sink: socket.socket, asked: dict[str, str], side: str) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    for out in self._treat(line + b"\n", asked, side):
                        sink.sendall(out)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            mine = {source, sink} & self._sockets
            self._sockets -= {source}
        if source in mine:
            source.close()

    def _treat(self, line: bytes, asked: dict[str, str], side: str) -> list[bytes]:
        """What goes on in place of this line."""
        try:
            message = json.loads(line)
        except ValueError:
            return [line]
        ident = str(message.get("id", ""))
        if side == "request":
            command = str(message.get("execute", ""))
            asked[ident] = command
        else:
            if ident.startswith(DUPLICATE):
                return []
            command = asked.pop(ident, "") if ident else f"event {message.get('event', '')}"
            if command in ("peer-prepare", "peer-reconnect") and isinstance(message.get("return"), dict):
                self._on_offer(message["return"])
                line = json.dumps(message).encode() + b"\r\n"
            held = self._hold_answers
            if held is not None:
                held.seen.set()
                held.go.wait()
        data = message.get("data")
        rule = self._rule_for(command, side, data if isinstance(data, dict) else {})
        return [line] if rule is None else self._carry_out(rule, line, message, ident)

    def _rule_for(self, command: str, side: str, data: dict[str, Any]) -> Rule | None:
        with self._lock:
            for rule in self._rules:
                mine = "request" if rule.action == "hold-all" else rule.side
                is_due = rule.after is None or rule.after.count > 0
                is_due = is_due and (rule.until is None or rule.until.count == 0)
                is_due = is_due and (not rule.about or bool(data.get(rule.about)))
                if is_due and rule.times > 0 and rule.command == command and mine == side:
                    rule.times -= 1
                    rule.count += 1
                    rule.at_s = rule.at_s or time.time()
                    return rule
        return None

    def _carry_out(self, rule: Rule, line: bytes, message: dict[str, Any], ident: str) -> list[bytes]:
        match rule.action:
            case "hold-all":
                self.hold_back(rule)
                rule.seen.set()
                return [line]
            case "hold":
                rule.seen.set()
                rule.go.wait()
                return [line]
            case "drop":
                rule.seen.set()
                return []
            case "delay":
                rule.seen.set()
                rule.go.wait(rule.delay_s)
                return [line]
            case "duplicate":
                rule.seen.set()
                if not ident:
                    return [line, line]  # what is told by itself has no answer
                again = {**message, "id": DUPLICATE + ident}
                return [line, json.dumps(again).encode() + b"\r\n"]
            case "replace":
                rule.seen.set()
                return [rule.replace.replace(b"%ID%", json.dumps(message.get("id")).encode())]
            case _:
                raise AssertionError(rule.action)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
