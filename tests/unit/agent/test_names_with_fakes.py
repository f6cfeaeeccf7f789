"""One name, one use: whoever comes second, at whatever moment and by whatever command, leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmferry.agent import agent as agent_module
from vmferry.agent import control, peer_commands
from vmferry.agent.agent import Agent
from vmferry.agent.claims import Claims
from vmferry.agent.restore import restore
from vmferry.core.facts import Fact
from vmferry.errors import Busy, UsageError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.testing.fake_site import MakeSite, Site
from vmferry.vm import adopt as vm_adopt
from vmferry.vm.adopt import AdoptedVm
from vmferry.vm.spawn import identify


async def asked_twice(first: Any, second: Any) -> list[Any]:
    """Both at the same moment; what each came to."""
    return list(await asyncio.gather(first, second, return_exceptions=True))


def refusals(answers: list[Any]) -> list[Busy]:
    for answer in answers:
        assert isinstance(answer, dict | Busy), answer
    return [answer for answer in answers if isinstance(answer, Busy)]


def kept(site: Site, host: str) -> list[str]:
    return [entry.subject for entry in site.agents[host].journal.read() if entry.kind is Entry.KEPT]


def folders(site: Site, host: str, vm: str) -> list[Path]:
    return list(site.agents[host].vm_directory.glob(f"{vm}-*"))


def spec(site: Site, name: str) -> str:
    path = site.directory / f"{name}.toml"
    path.write_text(f'name = "{name}"\nmemory = "32M"\nmachine = "pc-q35-7.2"\naccel = "tcg"\n')
    return str(path)


@contextmanager
def by_hand(site: Site, name: str) -> Iterator[str]:
    """A QEMU that somebody else started on `a`; gives the path of its monitor."""
    path = site.directory / f"{name}.qmp"
    words = ["-name", name, "-machine", "pc-q35-7.2", "-m", "32M", "-nodefaults"]
    words += ["-chardev", f"socket,id=vmferry-qmp,path={path},server=on,wait=off", "-mon", "chardev=vmferry-qmp"]
    process = subprocess.Popen([str(site.director.wrapper("a", "11.1")), *words])
    try:
        yield str(path)
    finally:
        process.kill()
        process.wait()


def adopted(path: str) -> AdoptedVm:
    """What `vm.adopt` finds, for a program that is no QEMU."""
    pid = vm_adopt.listener_pid(path)
    words = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    words = words[words.index("vmferry.testing.fake_qemu") :]
    identity = identify(pid)
    assert identity is not None
    return vm_adopt.from_cmdline(words, program="qemu-system-x86_64", cwd="/", identity=identity)


def test_a_claim_is_held_for_the_time_of_its_block_and_names_what_is_being_done() -> None:
    claims = Claims()
    with claims.hold("web1", "started"):
        assert claims.doing("web1") == "started"
        with pytest.raises(Busy, match="web1 is being started at this very moment"), claims.hold("web1", "awaited"):
            pass
        assert claims.doing("web1") == "started", "who was refused leaves the claim alone"
        with claims.hold("db1", "taken over"):
            assert claims.doing("db1") == "taken over"
    with pytest.raises(RuntimeError), claims.hold("web1", "started"):
        raise RuntimeError
    assert (claims.doing("web1"), claims.doing("db1")) == ("", "")


async def test_of_two_runs_of_one_spec_at_the_same_moment_one_wins(make_site: MakeSite) -> None:
    site = await make_site()
    path = spec(site, "web1")
    answers = await asked_twice(site.command("a", "vm-run", path=path), site.command("a", "vm-run", path=path))
    assert [str(error) for error in refusals(answers)] == ["web1 is being started at this very moment"]
    assert len(site.director.running("web1")) == len([p for p in site.director.puppets if p.vm == "web1"]) == 1
    assert kept(site, "a").count("web1") == len(folders(site, "a", "web1")) == 1
    with pytest.raises(Busy, match="has a VM named web1 already"):
        await site.command("a", "vm-run", path=path)


async def test_of_two_runs_on_two_hosts_at_the_same_moment_at_most_one_wins(make_site: MakeSite) -> None:
    """1. each host claims the name  2. each asks the other  3. a host that hears of a claim does not go on."""
    site = await make_site()
    path = spec(site, "web1")
    answers = await asked_twice(site.command("a", "vm-run", path=path), site.command("b", "vm-run", path=path))
    refused = refusals(answers)
    assert refused
    assert all("web1" in str(error) for error in refused)
    running = [p.host for p in site.director.running("web1")]
    assert len(running) == 2 - len(refused)
    for host in ("a", "b"):
        assert len(folders(site, host, "web1")) == kept(site, host).count("web1") == running.count(host)


async def test_a_run_that_qemu_refuses_leaves_nothing_and_frees_the_name(make_site: MakeSite) -> None:
    site = await make_site()
    path = spec(site, "web1")
    site.director.script("a", cont="a disk is locked")
    with pytest.raises(VmferryError, match="a disk is locked"):
        await site.command("a", "vm-run", path=path)
    assert folders(site, "a", "web1") == []
    site.director.script("a")
    await site.command("a", "vm-run", path=path)
    assert len(site.director.running("web1")) == 1


async def test_of_two_adopts_of_one_name_at_the_same_moment_one_wins(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_adopt, "adopt", adopted)
    site = await make_site()
    with by_hand(site, "one") as one, by_hand(site, "two") as two:
        await site.director.reached("a", "start", times=3)
        answers = await asked_twice(
            site.command("a", "vm-adopt", vm="old", qmp=one), site.command("a", "vm-adopt", vm="old", qmp=two)
        )
        assert [str(error) for error in refusals(answers)] == ["old is being taken over at this very moment"]
        assert kept(site, "a").count("old") == 1
        assert len(site.director.running("one")) == len(site.director.running("two")) == 1


async def test_of_two_names_for_one_qemu_at_the_same_moment_one_wins(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    with by_hand(site, "one") as path:
        await site.director.reached("a", "start", times=2)
        found = adopted(path)
        monkeypatch.setattr(vm_adopt, "adopt", lambda _: found)
        answers = await asked_twice(
            site.command("a", "vm-adopt", vm="old", qmp=path), site.command("a", "vm-adopt", vm="new", qmp=path)
        )
        assert [str(error) for error in refusals(answers)] == [
            f"process {found.identity.pid} is being taken over at this very moment"
        ]
        assert len(kept(site, "a")) == 2, "the guest of the site, and this one"


def place(site: Site, job: str) -> dict[str, Any]:
    definition = site.agents["a"].vms["g"].definition.to_wire()
    return {"vm": "g", "job": job, "source": "a", "generation": 2, "definition": definition,
            "commands": [], "expected": {}}  # fmt: skip


async def test_of_two_places_for_one_name_at_the_same_moment_one_is_made(make_site: MakeSite) -> None:
    site = await make_site()
    prepare = peer_commands.COMMANDS["peer-prepare"]  # by itself: two agents ask over two links
    answers = await asked_twice(
        prepare(site.agents["b"], "a", place(site, "j1")), prepare(site.agents["b"], "c", place(site, "j2"))
    )
    assert [error.side for error in refusals(answers)] == ["destination"]
    made = [entry.subject for entry in site.agents["b"].journal.read() if entry.kind is Entry.PLACE_WANTED]
    assert made == list(site.agents["b"].places)
    assert len(made) == len(folders(site, "b", "g")) == 1
    order = {"job": made[0], "generation": 2}
    assert (await site.agents["a"].peers.link("b").call("peer-release", order))["gone"]


async def test_a_guest_is_not_awaited_where_its_name_is_being_used(make_site: MakeSite) -> None:
    site = await make_site()
    with site.agents["b"].claims.hold("g", "started"):
        attempt = await site.migrate()
        await site.settle()
    assert "g is being started at this very moment" in str(attempt.wire()["error"])
    assert site.agents["b"].places == {}
    await site.check("a")
    await site.migrate()
    await site.settle()
    await site.check("b")


async def test_a_name_is_not_used_where_a_guest_is_awaited(make_site: MakeSite) -> None:
    site = await make_site()
    with site.agents["b"].claims.hold("web1", "awaited"):
        for host, where in (("b", ""), ("a", "on b, ")):
            with pytest.raises(Busy, match=f"^{where}web1 is being awaited at this very moment"):
                await site.command(host, "vm-run", path=spec(site, "web1"))
    assert [p.vm for p in site.director.puppets] == ["g"]
    assert Fact.MIGRATE not in [fact for _, fact in site.noted]


@pytest.mark.parametrize("command", ["vm-status", "vm-stop", "vm-cancel", "vm-start-postcopy", "job-status"])
async def test_a_name_that_is_empty_is_no_fault_inside_the_agent(make_site: MakeSite, command: str) -> None:
    site = await make_site()
    with pytest.raises(UsageError, match=f"{command} needs the name of a VM"):
        await site.command("a", command, vm="")


async def test_a_name_that_is_taken_is_not_worth_waiting_for(make_site: MakeSite) -> None:
    site = await make_site()
    for host in ("a", "b"):
        with pytest.raises(Busy, match="a has a VM named g already") as refused:
            await site.command(host, "vm-run", path=spec(site, "g"))
        assert "another name" in refused.value.hint


@pytest.mark.parametrize("command", ["vm-migrate", "vm-plan"])
@pytest.mark.parametrize(
    "wish",
    [
        {"postcopy_after_passes": -1},
        {"postcopy_after_ms": -1},
        {"postcopy_after_passes": 2, "mode": "precopy"},
        {"postcopy_after_ms": 2, "mode": "precopy"},
    ],
    ids=str,
)
async def test_a_start_of_postcopy_that_cannot_be_meant(
    make_site: MakeSite, command: str, wish: dict[str, Any]
) -> None:
    site = await make_site()
    with pytest.raises(UsageError, match="postcopy"):
        await site.command("a", command, vm="g", destination="b", **wish)
    assert "g" not in site.agents["a"].attempts


async def test_no_command_acts_before_all_of_the_journal_is_known_again(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. one VM is known again, another's QEMU is waited for  2. a command acts on it  3. its old job is taken up."""
    site = await make_site()
    here, go_on = asyncio.Event(), asyncio.Event()
    read = restore

    async def waits(agent: Agent) -> None:
        await read(agent)
        here.set()
        await go_on.wait()

    monkeypatch.setattr(agent_module, "restore", waits)
    starting = asyncio.create_task(site.restart("a"))
    await here.wait()
    agent = site.agents["a"]
    asked = asyncio.create_task(
        agent.to_the_end(control.handle(agent, "vm-status", {"vm": "g"}, forward=False), "test")
    )
    for _ in range(100):
        await asyncio.sleep(0)
    assert not asked.done()
    go_on.set()
    await starting
    assert (await asked)["vm"] == "g"


async def test_a_command_that_waits_for_the_journal_ends_with_its_agent(make_site: MakeSite) -> None:
    site = await make_site()
    config = dataclasses.replace(site.agents["a"].config, state_dir=site.directory / "another")
    agent = Agent(config, host=site.agents["a"].host)
    asked = asyncio.create_task(agent.to_the_end(control.handle(agent, "vm-status", {"vm": "g"}), "test"))
    for _ in range(3):  # until it waits
        await asyncio.sleep(0)
    await agent.close()
    with pytest.raises(asyncio.CancelledError):
        await asked


# --- ids of jobs ----------------------------------------------------------------------------------------------

ID = "1f" * 16


@pytest.mark.parametrize("job", ["nightly", "../" + "a" * 29, "1F" * 16, ID + "0"])
async def test_an_id_of_a_job_is_32_digits(make_site: MakeSite, job: str) -> None:
    """Parts of it become names of folders, and of bitmaps in QEMU."""
    site = await make_site()
    with pytest.raises(UsageError, match="32 hexadecimal digits"):
        await site.command("a", "vm-migrate", vm="g", destination="b", job=job)
    assert site.agents["a"].attempts == {}


@pytest.mark.proves("S107")
async def test_an_id_belongs_to_one_job_of_one_vm(make_site: MakeSite) -> None:
    """Another VM of the same id would be told that its guest runs over there."""
    site = await make_site()
    await site.run_vm("h")
    first = await site.command("a", "vm-migrate", vm="g", destination="b", job=ID)
    with pytest.raises(UsageError, match="that of another job"):
        await site.command("a", "vm-migrate", vm="h", destination="b", job=ID)
    await site.settle()
    again = await site.command("a", "vm-migrate", vm="g", destination="b", job=ID)
    assert (first["job"], again["vm"], again["outcome"]) == (ID, "g", "destination"), "a repeated request"
    with pytest.raises(UsageError, match="that of another job"):
        await site.command("a", "vm-migrate", vm="h", destination="b", job=ID)
    await site.check("a", "h")
    await site.check("b", "g")


@pytest.mark.proves("S107")
async def test_of_two_vms_that_want_one_id_at_the_same_moment_one_has_it(make_site: MakeSite) -> None:
    site = await make_site()
    await site.run_vm("h")
    answers = await asked_twice(*(site.command("a", "vm-migrate", vm=vm, destination="b", job=ID) for vm in ("g", "h")))
    assert len(refusals(answers)) == 1
    assert [attempt.job for attempt in site.agents["a"].attempts.values()] == [ID]
    await site.settle()


@pytest.mark.proves("S107")
async def test_a_place_is_not_given_to_another_vm_or_another_host(make_site: MakeSite) -> None:
    site = await make_site()
    prepare = peer_commands.COMMANDS["peer-prepare"]
    await prepare(site.agents["b"], "a", place(site, ID))
    for who, vm in (("c", "g"), ("a", "h")):
        with pytest.raises(Busy, match=f"has job {ID} for g from a, and none for {vm} from {who}"):
            await prepare(site.agents["b"], who, {**place(site, ID), "vm": vm})
    assert list(site.agents["b"].places) == [ID]
    order = {"job": ID, "generation": 2}
    assert (await site.agents["a"].peers.link("b").call("peer-release", order))["gone"]
