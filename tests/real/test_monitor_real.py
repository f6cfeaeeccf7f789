"""A VM's monitor socket with clients that nobody here wrote: qmp-shell, qmp-tui, socat, and QEMU's own library."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from vmferry.testing.hosts import PAIRS, AgentHost, Guests, MakePair, boot, wait_true

pytestmark = pytest.mark.real

BIN = Path(sys.executable).parent
PRECOPY = ["setup", "active", "pre-switchover", "device", "completed"]


def monitor_of(host: AgentHost, vm: str = "web1") -> str:
    path = host.status(vm)["monitor"]
    assert isinstance(path, str)
    return path


def shell(path: str, *lines: str) -> str:
    """What qmp-shell prints when a person types these lines."""
    typed = "".join(f"{line}\n" for line in lines)
    found = subprocess.run(
        [BIN / "qmp-shell", path], input=typed, capture_output=True, text=True, timeout=60, check=False
    )
    return found.stdout + found.stderr


def replies(printed: str) -> list[Any]:
    """The JSON objects in it, one a line."""
    lines = [line.partition("(QEMU)")[2].strip() or line.strip() for line in printed.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.proves("S5", "S7")
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_qmp_shell_moves_a_guest_as_if_it_spoke_to_qemu(
    source: str, destination: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(source, destination)
    boot(pair.a, guests.boot())
    path = monitor_of(pair.a)
    printed = shell(path, "query-status", "query-name", "query-migrate")
    assert f"Connected to QEMU {source}" in printed
    status, name, _ = replies(printed)
    assert (status["return"]["status"], name["return"]["name"]) == ("running", "web1")
    with pair.a.follow() as follow:
        printed = shell(
            path,
            "migrate-set-parameters max-bandwidth=1073741824 downtime-limit=300",
            f"migrate uri=tcp:{pair.b.net.address}:4444",
        )
        assert replies(printed) == [{"return": {}}, {"return": {}}], printed
        wire = follow.end()
        assert follow.statuses() == PRECOPY
    assert (wire["outcome"], wire["error"]) == ("destination", None)
    assert pair.running_on("web1") == ["host-b"]
    wait_true(lambda: not Path(path).exists(), why="a guest that left has no monitor here")
    there = replies(shell(monitor_of(pair.b), "query-status"))
    assert there[0]["return"]["status"] == "running"


@pytest.mark.parametrize("version", ["7.2", "11.1"])
def test_a_socat_session_sees_the_events_of_the_guest_and_of_the_move(
    version: str, make_pair: MakePair, guests: Guests
) -> None:
    pair = make_pair(version)
    boot(pair.a, guests.boot())
    with subprocess.Popen(
        ["socat", "-", f"UNIX-CONNECT:{monitor_of(pair.a)}"], stdin=-1, stdout=-1, text=True, bufsize=1
    ) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        heard: list[dict[str, Any]] = []

        def say(**command: Any) -> dict[str, Any]:
            assert session.stdin is not None
            session.stdin.write(json.dumps({**command, "id": len(heard)}) + "\n")
            return until("return", "error")

        def until(*members: str, **data: str) -> dict[str, Any]:
            assert session.stdout is not None
            for line in session.stdout:
                heard.append(json.loads(line))
                found = heard[-1]
                if any(member in found for member in members) and data.items() <= found.get("data", {}).items():
                    return found
            raise AssertionError(f"the session ended after {heard[-5:]}")

        assert until("QMP")["QMP"]["version"]["qemu"]["major"] == int(version.partition(".")[0])
        assert say(execute="qmp_capabilities") == {"return": {}, "id": 1}
        say(execute="stop")
        say(execute="cont")
        assert [each["event"] for each in heard if "event" in each] == ["STOP", "RESUME"]
        assert "error" in say(execute="no-such-command")
        assert say(execute="migrate", arguments={"uri": "vmferry:host-b"})["return"] == {}
        until("event", status="completed")
        told = [each["data"]["status"] for each in heard if each.get("event") == "MIGRATION"]
        assert told == PRECOPY
        assert session.stdout.read() is not None  # and ends with the guest's stay here
        session.wait(timeout=30)
    assert pair.running_on("web1") == ["host-b"]


def test_qemus_own_library_gets_the_same_answers_as_from_qemu(
    make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """Beside the agent, over a second monitor of the same QEMU."""
    monitors = tmp_path / "monitors"
    monitors.mkdir()
    pair = make_pair("11.1", monitors=monitors)
    boot(pair.a, guests.boot())
    direct, ours = (
        QEMUMonitorProtocol(path) for path in (os.fspath(next(iter(monitors.glob("*.sock")))), monitor_of(pair.a))
    )
    with direct, ours:
        direct.connect()
        ours.connect()
        for command in ("query-name", "query-uuid", "query-cpus-fast", "query-kvm", "query-qmp-schema"):
            assert ours.cmd(command) == direct.cmd(command), command


def test_qmp_tui_connects_and_harms_nothing(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair("11.1")
    boot(pair.a, guests.boot())
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (50, 200))
    with subprocess.Popen(
        [BIN / "qmp-tui", monitor_of(pair.a)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
    ) as tui:
        os.close(follower)
        screen = b""

        def shows(text: bytes) -> bool:
            """It draws what has come when a key is pressed; a blank changes nothing in JSON."""
            nonlocal screen
            for _ in range(100):
                if text in screen:
                    return True
                os.write(leader, b" ")
                while select.select([leader], [], [], 0.2)[0]:
                    screen += os.read(leader, 1 << 16)
            return False

        try:
            assert shows(b"Connected"), screen
            assert b"11" in screen
            pair.a.ok("migrate", "web1", "host-b")
            assert pair.running_on("web1") == ["host-b"]
        finally:
            tui.kill()
            os.close(leader)
