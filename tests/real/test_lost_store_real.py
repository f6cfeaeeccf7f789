"""An object store is lost to a running agent and comes back, while a guest is saved, and while one is restored lazily.

The store is a real server that speaks S3 over HTTP, in the network of the agent's host, behind a relay: a store that is
dead refuses connections and has cut those that there were, one that is silent answers none. What it holds outlives
that.
"""

from __future__ import annotations

import secrets
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from vmferry.testing.hosts import NEWEST, AgentHost, Guests, MakePair, boot, wait_true
from vmferry.testing.relay import Relay

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

ADDRESS = ("127.0.0.1", 9000)
"""In the host's own network. No port that the kernel gives away: it must be free when the store comes back."""
SLOWLY = 512 << 10
"""Bytes per second: a guest whose memory comes so runs long before all of it is there."""
BACK_S = 90


class Store:
    """The server, and the way to it."""

    def __init__(self, host: AgentHost) -> None:
        self._host = host
        self.bucket = secrets.token_hex(8)  # what a server in this process has outlives it
        with host.net.inside():
            self._server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
            self._server.start()
            target = self._server.get_host_and_port()
            urllib.request.urlopen(
                urllib.request.Request(f"http://{target[0]}:{target[1]}/{self.bucket}", method="PUT")
            ).close()
            self._target = (str(target[0]), int(target[1]))
            self.way = Relay(self._target, listen=ADDRESS)

    def lose(self, how: str) -> None:
        """`dead`: nobody listens any more, and every connection is cut. `silent`: it hears, and answers nothing."""
        if how == "silent":
            self.way.to_client.hold()
        else:
            self.way.stop()

    def come_back(self) -> None:
        """With what it had."""
        self.way.stop()  # also of a silent one whatever was on its way is gone
        with self._host.net.inside():
            self.way = Relay(self._target, listen=ADDRESS)

    def close(self) -> None:
        self.way.stop()
        self._server.stop()


@contextmanager
def stored(host: AgentHost, folder: Path) -> Iterator[Store]:
    """The host's agent keeps its snapshots in an object store."""
    host.kill()
    store = Store(host)
    try:
        config = folder / "agent.toml"
        config.write_text(
            f'repository = "s3://{store.bucket}/here"\n[repository_options]\nregion = "us-east-1"\n'
            f'endpoint = "http://{ADDRESS[0]}:{ADDRESS[1]}"\naccess_key_id = "test"\nsecret_access_key = "test"\n'
        )
        host.flags += ["--config", str(config)]
        host.restart()
        assert "repository-init" in host.refused("snapshots", code=25)["hint"], "none is made unasked"
        assert host.ok("repository-init")["created"]
        yield store
    finally:
        store.close()


def names(host: AgentHost) -> list[str]:
    return [each["name"] for each in host.ok("snapshots")["snapshots"]]


def job_of(host: AgentHost, vm: str) -> dict[str, Any]:
    (found,) = (job for job in host.execute("query-jobs") if job["vm"] == vm)
    return dict(found)


def goes_on(host: AgentHost, vm: str) -> None:
    """Its guest writes further letters."""
    seen = len((host.vm_directory(vm) / "serial.log").read_bytes())
    with host.console(vm) as console:
        console.wait_bytes(seen + 2, timeout_s=BACK_S)


@pytest.mark.parametrize(("how", "comes_back"), [("dead", True), ("dead", False), ("silent", True)])
@pytest.mark.proves("S53")
def test_a_save_goes_on_or_ends_honestly_and_its_guest_always_goes_on(
    how: str, comes_back: bool, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    """The store is lost while the guest stands for its last pages; the guest waits for no store."""
    host = make_pair(NEWEST, clear_text=True).a
    with stored(host, tmp_path) as store:
        spec = guests.boot(ram_mib=24)
        Path(spec).write_text(Path(spec).read_text() + "readonly = true\n")
        boot(host, spec)
        assert host.ok("save", "web1", "before")["outcome"] == "saved"
        job = host.ok("save", "web1", "one", "--way", "precopy", "--no-auto-finalize", "--detach")["job"]
        wait_true(lambda: "save fact=stands" in host.log(), timeout_s=BACK_S, why="the guest stands")
        store.lose(how)
        resumed = host.log().count("save fact=resumed ")
        host.execute("job-finalize", id=job)
        wait_true(lambda: host.log().count("save fact=resumed ") > resumed, timeout_s=BACK_S, why="it is given back")
        assert host.status("web1")["run_state"] == "running", "without the store"
        goes_on(host, "web1")
        if comes_back:
            store.come_back()
        wait_true(lambda: host.execute("job-status", job=job)["over"], timeout_s=3 * BACK_S, why="the save has an end")
        wire = host.execute("job-status", job=job)
        if not comes_back:
            assert wire["outcome"] in ("none", "unknown")
            assert wire["error"]["code"] == "repository"
            assert wire["error"]["guest"] == "unharmed"
            assert host.status("web1")["run_state"] == "running"
            store.come_back()
        assert wire["outcome"] == "saved" or wire["error"] is not None
        found = names(host)
        assert found[0] == "before"
        if wire["outcome"] != "unknown":
            assert ("one" in found) is (wire["outcome"] == "saved")
        assert host.ok("save", "web1", "after", "--way", "precopy")["outcome"] == "saved"
        assert host.ok("verify")["whole"]
        goes_on(host, "web1")


@pytest.mark.parametrize(("how", "told"), [("dead", "s3://"), ("silent", "has not answered for seconds")])
@pytest.mark.proves("S53")
def test_a_guest_of_a_lazy_restore_waits_for_its_store_and_goes_on(
    how: str, told: str, make_pair: MakePair, guests: Guests, tmp_path: Path
) -> None:
    host = make_pair(NEWEST, clear_text=True).a
    with stored(host, tmp_path) as store:
        spec = guests.boot(memory_mib=96, ram_mib=64, delay=2_000)
        Path(spec).write_text(Path(spec).read_text() + "readonly = true\n")
        boot(host, spec)
        assert host.ok("save", "web1", "one", "--pause")["outcome"] == "saved"
        host.ok("stop", "web1", "--force")
        store.way.to_client.throttle(SLOWLY)
        wire = host.ok("restore", "one", "--lazy", "--no-auto-dismiss")
        assert wire["resume_ms"] is not None
        pid = host.qemu_pid("web1")
        store.lose(how)
        wait_true(lambda: job_of(host, "web1")["status"] == "paused", timeout_s=BACK_S, why="the job says so")
        assert host.refused("migrate", "web1", "host-b", code=9)["code"] == "busy"
        wait_true(lambda: told in job_of(host, "web1")["reason"], timeout_s=BACK_S, why="it says what is wrong")
        store.come_back()
        wait_true(lambda: job_of(host, "web1")["status"] == "concluded", timeout_s=BACK_S, why="it is whole")
        assert job_of(host, "web1")["detail"] == "completed"
        assert host.qemu_pid("web1") == pid, "the same process"
        goes_on(host, "web1")
        assert host.execute("snapshots")["pins"] == []
