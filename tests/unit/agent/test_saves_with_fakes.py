"""Saves of a real agent with fake QEMUs: the snapshot, the guest, the job; and the commands on snapshots."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tests.save_sites import (
    HELD,
    KEPT,
    PRECOPY,
    begin,
    check_guest_runs,
    check_snapshot,
    chore,
    ended,
    names,
    repository,
    save,
    until_fact,
)
from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.core.saving import SaveFact
from vmferry.engine.frozen import SnapshotWords
from vmferry.errors import (
    Blocked,
    Busy,
    CancelRefused,
    JobRefused,
    PlanRefused,
    QemuError,
    RepositoryError,
    UsageError,
    VmferryError,
)
from vmferry.jobs.journal import Entry
from vmferry.store.errors import UnknownSnapshot
from vmferry.store.reader import SnapshotReader
from vmferry.testing import fake_stream
from vmferry.testing.fake_site import SETTLE_S, MakeSite

F = SaveFact

# --- the two ways ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "way"), [("7.2", "precopy"), ("11.1", "precopy"), ("11.1", "background")])
async def test_a_guest_is_saved_and_goes_on(make_site: MakeSite, version: str, way: str) -> None:
    site = await make_site(version)
    wire = await save(site, way=way)
    assert (wire["status"], wire["outcome"], wire["error"]) == ("completed", "saved", None)
    assert wire["way"] == way
    assert wire["downtime_ms"] is not None
    words = check_snapshot(site, "one", way=way)
    assert words.was_running
    assert words.qemu_version.startswith(version)
    await check_guest_runs(site)
    assert "saved as one" in wire["sentence"]
    whats = [row["what"] for row in wire["timeline"]]
    assert whats.index("STOP") < whats.index("whole") < whats.index("kept")
    if way == "precopy":
        assert whats.index("RESUME") < whats.index("kept"), "the commit does not keep the guest waiting"
    status = await site.command("a", "job-status", job=wire["job"])
    assert status == wire


async def test_in_the_background_where_it_can_be_had(make_site: MakeSite) -> None:
    site = await make_site()
    assert (await save(site))["way"] == "background"
    site.director.script("a", refuse={"background-snapshot": "no userfaultfd here"})
    assert (await save(site, "two"))["way"] == "precopy"
    wire = await save(site, "three", way="background")
    assert wire["error"]["code"] == "refused"
    assert "no userfaultfd here" in wire["error"]["message"]
    assert names(site) == ["one", "two"]
    await check_guest_runs(site)


async def test_not_in_the_background_where_a_break_would_hang_the_guest(make_site: MakeSite) -> None:
    site = await make_site("7.2")
    wire = await save(site, way="background")
    assert "hang for ever" in wire["error"]["message"]
    assert wire["error"]["code"] == "refused"
    assert (await save(site))["way"] == "precopy"
    await check_guest_runs(site)


async def test_a_guest_whose_writes_would_be_lost_is_saved_with_pause_only(make_site: MakeSite) -> None:
    site = await make_site("7.2")
    object.__setattr__(site.agents["a"].vms["g"].definition, "memory_bytes", 32 << 20)
    with pytest.raises(PlanRefused, match="loses writes") as caught:
        await site.command("a", "vm-save", vm="g", name="one")
    assert "--pause" in caught.value.hint
    assert (await save(site, pause=True))["outcome"] == "saved"


async def test_with_pause_the_guest_stands_until_its_snapshot_is_there(make_site: MakeSite) -> None:
    site = await make_site()
    wire = await save(site, pause=True)
    assert wire["way"] == "precopy"
    whats = [row["what"] for row in wire["timeline"]]
    assert whats.index("stopped") < whats.index("started")
    assert whats.index("kept") < whats.index("RESUME")
    assert check_snapshot(site, "one", way="precopy", run_state="paused").was_running
    await check_guest_runs(site)


async def test_a_paused_guest_stays_paused(make_site: MakeSite) -> None:
    """Not in the background: QEMU 7.2 would start it."""
    site = await make_site()
    machine = site.agents["a"].vms["g"].require_machine()
    await machine.execute("stop")
    with pytest.raises(PlanRefused, match="would start it"):
        await site.command("a", "vm-save", vm="g", name="one", way="background")
    wire = await save(site)
    assert (wire["outcome"], wire["way"]) == ("saved", "precopy")
    assert await machine.run_state() in ("paused", "postmigrate")
    assert site.director.running("g") == []
    assert not check_snapshot(site, "one", way="precopy", run_state="paused").was_running
    await machine.execute("cont")
    await check_guest_runs(site)


async def test_a_guest_that_writes_too_fast_is_stopped_for_the_rest(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SAVE_PASSES_MAX", 3)
    site = await make_site()
    site.director.change("a", dirty=True)
    job = await begin(site, **PRECOPY)
    await until_fact(site, job, F.STOPPED)
    site.director.change("a", dirty=False)
    assert (await ended(job))["outcome"] == "saved"
    await check_guest_runs(site)


async def test_a_save_says_that_the_one_before_is_damaged(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmferry.agent.snapshot_sink import SnapshotSink

    site = await make_site()
    assert (await save(site))["notes"] == []
    monkeypatch.setattr(SnapshotSink, "base_damage", property(lambda sink: "packs/aa is damaged"))
    (note,) = (await save(site, "two"))["notes"]
    assert "packs/aa is damaged" in note
    assert "vmferry verify" in note


async def test_a_second_save_of_a_guest_refers_to_the_first(make_site: MakeSite) -> None:
    site = await make_site()
    first = await save(site)
    second = await save(site, "two")
    assert second["stored_bytes"] == 0 < first["stored_bytes"]
    check_snapshot(site, "two", way="background")


# --- jobs -----------------------------------------------------------------------------------------------------


@pytest.mark.proves("S95")
async def test_the_job_is_listed_until_it_is_dismissed_also_by_the_next_agent(make_site: MakeSite) -> None:
    site = await make_site()
    wire = await save(site, **KEPT)
    for _ in range(2):
        (job,) = await site.command("a", "query-jobs")
        assert (job["id"], job["type"], job["status"], job["vm"]) == (wire["job"], "save", "concluded", "g")
        assert job["result"]["name"] == "one"
        assert (await site.command("a", "job-status", job=wire["job"]))["outcome"] == "saved"
        await site.restart("a")
    await site.command("a", "job-dismiss", id=wire["job"])
    assert await site.command("a", "query-jobs") == []
    await site.restart("a")
    assert await site.command("a", "query-jobs") == []
    assert names(site) == ["one"]


async def test_the_same_job_again_is_the_same_save(make_site: MakeSite) -> None:
    site = await make_site()
    wire = await save(site, job="3e" * 16)
    again = await site.command("a", "vm-save", vm="g", name="one", job="3e" * 16)
    assert again == wire


@pytest.mark.proves("S97")
async def test_it_waits_for_leave_with_the_guest_standing(make_site: MakeSite) -> None:
    site = await make_site()
    job = await begin(site, **HELD)
    await until_fact(site, job, F.STANDS)
    (shown,) = await site.command("a", "query-jobs")
    assert (shown["status"], shown["detail"]) == ("pending", "pre-switchover")
    assert "waits for leave" in shown["reason"]
    assert shown["guest-paused-ms"] >= 0
    assert set(shown["verbs"]) == {"cancel", "finalize"}
    assert "waits for leave" in job.wire()["sentence"]
    await site.command("a", "job-finalize", id=job.job)
    assert (await ended(job))["outcome"] == "saved"
    await check_guest_runs(site)


async def test_without_leave_it_goes_on_unsaved(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SAVE_HOLD_S", 0.05)
    site = await make_site()
    wire = await save(site, **HELD)
    assert "nobody gave leave" in wire["error"]["message"]
    assert names(site) == []
    await check_guest_runs(site)


@pytest.mark.parametrize(
    ("step", "more"),
    [
        ("setup", PRECOPY),
        ("active", {}),
        ("converge", PRECOPY),
        ("device", PRECOPY),
        ("instant", {}),
        ("completed", {}),
    ],
)
async def test_a_cancel_leaves_the_guest_running_and_nothing_kept(
    make_site: MakeSite, step: str, more: dict[str, Any]
) -> None:
    site = await make_site()
    site.director.script("a", {step: "hold"})
    job = await begin(site, **more)
    await site.director.reached("a", step)
    await site.command("a", "job-cancel", id=job.job)
    await site.command("a", "job-cancel", id=job.job)
    site.director.go("a", step)
    wire = await ended(job)
    assert (wire["status"], wire["outcome"], wire["error"]["code"]) == ("cancelled", "none", "cancelled")
    assert names(site) == []
    await check_guest_runs(site)
    site.director.script("a")
    assert (await save(site, **more))["outcome"] == "saved", "and the next one works"


async def test_a_cancel_that_comes_too_late_is_refused(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    going, go = asyncio.Event(), asyncio.Event()
    run = site.agents["a"].snapshot_store.run

    async def running(work: Any, *args: Any, **more: Any) -> Any:
        if getattr(work, "__name__", "") == "commit":
            going.set()
            await go.wait()
        return await run(work, *args, **more)

    monkeypatch.setattr(site.agents["a"].snapshot_store, "run", running)
    job = await begin(site)
    async with asyncio.timeout(SETTLE_S):
        await going.wait()
    with pytest.raises(CancelRefused, match="vmferry forget"):
        await site.command("a", "job-cancel", id=job.job)
    go.set()
    assert (await ended(job))["outcome"] == "saved"


async def test_a_cancel_that_became_too_late_while_it_was_written_is_refused_for_good(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. CANCEL_WANTED is being written  2. the commit is done  3. CANCEL_REFUSED, and the person hears so."""
    site = await make_site()
    journal = site.agents["a"].journal
    append, asked, go = journal.append, asyncio.Event(), asyncio.Event()

    async def appending(kind: Entry, subject: str, body: Any = None) -> None:
        if kind is Entry.CANCEL_WANTED:
            asked.set()
            await go.wait()
        await append(kind, subject, body)

    monkeypatch.setattr(journal, "append", appending)
    site.director.script("a", {"active": "hold"})
    job = await begin(site, **PRECOPY)
    await site.director.reached("a", "active")
    cancel = asyncio.create_task(site.command("a", "job-cancel", id=job.job))
    async with asyncio.timeout(SETTLE_S):
        await asked.wait()
    site.director.go("a", "active")
    assert (await ended(job))["outcome"] == "saved"
    go.set()
    with pytest.raises(CancelRefused, match="vmferry forget"):
        await cancel
    kinds = [each.kind for each in await asyncio.to_thread(journal.read) if each.subject == job.job]
    assert kinds[-2:] == [Entry.CANCEL_WANTED, Entry.CANCEL_REFUSED]
    await site.restart("a")
    known = site.agents["a"].saves.status(job=job.job)
    assert known is not None
    assert known["outcome"] == "saved"


async def test_verbs_that_a_save_does_not_take(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    job = await begin(site)
    for verb in ("pause", "resume", "complete", "finalize", "dismiss", "change"):
        with pytest.raises(JobRefused):
            await site.command("a", f"job-{verb}", id=job.job)
    site.director.go("a", "active")
    await ended(job)


# --- blockers -------------------------------------------------------------------------------------------------


@pytest.mark.proves("S79")
async def test_one_save_or_migration_at_a_time(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    job = await begin(site)
    with pytest.raises(Busy, match="being saved as one"):
        await site.command("a", "vm-save", vm="g", name="two")
    with pytest.raises(Busy, match="being saved as one"):
        await site.migrate()
    with pytest.raises(Busy, match="being saved as one"):
        await site.command("a", "vm-stop", vm="g", force=True)
    with pytest.raises(Busy, match="being saved"):
        await site.command("a", "rescue-throw-away", vm="g", never_ran=True)
    wire = await site.command("a", "vm-status", vm="g")
    assert {b["operation"] for b in wire["blockers"]} == {"migrate", "set", "stop", "snapshot"}
    site.director.go("a", "active")
    await ended(job)
    site.director.script("a")
    attempt = await site.migrate()
    with pytest.raises(Busy, match="on its way to b"):
        await site.command("a", "vm-save", vm="g", name="two")
    await site.until(lambda: attempt.ended.is_set())
    await site.settle()


@pytest.mark.proves("S79")
async def test_a_person_can_hold_a_blocker_against_it(make_site: MakeSite) -> None:
    site = await make_site()
    await site.command("a", "blocker-add", vm="g", name="no", operation="snapshot", reason="secrets")
    with pytest.raises(Blocked, match="secrets"):
        await site.command("a", "vm-save", vm="g", name="one")


# --- what is refused before anything happens ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"name": "a/b"}, UsageError, "no name of a snapshot"),
        ({"name": ""}, UsageError, "no name of a snapshot"),
        ({"way": "sideways"}, UsageError, "allowed: auto, precopy, background"),
        ({"disks": "copy"}, UsageError, "allowed: refuse, external-snapshot"),
        ({"way": "background", "pause": True}, PlanRefused, "stands anyway"),
        ({"way": "background", "auto-finalize": False}, PlanRefused, "wait for leave"),
    ],
)
async def test_wishes_that_are_refused(
    make_site: MakeSite, more: dict[str, Any], error: type[VmferryError], words: str
) -> None:
    site = await make_site()
    with pytest.raises(error, match=words):
        await site.command("a", "vm-save", **{"vm": "g", "name": "one", **more})
    assert await site.command("a", "query-jobs") == []
    await check_guest_runs(site)


async def test_a_name_that_exists_is_refused(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    with pytest.raises(RepositoryError, match="has a snapshot one already"):
        await site.command("a", "vm-save", vm="g", name="one")
    assert names(site) == ["one"]


async def test_a_guest_that_is_passed_a_device_is_refused(make_site: MakeSite) -> None:
    site = await make_site()
    kept = site.agents["a"].vms["g"]
    object.__setattr__(kept.definition, "has_vfio", True)
    with pytest.raises(PlanRefused, match="passed through"):
        await site.command("a", "vm-save", vm="g", name="one")


async def test_a_guest_that_is_gone_is_refused(make_site: MakeSite) -> None:
    site = await make_site()
    await site.director.kill(site.director.newest("a"))
    with pytest.raises(QemuError):
        await site.command("a", "vm-save", vm="g", name="one")


# --- the other commands ---------------------------------------------------------------------------------------


async def test_list_verify_forget_prune(make_site: MakeSite) -> None:
    site = await make_site()
    assert (await site.command("a", "snapshots"))["snapshots"] == []
    wire = await save(site)
    (listed,) = (await site.command("a", "snapshots"))["snapshots"]
    assert (listed["name"], listed["vm"], listed["pages"]) == ("one", "g", 68)
    assert (await chore(site, "snapshot-verify", name="one"))["whole"]
    with pytest.raises(UnknownSnapshot):
        await site.command("a", "snapshot-verify", name="nobody")
    with pytest.raises(UsageError):
        await chore(site, "snapshot-prune", empty_below=2.0)
    for pack in (site.directory / "sa/repository/packs").rglob("*"):
        if pack.is_file():
            pack.chmod(0o600)
            data = bytearray(pack.read_bytes())
            data[len(data) // 2] ^= 1
            pack.write_bytes(data)
    verdict = await chore(site, "snapshot-verify")
    assert not verdict["whole"]
    assert verdict["damaged_snapshots"] == ["one"]
    assert {name for problem in verdict["problems"] for name in problem["snapshots"]} == {"one"}
    assert (await site.command("a", "snapshot-forget", name=wire["snapshot"]))["name"] == "one"
    with pytest.raises(UnknownSnapshot):
        await site.command("a", "snapshot-forget", name="one")
    assert (await chore(site, "snapshot-prune"))["plan"]["too_young"] == 1


async def test_export_and_import_give_the_same_pages(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    file = site.directory / "one.stream"
    with pytest.raises(UsageError, match="not a whole path"):
        await chore(site, "snapshot-export", name="one", file="one.stream")
    wire = await chore(site, "snapshot-export", name="one", file=str(file))
    assert wire["bytes"] == file.stat().st_size
    assert file.stat().st_mode & 0o777 == 0o600, "a guest's memory has its keys"
    os.mkfifo(site.directory / "pipe")
    with pytest.raises(UsageError, match="no regular file"):
        await chore(site, "snapshot-import", name="pipe", file=str(site.directory / "pipe"))
    with pytest.raises(UsageError, match="cannot be written"):
        await chore(site, "snapshot-export", name="one", file=str(file))
    assert [each.name for each in site.directory.glob(".*.part")] == []
    back = await chore(site, "snapshot-import", name="two", file=str(file))
    assert back["stored_bytes"] == 0, "every page is known"
    with SnapshotReader(repository(site), back["snapshot"]) as reader:
        assert [page[0] for page in reader.read("pc.ram", 0, 64)] == [fake_stream.page(n)[0] for n in range(64)]
        words = SnapshotWords.from_wire(reader.head.metadata)
    assert (words.way, words.definition, words.machine) == ("import", None, "pc-q35-7.2")
    with pytest.raises(RepositoryError, match="already"):
        await chore(site, "snapshot-import", name="two", file=str(file))
    with pytest.raises(UsageError, match="cannot be read"):
        await chore(site, "snapshot-import", name="three", file=str(site.directory / "nowhere"))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(VmferryError):
        await chore(site, "snapshot-import", name="three", file=str(file))
    assert names(site) == ["one", "two"]


async def test_a_save_is_no_migration_to_those_who_look(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    assert (await site.command("a", "job-status", vm="g"))["status"] == "none"
    attempt = await site.migrate()
    await site.until(lambda: attempt.ended.is_set())
    await site.settle()
    assert Fact.RUN_ACKED in attempt.facts
    await site.check("b")


async def test_a_configured_repository_is_made_by_its_own_command(make_site: MakeSite, tmp_path: Path) -> None:
    """Not by a save: then a file system that is not mounted takes what nobody finds again."""
    place = tmp_path / "snapshots"
    site = await make_site("11.1", settings={"a": {"repository": str(place)}})
    for command, more in (("vm-save", {"vm": "g", "name": "one"}), ("snapshots", {})):
        with pytest.raises(RepositoryError, match=f"no repository in {place}"):
            await site.command("a", command, **more)
    assert not place.exists()
    assert await site.command("a", "query-jobs") == []
    wire = await site.command("a", "repository-init")
    assert (wire["created"], wire["encrypted"], wire["repository"]) == (True, False, str(place))
    assert not (await site.command("a", "repository-init"))["created"]
    assert (await save(site))["outcome"] == "saved"
