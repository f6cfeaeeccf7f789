"""Options that change while a migration runs, and those that must not."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from vmferry.qmp.blocking import BlockingClient
from vmferry.testing.hosts import (
    NEWEST,
    OLDEST,
    Follower,
    Guests,
    MakePair,
    TwoAgents,
    boot,
    stopped,
)

pytestmark = pytest.mark.real

SLOW = ("--set", "max-bandwidth=2M", "--set", "downtime-limit=100ms")


def begin(pair: TwoAgents, follow: Follower, *words: str) -> None:
    pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW, *words)
    follow.status("active")


def parameters(pair: TwoAgents) -> dict[str, Any]:
    """What the source's QEMU itself says; it talks to one client, so the agent has to be gone meanwhile."""
    path = pair.a.status("web1")["qmp"]
    pair.a.kill()
    with BlockingClient(path) as qemu:
        values = dict(qemu.execute("query-migrate-parameters"))
    pair.a.restart()
    return values


@pytest.mark.proves("S21", "S72")
@pytest.mark.parametrize("version", sorted({OLDEST, NEWEST}))
def test_what_is_set_takes_effect_in_qemu(version: str, make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        begin(pair, follow)
        answer = pair.b.ok("set", "web1", "downtime-limit=200ms", "max-bandwidth=3M")  # from the other host
        assert answer["set"] == {"downtime-limit": 200, "max-bandwidth": 3 << 20}
        job = pair.a.execute("job-status", vm="web1")
        assert [row["text"] for row in job["timeline"] if row["what"] == "set-option"] == [
            "downtime-limit=200ms, max-bandwidth=3M"
        ]
    values = parameters(pair)
    assert (values["downtime-limit"], values["max-bandwidth"]) == (200, 3 << 20)
    with pair.a.follow() as follow:
        pair.a.ok("set", "web1", "max-bandwidth=1G")
        assert pair.a.ok("watch", "web1")["outcome"] == "destination"
    assert pair.running_on("web1") == ["host-b"]


@pytest.mark.proves("S67", "S69", "S74", "S80")
def test_locked_options_are_refused_with_the_reason(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        begin(pair, follow)
        for setting, words in {
            "multifd-compression=zlib": "multifd-compression cannot change now",
            "xbzrle=on": "xbzrle cannot change now",
            "multifd=on": "multifd is in use since the channels were opened",
            "multifd-channels=4": "it follows from --multifd",
            "tls-creds=none": "it follows from the certificates",
            "release-ram=on": "destroys the copy",
            "max-postcopy-bandwidth=99999999999999999999": "out of range",
        }.items():
            code = 2 if "range" in words else 10
            error = pair.a.refused("set", "web1", setting, code=code)
            assert words in error["message"], error
            assert error["guest"] == "unharmed"
        error = pair.a.refused("set", "web1", "downtime=200ms", code=2)
        assert "did you mean downtime-limit?" in error["message"]
        assert "is not a setting" in pair.a.refused("set", "web1", "downtime-limit", code=2)["message"]
        # One locked option among good ones: nothing is set.
        pair.a.refused("set", "web1", "downtime-limit=1s", "xbzrle=on", code=10)
        pair.a.ok("cancel", "web1")
        assert not [row for row in follow.end()["timeline"] if row["what"] == "set-option"]


@pytest.mark.proves("S22", "S77")
def test_nothing_can_be_set_while_a_migration_ends(make_pair: MakePair, guests: Guests) -> None:
    """In failing and in cancelling, both of which last because the destination's agent is stopped."""
    pair = make_pair()
    boot(pair.a, guests.boot())
    assert pair.b.process is not None
    with pair.a.follow() as follow:
        begin(pair, follow)
        with stopped(pair.b.process.pid):
            os.kill(pair.b.qemu_pid("web1"), signal.SIGKILL)
            follow.status("failing")
            error = pair.a.refused("set", "web1", "downtime-limit=1s", code=10)
            assert "failing" in error["message"] or "clean" in error["message"], error
            assert pair.a.refused("migrate", "web1", "host-b", code=9)["code"] == "busy"
        follow.end()
        follow.forget()
        begin(pair, follow)
        with stopped(pair.b.process.pid):
            process = pair.a.cli_start("cancel", "web1", "--json")
            follow.status("cancelling")
            error = pair.a.refused("set", "web1", "downtime-limit=1s", code=10)
            assert "cancel" in error["message"] or "clean" in error["message"], error
            assert pair.a.refused("migrate", "web1", "host-b", code=9)["code"] == "busy"
            process.communicate(timeout=20)
        assert process.returncode == 0
    assert pair.running_on("web1") == ["host-a"]


def test_without_a_migration_there_is_nothing_to_set(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot())
    error = pair.b.refused("set", "web1", "downtime-limit=1s", code=10)
    assert "has no migration whose options could change" in error["message"]
    assert "--set" in error["hint"]
