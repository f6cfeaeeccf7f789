"""Saves of a real agent with fake QEMUs: what they never touch, and that a VM is not free before its end is durable."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.save_sites import PRECOPY, begin, check_guest_runs, ended, names, repository, save, with_disk
from vmferry import limits
from vmferry.agent.machine import Machine
from vmferry.agent.plan_disks import other_disks
from vmferry.agent.saves import why_not_ours
from vmferry.agent.snapshot_sink import SnapshotSink
from vmferry.agent.vms import KeptVm
from vmferry.agent.wants import SaveWanted
from vmferry.core.saving import SaveFact
from vmferry.errors import Busy, PlanRefused, RepositoryError, Unfit, UsageError
from vmferry.jobs.journal import Entry, JobState
from vmferry.qmp.errors import QmpCommandError
from vmferry.testing.fake_site import SETTLE_S, MakeSite, Site

F = SaveFact


def wanted_of(site: Site, **changed: Any) -> SaveWanted:
    kept = site.agents["a"].vms["g"]
    wanted = SaveWanted(
        job="old",
        vm="g",
        name="one",
        definition=kept.definition.to_wire(),
        generation=kept.generation,
        identity=dataclasses.asdict(kept.identity),
    )
    return dataclasses.replace(wanted, **changed)


async def test_whose_guest_it_is(make_site: MakeSite) -> None:
    site = await make_site()
    kept: KeptVm = site.agents["a"].vms["g"]
    wanted = wanted_of(site)
    this, over = JobState("old", "save", {"vm": "g"}), {"outcome": "none"}
    earlier, later = JobState("before", "source", {"vm": "g"}), JobState("after", "source", {"vm": "g"})
    earlier.ended = later.ended = over
    elsewhere = JobState("x", "source", {"vm": "h"})
    assert why_not_ours(wanted, kept, "old", [earlier, elsewhere, this, elsewhere]) == ""
    assert "not kept" in why_not_ours(wanted, None, "old", [this])
    assert "another QEMU" in why_not_ours(wanted_of(site, identity={"pid": 1}), kept, "old", [this])
    assert "elsewhere" in why_not_ours(wanted_of(site, generation=7), kept, "old", [this])
    assert "after" in why_not_ours(wanted, kept, "old", [this, later]), "the later job proves that this one was over"
    earlier.ended = None
    assert "before" in why_not_ours(wanted, kept, "old", [earlier, this])


@pytest.mark.parametrize(
    ("changed", "did", "acts"),
    [
        ({}, "nothing", False),
        ({"generation": 7}, "send", False),
        ({"identity": {"pid": 1, "start_time_ticks": 2, "boot_id": "x"}}, "send", False),
        ({"vm": "nobody"}, "send", False),
        ({}, "send", True),
        ({}, "stop", True),
    ],
)
async def test_the_next_agent_starts_only_a_guest_that_the_save_stopped(
    make_site: MakeSite, changed: dict[str, Any], did: str, acts: bool
) -> None:
    site = await make_site()
    wanted = wanted_of(site, **changed)
    journal = site.agents["a"].journal
    await journal.append(Entry.SAVE_WANTED, "old", msgspec.to_builtins(wanted))
    await journal.append(Entry.SAVE_ACTS, "old", {"did": did})
    await site.agents["a"].vms["g"].require_machine().execute("stop")
    for _ in range(2):
        await site.restart("a")
        again = site.agents["a"].saves.active(wanted.vm)
        if again is not None:
            await ended(again)
        assert bool(site.director.running("g")) is acts
        wire = site.agents["a"].saves.results["old"]
        assert (wire["over"], wire["outcome"]) == (True, "none")
    assert again is None, "its end is in the journal"


async def test_a_qemu_that_sends_already_is_refused(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()

    async def sending(self: Machine, **rest: Any) -> dict[str, Any]:
        return {"status": "active"}

    with monkeypatch.context() as context:
        context.setattr(Machine, "migration", sending)
        with pytest.raises(PlanRefused, match="sending or taking a guest already"):
            await site.command("a", "vm-save", vm="g", name="one")
    assert await site.command("a", "query-jobs") == []


async def test_a_foreign_migration_is_not_cancelled(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. the save is checked  2. somebody migrates by another monitor  3. QEMU refuses the save's `migrate`."""
    site = await make_site()
    execute, told = Machine.execute, list[str]()

    async def busy(self: Machine, command: str, arguments: Any = None, **rest: Any) -> Any:
        told.append(command)
        if command == "migrate":
            raise QmpCommandError("migrate", "GenericError", "a migration is in progress", peer="QEMU")
        if command == "query-migrate" and "migrate" in told:
            return {"status": "active"}
        return await execute(self, command, arguments, **rest)

    with monkeypatch.context() as context:
        context.setattr(Machine, "execute", busy)
        wire = await save(site, **PRECOPY)
    assert "in progress" in wire["error"]["message"]
    assert "migrate_cancel" not in told
    assert "cont" not in told
    await check_guest_runs(site)


async def test_a_vm_is_not_free_before_its_end_is_durable(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    journal, is_full, refused, again = site.agents["a"].journal, True, 0, asyncio.Event()
    append = journal.append

    async def appending(kind: Entry, subject: str, body: Any = None) -> None:
        nonlocal refused
        if kind is Entry.ENDED and is_full:
            refused += 1
            if refused == 2:
                again.set()
            raise Unfit("the disk is full")
        await append(kind, subject, body)

    monkeypatch.setattr(journal, "append", appending)
    job = await begin(site)
    async with asyncio.timeout(SETTLE_S):
        await again.wait()
    assert F.CLEANUP in job.facts
    with pytest.raises(Busy, match="being saved as one"):
        await site.command("a", "vm-save", vm="g", name="two")
    is_full = False
    assert (await ended(job))["outcome"] == "saved"
    assert names(site) == ["one"]
    await check_guest_runs(site)


async def test_a_job_id_is_used_once(make_site: MakeSite) -> None:
    site = await make_site()
    wire = await save(site, job="3e" * 16)
    with pytest.raises(UsageError, match="that of another job"):
        await site.command("a", "vm-migrate", vm="g", destination="b", job="3e" * 16)
    attempt = await site.migrate()
    with pytest.raises(UsageError, match="that of another job"):
        await site.command("a", "vm-save", vm="g", name="two", job=attempt.job)
    await site.until(lambda: attempt.ended.is_set())
    await site.settle()
    assert wire["job"] == "3e" * 16


async def test_setting_pages_aside_leaves_room_for_the_journal(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    monkeypatch.setattr(limits, "SAVE_SPILL_LEAVES_BYTES", 1 << 60)
    sink = SnapshotSink(repository(site), spill_folder=site.directory / "spill")
    sink.spill()
    with pytest.raises(RepositoryError, match="no room for the guest's last pages"):
        sink.put("pc.ram", np.arange(1), np.ones((1, 4096), np.uint8))
    sink.abort()


async def test_a_plan_refuses_a_definition_with_other_disks(make_site: MakeSite) -> None:
    """Its memory would run on the image of an instant that is long over."""
    site, image = await with_disk(make_site)
    kept = site.agents["a"].vms["h"]
    assert await other_disks(kept) == ()
    kept.definition = kept.definition.moved({str(image): str(image.with_name("old.img"))})
    (reason,) = await other_disks(kept)
    assert "old.img" in reason
