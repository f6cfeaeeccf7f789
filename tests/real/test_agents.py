"""Agents that are strangers to each other, die in the middle, lose their link, or are driven by foreign clients."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, QMPClient

from vmferry.pki import authority
from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import (
    NEWEST,
    OLDEST,
    PAIRS,
    Follower,
    Guests,
    MakePair,
    TwoAgents,
    boot,
    process_state,
    run_cli,
    stopped,
    wait_true,
)

pytestmark = pytest.mark.real

SLOW = ("--set", "max-bandwidth=2M")
NOW = datetime.now(UTC)


def lives_once(pair: TwoAgents, *folders: Path) -> None:
    """The guest runs on exactly one host, and its letters are those of one life."""
    (name,) = pair.running_on("web1")
    host = pair.a if name == "host-a" else pair.b
    with host.console("web1") as console:
        console.wait_bytes(len(b"".join(c.data for c in console.chunks())) + 2, timeout_s=20)
    count_passes(pair.letters(*folders))


# --- certificates ---


def test_an_agent_without_certificates_does_not_start(tmp_path: Path) -> None:
    words = ["agent", "--name", "x", "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "s")]
    words += ["--runtime-dir", str(tmp_path / "r"), "--json"]
    done = run_cli(*words)
    assert done.code == 7, done.err
    assert "has no certificates" in done.error["message"]
    assert "vmferry pki" in done.error["hint"]
    broken = run_cli(*words, "--pki", str(tmp_path / "nothing"))
    assert broken.code == 7, broken.err


def strange_pki(folder: Path, kind: str, pki: Path) -> Path:
    """A directory to give to host-b's agent."""
    hosts = {"host-a": ["10.0.0.1"], "host-b": ["10.0.0.2"]}
    if kind == "another name":
        return pki / "host-a"
    now = NOW - timedelta(days=4000) if kind == "expired" else NOW
    authority.init(folder, hosts, days=1, now=now)
    return folder / "host-b"


@pytest.mark.parametrize("kind", ["another authority", "expired", "another name"])
def test_a_stranger_is_not_trusted(kind: str, make_pair: MakePair, guests: Guests, pki: Path, tmp_path: Path) -> None:
    pair = make_pair(pki_of={"host-b": strange_pki(tmp_path / "strange", kind, pki)})
    boot(pair.a, guests.boot())
    for command in ("plan", "migrate"):
        error = pair.a.refused(command, "web1", "host-b", code=7)
        assert "host-b" in error["message"]
        assert (error["code"], error["guest"]) == ("not-trusted", "unharmed")
    assert "host-b does not answer" in pair.a.cli("ls").out
    pair.b.refused("migrate", "web1", "host-a", code=4)  # and host-b sees nothing of host-a's VMs
    assert pair.a.status("web1")["run_state"] == "running"
    assert pair.b.qemus() == {}


def test_an_expired_certificate_of_the_same_authority(make_pair: MakePair, guests: Guests, tmp_path: Path) -> None:
    hosts = {"host-a": ["10.0.0.1"], "host-b": ["10.0.0.2"]}
    folder = tmp_path / "old"
    authority.init(folder, {"host-b": ["10.0.0.2"]}, days=1, now=NOW - timedelta(days=3))
    authority.init(folder, hosts, now=NOW)
    pair = make_pair(pki_of={"host-a": folder / "host-a", "host-b": folder / "host-b"})
    boot(pair.a, guests.boot())
    error = pair.a.refused("migrate", "web1", "host-b", code=7)
    assert "expired" in str(error)
    doctor = pair.b.cli("doctor", "--json")
    assert doctor.code == 19
    (check,) = [check for check in doctor.json["checks"] if check["name"] == "certificates"]
    assert check["ok"] is False
    assert "the certificate ended at" in check["detail"]
    assert "vmferry pki" in check["fix"]


# --- deaths ---


@pytest.mark.proves("S83", "S121", "S123", "S125")
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_the_source_agent_is_killed_while_memory_moves(
    source: str, destination: str, make_pair: MakePair, guests: Guests
) -> None:
    """The QEMUs go on; the new agent takes the migration over and brings it to its end."""
    pair = make_pair(source, destination)
    boot(pair.a, guests.boot())
    folders = [pair.a.vm_directory("web1")]
    with pair.a.follow() as follow:
        job = pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)["job"]
        follow.status("active")
        folders.append(pair.b.vm_directory("web1"))
    pair.a.kill()
    pair.a.restart()
    pair.a.ok("set", "web1", "max-bandwidth=1G")
    wire = pair.a.ok("watch", "web1")
    assert (wire["job"], wire["outcome"], wire["status"]) == (job, "destination", "completed")
    lives_once(pair, *folders)
    assert pair.a.qemus() == {}


@pytest.mark.proves("S13", "S53")
def test_a_cancel_after_the_source_agent_was_killed(make_pair: MakePair, guests: Guests) -> None:
    """Everything is given back although the agent that set it is dead; also what the teardown looks for."""
    pair = make_pair(NEWEST)
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", *SLOW)
        follow.status("active")
    pair.a.kill()
    pair.a.restart()
    assert pair.a.ok("cancel", "web1")["status"] == "cancelled"
    assert pair.running_on("web1") == ["host-a"]
    assert pair.a.ok("migrate", "web1", "host-b")["outcome"] == "destination"


@pytest.mark.proves("S53", "S121")
@pytest.mark.parametrize("again", [True, False])
def test_the_destination_agent_is_killed_while_memory_moves(again: bool, make_pair: MakePair, guests: Guests) -> None:
    """If it comes back it takes its place over; if not, the guest goes back, and the place is given up later."""
    pair = make_pair()
    boot(pair.a, guests.boot())
    folders = [pair.a.vm_directory("web1")]
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", "--mode", "precopy", *SLOW)
        follow.status("active")
        folders.append(pair.b.vm_directory("web1"))
        pair.b.kill()
        if again:
            pair.b.restart()
        pair.a.ok("set", "web1", "max-bandwidth=1G")
        wire = follow.end()
    if again:
        assert wire["outcome"] == "destination", wire["sentence"]
        lives_once(pair, *folders)
        return
    assert (wire["outcome"], wire["status"]) == ("source", "failed")
    assert wire["error"]["guest"] == "unharmed"
    assert pair.a.status("web1")["run_state"] == "running"
    pair.b.restart()
    wait_true(lambda: not pair.b.qemus(), timeout_s=60, why="the place that nobody wants is given up")
    lives_once(pair, folders[0])


@pytest.mark.proves("S122", "S125")
def test_the_command_line_is_killed_and_the_migration_goes_on(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        command = pair.a.cli_start("migrate", "web1", "host-b", *SLOW)
        follow.status("active")
        command.kill()
        command.wait()
        pair.a.ok("set", "web1", "max-bandwidth=1G")
        assert follow.end()["outcome"] == "destination"
    assert pair.running_on("web1") == ["host-b"]


def test_the_agent_goes_away_under_the_command_line(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot())
    with pair.a.follow() as follow:
        command = pair.a.cli_start("migrate", "web1", "host-b", "--json", *SLOW)
        follow.status("active")
    pair.a.kill()
    out, _ = command.communicate(timeout=20)
    assert command.returncode == 16, out
    assert "the agent went away" in out
    assert "the migration goes on" in out
    pair.a.restart()
    pair.a.ok("cancel", "web1")
    assert pair.running_on("web1") == ["host-a"]


# --- foreign clients ---


@pytest.mark.proves("S2", "S3", "S4", "S5")
async def test_qemus_own_client_drives_an_agent(make_pair: MakePair, guests: Guests) -> None:
    pair = await asyncio.to_thread(make_pair)
    await asyncio.to_thread(boot, pair.a, guests.boot())
    client = QMPClient("judge")
    heard = EventListener()
    client.register_listener(heard)
    await client.connect(str(pair.a.socket))
    commands: Any = await client.execute("query-commands")
    names = {row["name"] for row in commands}
    assert {"vm-run", "vm-list", "vm-migrate", "vm-cancel", "vm-set", "job-status"} <= names
    job = "0123456789abcdef" * 2
    wish = {"vm": "web1", "destination": "host-b", "mode": "precopy", "job": job}
    first: Any = await client.execute("vm-migrate", wish)
    again: Any = await client.execute("vm-migrate", wish)  # asked twice is asked once
    assert first["job"] == again["job"] == job
    statuses: list[str] = []
    because: list[list[str]] = []
    async with asyncio.timeout(30):
        async for told in heard:
            event: Any = told
            if event["event"] == "MIGRATION" and "role" not in event["data"]:
                statuses.append(event["data"]["status"])
                because.append(event["data"]["because"])
            if event["event"] == "JOB_ENDED":
                break
    assert statuses == ["setup", "active", "pre-switchover", "device", "completed"]
    assert all(because)
    status: Any = await client.execute("job-status", {"job": job})
    assert status["outcome"] == "destination"
    with pytest.raises(Exception, match="no-such-command"):
        await client.execute("no-such-command")
    with pytest.raises(Exception, match="has no argument 'color'"):
        await client.execute("vm-list", {"color": True})
    await client.disconnect()


# --- the link at the commit ---


def loaded_and_not_granted(pair: TwoAgents, follow: Follower, there: Follower) -> int:
    """Holds everything at the last moment before the grant: the destination has loaded, the source's QEMU is
    completed, and the source's agent, which is stopped, does not know yet. The destination QEMU's process."""
    assert pair.a.process is not None
    assert pair.b.process is not None
    pair.a.ok("migrate", "web1", "host-b", "--mode", "precopy", "--detach", *SLOW)
    follow.status("active")
    qemu = pair.b.qemu_pid("web1")
    with stopped(pair.b.process.pid):
        pair.a.ok("set", "web1", "max-bandwidth=1G")
        follow.status("pre-switchover")
        os.kill(qemu, signal.SIGSTOP)
        wait_true(lambda: process_state(qemu) == "T", why="the destination's QEMU is stopped")
    follow.status("device")
    pair.a.signal(signal.SIGSTOP)
    pid = pair.a.process.pid
    wait_true(lambda: process_state(pid) == "T", why="the source's agent is stopped")
    os.kill(qemu, signal.SIGCONT)
    there.until(lambda e: e.name == "TARGET" and e.data["loaded"])
    return qemu


@pytest.mark.proves("S36", "S40", "S53")
@pytest.mark.parametrize("lost", ["the grant", "the answer"])
@pytest.mark.parametrize("version", sorted({OLDEST, NEWEST}))
def test_the_link_is_cut_at_the_commit(lost: str, version: str, make_pair: MakePair, guests: Guests) -> None:
    """UNCERTAIN is shown, both QEMUs are kept, and it heals by itself when the link is back."""
    pair = make_pair(version)
    if pair.hosts.kind != "netns":
        pytest.skip("loopback addresses have no cable")
    boot(pair.a, guests.boot())
    folders = [pair.a.vm_directory("web1")]
    with pair.a.follow() as follow, pair.b.follow() as there:
        qemu = loaded_and_not_granted(pair, follow, there)
        folders.append(pair.b.vm_directory("web1"))
        if lost == "the answer":
            os.kill(qemu, signal.SIGSTOP)
            wait_true(lambda: process_state(qemu) == "T", why="the destination's QEMU is stopped")
            pair.a.signal(signal.SIGCONT)
            wait_true(lambda: "fact=start-sent" in pair.b.log(), why="cont is written and not answered")
        pair.hosts.b.link_down()
        if lost == "the answer":
            os.kill(qemu, signal.SIGCONT)
            there.until(lambda e: e.name == "TARGET" and e.data["ran"])
        else:
            pair.a.signal(signal.SIGCONT)
        said = pair.a.cli("watch", "web1", "--patience", "1s", "--json", timeout_s=40)
        assert said.code == 13, said.out
        assert said.json["outcome"] == "uncertain"
        assert "UNCERTAIN: host-b may run web1; both QEMUs are kept" in said.json["sentence"]
        assert said.json["action"]
        assert pair.a.refused("cancel", "web1", code=18)["guest"] == "unharmed"
        assert pair.a.refused("migrate", "web1", "host-b", code=9)["code"] == "busy"
        assert len(pair.a.qemus()) == len(pair.b.qemus()) == 1
        assert pair.a.execute("vm-status", vm="web1")["run_state"] != "running"
        pair.hosts.b.link_up()
        wire = follow.end(timeout_s=60)
    assert (wire["outcome"], wire["status"]) == ("destination", "completed")
    lives_once(pair, *folders)
    assert pair.running_on("web1") == ["host-b"]
    assert pair.a.qemus() == {}
