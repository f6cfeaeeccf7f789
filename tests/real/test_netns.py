"""The two hosts of the tests: joined, separable, and gone without a trace."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vmferry.testing.host_tools import HostToolError, run
from vmferry.testing.netns import CableError, TwoHosts, namespaces_possible

pytestmark = pytest.mark.real

ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 7000), family=family) as door:
    print("listening", flush=True)
    while True:
        peer, _ = door.accept()
        with peer:
            peer.sendall(peer.recv(100))
"""
DIAL = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])) as peer:
    peer.sendall(b"hello")
    sys.stdout.write(peer.recv(100).decode())
"""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    if not namespaces_possible():
        pytest.skip("this machine allows no network namespaces")
    with TwoHosts.create() as created:
        assert created.kind == "netns"
        yield created


def serve(hosts: TwoHosts, address: str) -> subprocess.Popen[bytes]:
    server = hosts.b.popen([sys.executable, "-c", ECHO, address], stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    return server


def dial(hosts: TwoHosts, address: str, timeout_s: float = 5) -> str:
    return hosts.a.run([sys.executable, "-c", DIAL, address, str(timeout_s)])


def test_the_hosts_reach_each_other_by_both_families(hosts: TwoHosts) -> None:
    for address in (hosts.b.address, hosts.b.address6):
        serve(hosts, address).kill()
        serve(hosts, address)
        assert dial(hosts, address) == "hello"


def test_a_pulled_cable_can_be_put_back(hosts: TwoHosts) -> None:
    serve(hosts, hosts.b.address6)
    hosts.a.link_down()
    with pytest.raises(HostToolError):
        dial(hosts, hosts.b.address6, timeout_s=0.3)
    hosts.a.link_up()
    assert dial(hosts, hosts.b.address6) == "hello"


def test_dropped_packets_are_a_silence_and_resets_are_told(hosts: TwoHosts) -> None:
    serve(hosts, hosts.b.address)
    with hosts.b.drop(port=7000, direction="in"), pytest.raises(HostToolError, match="timed out"):
        dial(hosts, hosts.b.address, timeout_s=0.3)
    with hosts.b.drop(port=7000, reset=True), pytest.raises(HostToolError, match=r"[Rr]efused|[Rr]eset"):
        dial(hosts, hosts.b.address)
    with hosts.b.drop(port=7001), hosts.a.drop(percent=1), hosts.a.limit(bytes_per_s=1 << 20):
        assert dial(hosts, hosts.b.address, timeout_s=20) == "hello"
    assert dial(hosts, hosts.b.address) == "hello"


def test_what_was_started_on_a_host_ends_with_it_and_nothing_is_left() -> None:
    if not namespaces_possible():
        pytest.skip("this machine allows no network namespaces")
    with TwoHosts.create() as hosts, TwoHosts.create() as others:
        sleeper = hosts.a.popen(["sh", "-c", "echo $$; exec sleep 1000"], stdout=subprocess.PIPE)
        assert sleeper.stdout is not None
        assert int(sleeper.stdout.readline()) == sleeper.pid
        names = {hosts.a.name, hosts.b.name, others.a.name, others.b.name}
        assert len(names) == 4
    assert sleeper.returncode is not None
    left = {line.split()[0] for line in run(["ip", "netns", "list"]).splitlines() if line}
    assert not names & left


def test_loopback_hosts_have_no_cable() -> None:
    with TwoHosts.create_loopback() as hosts:
        assert hosts.kind == "loopback"
        with socket.create_server((hosts.a.address, 0)):
            assert hosts.b.run([sys.executable, "-c", "print(1)"]) == "1\n"
        with pytest.raises(CableError):
            hosts.a.link_down()
