"""Bad input: one clear sentence, an exit code of its own, and nothing is left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmferry.testing.hosts import (
    MIGRATION_PORTS,
    NEWEST,
    OLDEST,
    Guests,
    MakePair,
    TwoAgents,
    boot,
    run_cli,
    stopped,
    wait_true,
)

pytestmark = pytest.mark.real

MEMORY_MIB = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
COMMANDS_ABOUT_A_VM = [
    ["status", "VM"],
    ["stop", "VM"],
    ["migrate", "VM", "host-b"],
    ["plan", "VM", "host-b"],
    ["watch", "VM"],
    ["cancel", "VM"],
    ["set", "VM", "downtime-limit=1s"],
    ["postcopy", "VM"],
]


@pytest.fixture(scope="module")
def shared(make_module_pair: MakePair, tmp_path_factory: pytest.TempPathFactory) -> TwoAgents:
    """Two hosts with a guest `web1` on host-a."""
    pair = make_module_pair()
    boot(pair.a, Guests(tmp_path_factory.mktemp("guests")).boot())
    return pair


@pytest.fixture
def pair(shared: TwoAgents) -> Iterator[TwoAgents]:
    """The same, and the check after each test."""
    yield shared
    assert shared.left_behind() == []
    assert shared.running_on("web1") == ["host-a"]


@pytest.mark.parametrize("words", COMMANDS_ABOUT_A_VM, ids=lambda words: words[0])
def test_an_unknown_vm(words: list[str], pair: TwoAgents) -> None:
    error = pair.a.refused(*[word.replace("VM", "web9") for word in words], code=4)
    assert "web9" in error["message"]
    assert error["code"] == "unknown-vm"


@pytest.mark.parametrize("command", ["migrate", "plan"])
def test_an_unknown_host(command: str, pair: TwoAgents) -> None:
    error = pair.a.refused(command, "web1", "host-z", code=5)
    assert error["message"] == "host-z is not a known host (known: host-b)"
    assert (error["guest"], error["retry"]) == ("unharmed", "after-fix")


def test_in_words(pair: TwoAgents) -> None:
    """Without --json: one sentence, whose fault, how the guest is, may I retry; nothing on standard output."""
    done = pair.a.cli("migrate", "web1", "host-z")
    assert (done.code, done.out) == (5, "")
    lines = done.err.splitlines()
    assert lines[0] == "vmferry: host-z is not a known host (known: host-b)"
    assert "side: client   guest: unharmed   retry: after-fix" in lines[1]


@pytest.mark.parametrize("command", ["migrate", "plan"])
def test_a_host_as_its_own_target(command: str, pair: TwoAgents) -> None:
    done = pair.a.cli(command, "web1", "host-a", "--json")
    assert done.code == 8
    text = json.dumps(done.json)
    assert "host-a" in text
    assert "runs" in text


def test_a_second_migration_of_the_same_vm(pair: TwoAgents) -> None:
    with pair.a.follow() as follow:
        pair.a.ok("migrate", "web1", "host-b", "--detach", "--set", "max-bandwidth=2M")
        follow.status("active")
        for host in (pair.a, pair.b):
            error = host.refused("migrate", "web1", "host-b", code=9)
            assert "web1 is on its way to host-b already" in error["message"]
        assert pair.a.refused("stop", "web1", "--force", code=9)["code"] == "busy"
        pair.a.ok("cancel", "web1")
        assert follow.end()["status"] == "cancelled"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["migrate", "web1", "host-b", "--set", "downtime=1"], "did you mean downtime-limit"),
        (["migrate", "web1", "host-b", "--set", "max-bandwidth=fast"], "max-bandwidth=fast is not possible"),
        (["migrate", "web1", "host-b", "--set", "release-ram=on"], "it destroys the copy"),
        (["migrate", "web1", "host-b", "--postcopy-after", "soon"], "--postcopy-after"),
        (["migrate", "web1", "host-b", "--mode", "teleport"], "teleport"),
        (["migrate", "web1"], "HOST"),
        (["migrate", "web1", "host-b", "--multifd", "many"], "many"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_malformed_command(words: list[str], text: str, pair: TwoAgents) -> None:
    error = pair.a.refused(*words, code=2)
    assert text in error["message"]
    assert error["code"] == "usage"


SPECS = {
    "not there": (None, "cannot be read"),
    "not TOML": ("name = [", "is not TOML"),
    "no name": ('memory = "32M"', "the key 'name' is missing"),
    "a typing error": ('name = "x"\nmemroy = "32M"', "did you mean 'memory'?"),
    "a wrong type": ('name = "x"\nmemory = "32M"\ncpus = "two"', "cpus: expected a whole number"),
    "a wrong size": ('name = "x"\nmemory = "much"', "memory"),
    "a disk that is not there": (
        'name = "x"\nmemory = "32M"\naccel = "tcg"\n[[disk]]\npath = "/nonexistent/disk.img"',
        "/nonexistent/disk.img",
    ),
    "a CPU that QEMU does not know": ('name = "x"\nmemory = "32M"\naccel = "tcg"\ncpu = "pentium9"', "pentium9"),
    "a machine that QEMU does not know": (
        'name = "x"\nmemory = "32M"\naccel = "tcg"\nmachine = "pc-q35-99.0"',
        "pc-q35-99.0",
    ),
    "an option that QEMU does not know": (
        'name = "x"\nmemory = "32M"\naccel = "tcg"\nextra_args = ["-frobnicate"]',
        "frobnicate",
    ),
}


@pytest.mark.parametrize("kind", SPECS)
def test_a_bad_spec(kind: str, pair: TwoAgents, tmp_path: Path) -> None:
    text, words = SPECS[kind]
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_text(text)
    error = pair.a.refused("run", str(path), code=3)
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert pair.a.qemus().keys() == {pair.a.qemu_pid("web1")}


def test_a_name_that_is_taken(pair: TwoAgents, guests: Guests) -> None:
    for host in (pair.a, pair.b):
        error = host.refused("run", guests.boot(), code=9)
        assert "host-a has a VM named web1 already" in error["message"]


def test_no_agent_here(tmp_path: Path) -> None:
    done = run_cli("ls", "--json", environment={"VMFERRY_SOCKET": str(tmp_path / "agent.sock")})
    assert done.code == 16
    assert "no agent answers on" in done.error["message"]
    assert "vmferry agent" in done.error["hint"]


# --- a destination that cannot take it: each needs a pair of its own ---


def refused_there(pair: TwoAgents, *, text: str, code: int = 8) -> None:
    """`plan` and `migrate` say the same, in words, with a way out; the guest runs on and nothing is left."""
    plan = pair.a.cli("plan", "web1", "host-b", "--json")
    assert plan.code == code, plan.out
    assert text in plan.out
    error = pair.a.refused("migrate", "web1", "host-b", code=code)
    assert text in error["message"]
    assert error["guest"] == "unharmed"
    assert error["hint"]
    assert pair.a.status("web1")["run_state"] == "running"
    assert pair.left_behind() == []


def test_a_host_that_does_not_answer(make_pair: MakePair, guests: Guests) -> None:
    """Its agent is not there; it is stopped; the cable is pulled."""
    pair = make_pair()
    boot(pair.a, guests.boot())
    assert pair.a.ok("plan", "web1", "host-b")["possible"]
    assert pair.b.process is not None
    with stopped(pair.b.process.pid):
        error = pair.a.refused("migrate", "web1", "host-b", code=6)
        assert "host-b" in error["message"]
    if pair.hosts.kind == "netns":
        pair.hosts.b.link_down()
        error = pair.a.refused("migrate", "web1", "host-b", code=6)
        assert "host-b" in error["message"]
        pair.hosts.b.link_up()
    pair.b.kill()
    error = pair.a.refused("migrate", "web1", "host-b", code=6)
    assert (error["code"], error["guest"]) == ("host-unreachable", "unharmed")
    assert "host-b does not answer" in pair.a.cli("ls").out
    pair.b.restart()
    assert pair.a.ok("migrate", "web1", "host-b")["outcome"] == "destination"


def test_a_target_without_qemu(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(OLDEST, flags_b=["--qemu", "/nonexistent/qemu"])
    boot(pair.a, guests.boot())
    refused_there(pair, text="/nonexistent/qemu")


def test_a_target_without_the_disk(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair(hidden_b=guests.folder)
    if pair.hosts.kind != "netns":
        pytest.skip("nothing can be hidden from one of two loopback addresses")
    boot(pair.a, guests.boot())
    refused_there(pair, text="web1.img")


def test_a_target_without_the_memory(make_pair: MakePair, guests: Guests) -> None:
    pair = make_pair()
    boot(pair.a, guests.boot(memory_mib=MEMORY_MIB - 64))
    refused_there(pair, text="web1 needs ")


def test_a_target_without_a_free_port(make_pair: MakePair, guests: Guests) -> None:
    port = MIGRATION_PORTS[0]
    pair = make_pair(flags_b=["--migration-ports", f"{port}-{port}"])
    boot(pair.a, guests.boot())
    code = f"import socket, time; s = socket.create_server(('{pair.hosts.b.address}', {port})); time.sleep(600)"
    with ExitStack() as stack:
        squatter = pair.hosts.b.popen(["python3", "-c", code])
        stack.callback(squatter.wait)
        stack.callback(squatter.kill)
        wait_true(lambda: port in pair.b.listening(), why="the port is taken")
        error = pair.a.refused("migrate", "web1", "host-b", code=8)
        assert str(port) in error["message"]
        assert pair.a.cli("plan", "web1", "host-b").code == 8
    assert pair.a.ok("migrate", "web1", "host-b")["outcome"] == "destination"


@pytest.mark.skipif(OLDEST == NEWEST, reason="there is only one QEMU")
def test_a_target_without_the_cpu(make_pair: MakePair, guests: Guests) -> None:
    """A model that only the newer QEMU knows."""
    pair = make_pair(NEWEST, OLDEST)
    boot(pair.a, guests.boot(more='machine = "pc-q35-7.2"\ncpu = "GraniteRapids"'))
    refused_there(pair, text="GraniteRapids")
