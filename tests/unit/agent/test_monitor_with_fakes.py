"""A VM's monitor socket, between fake QEMUs: what passes, what is vmferry's, what is held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmferry.agent import peer_commands, rescue_commands
from vmferry.core.facts import Fact
from vmferry.core.restore import RestoreFact as F
from vmferry.core.restore import RestoreLog
from vmferry.errors import Busy
from vmferry.qmp.client import QmpClient, connect_unix
from vmferry.qmp.codec import Command, Event
from vmferry.qmp.errors import QmpCommandError
from vmferry.testing.fake_site import MakeSite, Site

Monitored = Callable[..., Awaitable[tuple[QmpClient, list[Event]]]]


@asynccontextmanager
async def monitor_of(site: Site, host: str = "a", vm: str = "g") -> AsyncIterator[tuple[QmpClient, list[Event]]]:
    """A client of the VM's monitor, and the events that it heard."""
    heard: list[Event] = []
    client = await connect_unix(str(site.agents[host].monitors.path_of(vm)), on_event=heard.append)
    try:
        yield client, heard
    finally:
        await client.close()


def statuses(heard: list[Event]) -> list[str]:
    return [str(event.data["status"]) for event in heard if event.name == "MIGRATION"]


async def refused(client: QmpClient, command: str, arguments: dict[str, Any] | None = None) -> str:
    with pytest.raises(QmpCommandError) as caught:
        await client.execute(command, arguments)
    return caught.value.desc


async def test_what_qemu_answers_comes_back_as_it_is(make_site: MakeSite) -> None:
    site = await make_site()
    machine = site.agents["a"].vms["g"].require_machine()
    assert machine.client is not None
    async with monitor_of(site) as (client, heard):
        assert client.greeting is not None
        assert machine.client.greeting is not None
        assert client.greeting.version == machine.client.greeting.version
        assert await client.execute("query-status") == await machine.execute("query-status")
        with pytest.raises(QmpCommandError) as ours:
            await client.execute("closefd", {"fdname": "none"})
        with pytest.raises(QmpCommandError) as qemus:
            await machine.execute("closefd", {"fdname": "none"})
        assert (ours.value.qmp_class, ours.value.desc) == (qemus.value.qmp_class, qemus.value.desc)
        assert ours.value.remote is None, "it is QEMU's word, with nothing of ours in it"
        direct: list[Event] = []
        machine.listeners.add(direct.append)
        await client.execute("stop")
        await client.execute("cont")
        await client.execute("query-status")
        told = [event for event in heard if event.name in ("STOP", "RESUME")]
        assert [event.name for event in told] == ["STOP", "RESUME"]
        assert told == direct, "with QEMU's own times"


@pytest.mark.parametrize(("mode", "version"), [("precopy", "7.2"), ("precopy", "11.1"), ("postcopy", "11.1")])
async def test_a_client_written_for_qemu_moves_a_guest(make_site: MakeSite, mode: str, version: str) -> None:
    site = await make_site(version, version)
    if mode == "postcopy":
        site.director.change("a", dirty=True)
    async with monitor_of(site) as (client, heard):
        caps = [{"capability": "postcopy-ram", "state": mode == "postcopy"}]
        await client.execute("migrate-set-capabilities", {"capabilities": caps})
        await client.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30, "downtime-limit": 200})
        assert (await client.execute("query-migrate-parameters"))["max-bandwidth"] == 1 << 30
        assert caps[0] in await client.execute("query-migrate-capabilities")
        await client.execute("migrate", {"uri": f"tcp:{site.agents['a'].config.peers['b'].addresses[0].host}:4444"})
        wanted = site.attempt().wanted
        assert (wanted.mode, wanted.options) == (mode, {"max-bandwidth": 1 << 30, "downtime-limit": 200})
        if mode == "postcopy":
            await client.execute("migrate-start-postcopy")
        await site.settle()
    await site.check("b")
    told = statuses(heard)
    assert told[:2] == ["setup", "active"]
    assert ("postcopy-active" in told) == (mode == "postcopy")
    assert not site.agents["a"].monitors.path_of("g").exists()
    async with monitor_of(site, "b") as (there, _):
        assert (await there.execute("query-status"))["status"] == "running"


async def test_a_postcopy_waits_for_the_clients_word_and_a_cancel_ends_it(make_site: MakeSite) -> None:
    site = await make_site("7.2")  # a newer one under TCG switches at once, or it would lose writes
    site.director.change("a", dirty=True)
    async with monitor_of(site) as (client, heard):
        await client.execute("migrate_cancel")  # as with QEMU: there is none, and nothing happens
        wanted = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
        await client.execute("migrate-set-capabilities", wanted)
        await client.execute("migrate", {"uri": "vmferry:b"})
        await site.noted_by("a", Fact.SETUP_DONE)
        assert Fact.START_POSTCOPY not in site.attempt().facts
        assert (await client.execute("query-migrate"))["status"] == "active"
        assert "on its way to b" in await refused(client, "block-job-cancel", {"device": "d"})
        for command in ("cont", "stop", "quit"):
            assert "on its way to b" in await refused(client, command)
            line = {"command-line": command}
            assert "on its way to b" in await refused(client, "human-monitor-command", line)
        assert "in use since" in await refused(client, "migrate-set-parameters", {"xbzrle-cache-size": 1 << 20})
        await client.execute("migrate-set-parameters", {"downtime-limit": 100})
        await client.execute("migrate_cancel")
        await site.settle()
        assert (await client.execute("query-migrate"))["status"] == "cancelled"
        assert statuses(heard)[-2:] == ["cancelling", "cancelled"]
        await client.execute("stop")
        await client.execute("cont")
    await site.check("a")


async def test_nothing_is_passed_between_the_look_at_a_guest_and_the_register_that_has_its_job(
    make_site: MakeSite,
) -> None:
    """1. a migration is asked for, and finds the guest running  2. a client says quit  3. the job is registered"""
    site = await make_site()
    async with monitor_of(site) as (client, _):
        with site.agents["a"].claims.hold("g", "sent somewhere"):
            for command in ("quit", "stop"):
                assert "being sent somewhere at this very moment" in await refused(client, command)
            assert (await client.execute("query-status"))["status"] == "running"
        await client.execute("stop")
        await client.execute("cont")
    await site.check("a")


@pytest.mark.proves("S97", "S98", "S99")
@pytest.mark.parametrize("verb", ["migrate-continue", "job-finalize", "job-cancel"])
async def test_a_client_that_wants_a_say_has_it_in_qemus_words(make_site: MakeSite, verb: str) -> None:
    site = await make_site()
    async with monitor_of(site) as (client, heard):
        assert await client.execute("query-jobs") == []
        assert "no migration" in await refused(client, "migrate-continue", {"state": "pre-switchover"})
        waits = {"capabilities": [{"capability": "pause-before-switchover", "state": True}]}
        await client.execute("migrate-set-capabilities", waits)
        await client.execute("migrate", {"uri": "vmferry:b"})
        await site.until_row(site.attempt(), "M-hold")
        assert (await client.execute("query-migrate"))["status"] == "pre-switchover"
        (job,) = await client.execute("query-jobs")
        assert (job["type"], job["status"]) == ("migrate", "pending")
        assert "found" in await refused(client, "job-cancel", {"id": "another"}), "that one is QEMU's to know"
        named = {"state": "pre-switchover"} if verb == "migrate-continue" else {"id": job["id"]}
        await client.execute(verb, named)
        await site.settle()
        told = [event.data["status"] for event in heard if event.name == "JOB_STATUS_CHANGE"]
        assert told[-2:] == ["concluded", "null"] or told[-1] == "concluded"
        assert "pending" in told
    await site.check("a" if verb == "job-cancel" else "b")


async def test_what_cannot_be_meant_is_refused_in_words(make_site: MakeSite) -> None:
    site = await make_site()
    async with monitor_of(site) as (client, _):
        assert "known: b" in await refused(client, "migrate", {"uri": "tcp:10.9.9.9:1"})
        assert "no host" in await refused(client, "migrate", {"uri": "exec:cat"})
        assert "runs here" in await refused(client, "migrate-incoming", {"uri": "tcp:0:1"})
        assert "descriptor" in await refused(client, "getfd", {"fdname": "x"})
        assert "migrate-set-parameter" in await refused(
            client, "human-monitor-command", {"command-line": "migrate_set_parameter downtime-limit 1"}
        )
        assert "no migration" in await refused(client, "migrate-recover", {"uri": "tcp:0:1"})
        wrong = {"capabilities": [{"capability": "release-ram", "state": True}]}
        assert "destroys the copy" in await refused(client, "migrate-set-capabilities", wrong)
        assert "out of range" in await refused(client, "migrate-set-parameters", {"downtime-limit": 1 << 40})
    await site.check("a")


async def test_many_clients_at_once_and_the_end_of_the_vm(make_site: MakeSite) -> None:
    site = await make_site()
    async with AsyncExitStack() as stack:
        clients = [(await stack.enter_async_context(monitor_of(site)))[0] for _ in range(5)]
        for client in clients:
            assert (await client.execute("query-status"))["status"] == "running"
        await site.command("a", "vm-stop", vm="g", force=True)
        for client in clients:
            await client.closed
    assert not site.agents["a"].monitors.path_of("g").exists()


def restored(site: Site, vm: str, log: RestoreLog) -> SimpleNamespace:
    """A restore of this VM is at work on `a`, with these facts."""
    found = SimpleNamespace(
        vm=vm, job="1f" * 16, log=log, ended=asyncio.Event(), wanted=SimpleNamespace(name="monday", wanted_s=0.0)
    )
    site.agents["a"].restores._jobs[vm] = found  # type: ignore[assignment]
    return found


async def test_nobody_starts_or_stops_a_guest_whose_restore_is_about_to(make_site: MakeSite) -> None:
    site = await make_site()
    back = restored(site, "g", RestoreLog().with_fact(F.WANTED).with_fact(F.KEPT))
    try:
        async with monitor_of(site) as (client, _):
            for command in ("stop", "cont", "quit"):
                assert "is being restored" in await refused(client, command)
            back.log = back.log.with_fact(F.RAN)
            await client.execute("stop")
            assert (await client.execute("query-status"))["status"] == "paused"
    finally:
        back.ended.set()
        del site.agents["a"].restores._jobs["g"]


async def test_a_name_that_is_being_restored_takes_no_guest_of_another_host(make_site: MakeSite) -> None:
    """Nobody has the VM yet: it is loading."""
    site = await make_site()
    back = restored(site, "other", RestoreLog().with_fact(F.WANTED))
    try:
        with pytest.raises(Busy, match="restoring a VM named other"):
            await peer_commands._new_place(site.agents["a"], "b", {"vm": "other", "job": "2e" * 16})
    finally:
        back.ended.set()
        del site.agents["a"].restores._jobs["other"]


async def test_a_guest_that_lacks_pages_of_a_restore_is_not_rescued(make_site: MakeSite) -> None:
    """A throw-away tool would start it without them."""
    site = await make_site()
    back = restored(site, "g", RestoreLog().with_fact(F.WANTED).with_fact(F.RAN))
    try:
        with pytest.raises(Busy, match="is being restored"):
            async with rescue_commands.at_work(site.agents["a"], "g"):
                pass
    finally:
        back.ended.set()
        del site.agents["a"].restores._jobs["g"]


@pytest.mark.proves("S96", "S114")
async def test_nobody_changes_what_a_guest_writes_to_while_it_is_on_its_way(make_site: MakeSite) -> None:
    """A nightly backup's snapshot: the guest would write to the overlay, and the destination open the base."""
    site = await make_site("7.2")
    site.director.change("a", dirty=True)
    overlay = site.directory / "overlay.qcow2"
    overlay.touch()
    data = {"node-name": "disk0", "snapshot-file": str(overlay), "snapshot-node-name": "o", "mode": "existing"}
    async with monitor_of(site) as (client, _):
        wanted = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
        await client.execute("migrate-set-capabilities", wanted)
        await client.execute("migrate", {"uri": "vmferry:b"})
        await site.noted_by("a", Fact.SETUP_DONE)
        for command, arguments in (
            ("blockdev-snapshot-sync", data),
            ("transaction", {"actions": [{"type": "blockdev-snapshot-sync", "data": data}]}),
            ("blockdev-change-medium", {"id": "cd", "filename": "/x.iso"}),
            ("human-monitor-command", {"command-line": f"snapshot_blkdev disk0 {overlay}"}),
            ("human-monitor-command", {"command-line": "block_job_complete backup"}),
            ("job-complete", {"id": "backup"}),
            ("job-finalize", {"id": "backup"}),
            ("a-command-of-a-qemu-to-come", {}),
        ):
            assert "on its way to b" in await refused(client, command, arguments), command
        assert "found" in await refused(client, "job-dismiss", {"id": "backup"}), "a client's own job is not held"
        await client.execute("migrate_cancel")
        await site.settle()
        assert "found" in await refused(client, "job-complete", {"id": "backup"}), "and afterwards nothing is"
    await site.check("a")


@pytest.mark.parametrize("verb", ["cancel", "complete", "pause", "resume", "set-speed", "finalize", "dismiss"])
async def test_a_block_job_of_vmferrys_is_nobodys_to_lead(make_site: MakeSite, verb: str) -> None:
    site = await make_site()
    async with monitor_of(site) as (client, _):
        said = await refused(client, f"block-job-{verb}", {"device": "vmferry-9a-disk0"})
        assert "vmferry-9a-disk0 is vmferry's own" in said
        if verb != "set-speed":
            assert "vmferry's own" in await refused(client, f"job-{verb}", {"id": "vmferry-9a-disk0"})
    await site.check("a")


@pytest.mark.proves("S79", "S114")
async def test_a_command_that_waited_for_its_turn_is_judged_when_it_comes(make_site: MakeSite) -> None:
    """1. a client's command takes its time in QEMU  2. `quit` of another one waits for its turn  3. the guest is
    migrated  4. the turn comes: the guest is on its way by then."""
    site = await make_site()
    monitor = site.agents["a"].monitors._open["g"]
    async with monitor._turn:  # another client's
        asked = [
            asyncio.create_task(monitor._answer(cast("Any", None), Command(name, arguments)))
            for name, arguments in (("quit", {}), ("job-finalize", {"id": "backup"}))
        ]
        await asyncio.sleep(0)  # each of them comes to where it waits
        attempt = await site.migrate(auto_finalize=False)
        assert not any(each.done() for each in asked), "they were accepted, and wait"
        await site.until_row(attempt, "M-hold")
    for each in asked:
        with pytest.raises(Busy, match="on its way to b"):
            await each
    await site.command("a", "job-finalize", id=attempt.job)
    await site.settle()
    await site.check("b")


@pytest.mark.proves("S79", "S114")
async def test_what_a_person_holds_against_an_operation_holds_in_a_monitor_too(make_site: MakeSite) -> None:
    site = await make_site()
    snapshot = {"actions": [{"type": "blockdev-snapshot-sync", "data": {"node-name": "disk0", "snapshot-file": "/x"}}]}
    cases: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "stop": [("quit", {}), ("system_powerdown", {}), ("human-monitor-command", {"command-line": "q"})],
        "snapshot": [
            ("snapshot-save", {}), ("blockdev-snapshot-sync", {}), ("transaction", snapshot),
            ("human-monitor-command", {"command-line": "savevm monday"}),
        ],
    }  # fmt: skip
    async with monitor_of(site) as (client, _):
        for operation, commands in cases.items():
            held = {"vm": "g", "name": "audit", "operation": operation, "reason": "the auditors are in"}
            await site.command("a", "blocker-add", **held)
            for command, arguments in commands:
                said = await refused(client, command, arguments)
                assert f"{operation} is blocked by audit: the auditors are in" in said, (command, said)
            await site.command("a", "blocker-remove", vm="g", name="audit")
        assert "not been found" in await refused(client, "snapshot-save"), "QEMU's own word: it is asked now"
        await site.command("a", "blocker-add", vm="g", name="audit", operation="stop", reason="the auditors are in")
        await client.execute("stop")
        await client.execute("cont")
    await site.check("a")
