"""The proxy between two agents does to a message what its rule says, and to no other."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vmferry.chaos.link import LinkProxy, Rule

WAIT_S = 5.0


class Agent:
    """Answers each command with what it is; keeps what it heard."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.door = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self.door.accept()
            except OSError:
                return
            with link, link.makefile("rb") as lines:
                for line in lines:
                    asked = json.loads(line)
                    self.heard.append(asked)
                    if asked["execute"] == "tell":
                        for ran in (False, True, True):
                            link.sendall(json.dumps({"event": "TARGET", "data": {"ran": ran}}).encode() + b"\r\n")
                    answer = {"return": {"addresses": [["10.0.0.1", 5]], "to": asked["execute"]}, "id": asked["id"]}
                    link.sendall(json.dumps(answer).encode() + b"\r\n")


CALLERS: list[Caller] = []


class Caller:
    """A session through the proxy."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.link = socket.create_connection(address, WAIT_S)
        self.lines = self.link.makefile("rb")
        self.count = 0
        CALLERS.append(self)

    def say(self, command: str) -> int:
        self.count += 1
        self.link.sendall(json.dumps({"execute": command, "id": self.count}).encode() + b"\r\n")
        return self.count

    def hear(self) -> dict[str, Any]:
        return dict(json.loads(self.lines.readline()))

    def ask(self, command: str) -> dict[str, Any]:
        ident = self.say(command)
        answer = self.hear()
        assert answer["id"] == ident
        return answer


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.door.shutdown(socket.SHUT_RDWR)
    made.door.close()
    made.thread.join(WAIT_S)


@pytest.fixture
def proxy(agent: Agent) -> Iterator[LinkProxy]:
    def rewrite(offer: dict[str, Any]) -> None:
        offer["addresses"] = [["10.9.9.9", 9]]

    made = LinkProxy(("127.0.0.1", 0), agent.door.getsockname(), rewrite)
    yield made
    made.close()
    while CALLERS:
        caller = CALLERS.pop()
        caller.lines.close()
        caller.link.close()


def test_without_rules_all_passes_and_only_offers_are_rewritten(proxy: LinkProxy) -> None:
    caller = Caller(proxy.address)
    assert caller.ask("peer-target")["return"]["addresses"] == [["10.0.0.1", 5]]
    assert caller.ask("peer-prepare")["return"]["addresses"] == [["10.9.9.9", 9]]


def test_a_dropped_request_is_never_heard_and_the_next_one_is(proxy: LinkProxy, agent: Agent) -> None:
    rule = proxy.add(Rule("peer-grant", "request", "drop"))
    caller = Caller(proxy.address)
    caller.say("peer-grant")
    assert caller.ask("peer-target")["return"]["to"] == "peer-target"
    assert caller.ask("peer-grant")["return"]["to"] == "peer-grant"
    assert [asked["execute"] for asked in agent.heard] == ["peer-target", "peer-grant"]
    assert (rule.count, rule.seen.is_set()) == (1, True)
    assert rule.at_s > 0


def test_a_dropped_answer_was_carried_out(proxy: LinkProxy, agent: Agent) -> None:
    proxy.add(Rule("peer-grant", "answer", "drop"))
    caller = Caller(proxy.address)
    caller.say("peer-grant")
    assert caller.ask("peer-target")["return"]["to"] == "peer-target"
    assert [asked["execute"] for asked in agent.heard] == ["peer-grant", "peer-target"]


def test_a_held_message_goes_on_when_it_is_released(proxy: LinkProxy, agent: Agent) -> None:
    rule = proxy.add(Rule("peer-ready", "request", "hold"))
    caller = Caller(proxy.address)
    caller.say("peer-ready")
    assert rule.seen.wait(WAIT_S)
    assert agent.heard == []
    rule.release()
    assert caller.hear()["return"]["to"] == "peer-ready"


def test_everything_that_comes_back_is_held(proxy: LinkProxy, agent: Agent) -> None:
    rule = proxy.add(Rule("peer-grant", "answer", "hold-all"))
    caller = Caller(proxy.address)
    caller.say("peer-grant")
    assert rule.seen.wait(WAIT_S)
    caller.say("peer-target")
    assert select.select([caller.link], [], [], 0.1)[0] == []
    proxy.let_back(rule)
    assert [caller.hear()["return"]["to"] for _ in range(2)] == ["peer-grant", "peer-target"]


def test_a_duplicate_is_heard_twice_and_answered_once(proxy: LinkProxy, agent: Agent) -> None:
    proxy.add(Rule("peer-grant", "request", "duplicate"))
    caller = Caller(proxy.address)
    assert caller.ask("peer-grant")["return"]["to"] == "peer-grant"
    assert caller.ask("peer-target")["return"]["to"] == "peer-target"
    assert [asked["execute"] for asked in agent.heard] == ["peer-grant", "peer-grant", "peer-target"]


def test_another_answer_in_its_place(proxy: LinkProxy) -> None:
    proxy.add(Rule("peer-ready", "answer", "replace", replace=b'{"return": [], "id": %ID%}\r\n'))
    assert Caller(proxy.address).ask("peer-ready")["return"] == []


def test_a_rule_that_waits_for_another(proxy: LinkProxy, agent: Agent) -> None:
    first = proxy.add(Rule("peer-grant", "answer", "drop"))
    proxy.add(Rule("peer-target", "request", "drop", after=first))
    caller = Caller(proxy.address)
    caller.ask("peer-target")
    caller.say("peer-grant")
    caller.say("peer-target")
    assert caller.ask("peer-ready")["return"]["to"] == "peer-ready"
    assert [asked["execute"] for asked in agent.heard] == ["peer-target", "peer-grant", "peer-ready"]


def test_news_is_taken_by_what_it_says_and_has_no_answer(proxy: LinkProxy) -> None:
    rule = proxy.add(Rule("event TARGET", "answer", "drop", about="ran"))
    caller = Caller(proxy.address)
    caller.say("tell")
    assert [caller.hear().get("data") for _ in range(3)] == [{"ran": False}, {"ran": True}, None]
    assert rule.count == 1
    proxy.add(Rule("event TARGET", "answer", "duplicate", about="ran"))
    caller.say("tell")
    assert [caller.hear().get("data", {}).get("ran") for _ in range(5)] == [False, True, True, True, None]


def test_a_rule_that_holds_until_another_has_happened(proxy: LinkProxy) -> None:
    last = Rule("peer-ready", "answer", "delay")
    rule = proxy.add(Rule("event TARGET", "answer", "drop", times=1000, until=last))
    proxy.add(last)
    caller = Caller(proxy.address)
    caller.say("tell")
    assert "event" not in caller.hear()
    assert rule.count == 3
    caller.ask("peer-ready")
    caller.say("tell")
    assert [caller.hear().get("event") for _ in range(4)] == ["TARGET"] * 3 + [None]


def test_a_cut_ends_sessions_and_refusing_keeps_new_ones_out(proxy: LinkProxy) -> None:
    caller = Caller(proxy.address)
    caller.ask("peer-target")
    assert proxy.cut(refusing=True) == 1
    assert caller.lines.readline() == b""
    with pytest.raises((ConnectionError, json.JSONDecodeError)):
        Caller(proxy.address).ask("peer-target")
    proxy.refuse(refusing=False)
    assert Caller(proxy.address).ask("peer-target")["return"]["to"] == "peer-target"
