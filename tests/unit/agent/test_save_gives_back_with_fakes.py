"""Saves of a real agent with fake QEMUs: the guest comes before the store, and before whatever went wrong."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.save_sites import (
    PRECOPY,
    begin,
    begin_h,
    check_guest_runs,
    check_snapshot,
    ended,
    save,
    until_fact,
    with_disk,
)
from vmferry import limits
from vmferry.agent.machine import Machine
from vmferry.agent.snapshot_sink import SnapshotSink
from vmferry.agent.snapshot_store import SnapshotStore
from vmferry.core.saving import SaveFact
from vmferry.errors import QemuError, Unfit
from vmferry.jobs.journal import Entry
from vmferry.store.errors import StorePermanent, StoreTransient
from vmferry.store.repository import Repository
from vmferry.store.writer import SnapshotWriter
from vmferry.testing.failing_store import Call, FailingStore, Fault
from vmferry.testing.fake_site import SETTLE_S, MakeSite

F = SaveFact


async def test_a_clean_up_that_hangs_keeps_no_guest_waiting(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SAVE_CLEAN_UP_S", 0.05)
    site = await make_site()
    go = threading.Event()
    abort = SnapshotSink.abort

    def hanging(self: SnapshotSink) -> None:
        go.wait()
        abort(self)

    def full(self: SnapshotSink, *arguments: Any) -> None:
        raise StorePermanent("the disk is full")

    with monkeypatch.context() as context:
        context.setattr(SnapshotSink, "abort", hanging)
        context.setattr(SnapshotSink, "put", full)
        job = await begin(site, **PRECOPY)
        assert (await ended(job))["outcome"] == "none"
        await check_guest_runs(site)
        go.set()
        assert job._cleaning is not None
        await job._cleaning


async def test_a_guest_comes_back_although_all_threads_of_the_store_are_busy(make_site: MakeSite) -> None:
    """The nightly save of many: the commits of the first ones keep no other guest waiting."""
    site = await make_site()
    site.director.script("a", {"device": "hold"})
    job = await begin(site, **PRECOPY)
    await site.director.reached("a", "device")
    go, store = threading.Event(), site.agents["a"].snapshot_store
    busy = [asyncio.ensure_future(store.run(go.wait)) for _ in range(limits.SNAPSHOT_THREADS_MAX)]
    site.director.go("a", "device")
    await until_fact(site, job, F.RESUMED)
    assert F.KEPT not in job.facts
    go.set()
    await asyncio.gather(*busy)
    assert (await ended(job))["outcome"] == "saved"


@pytest.mark.proves("S12")
async def test_with_pause_a_commit_that_hangs_can_be_cancelled(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    going, go, commit = threading.Event(), threading.Event(), SnapshotSink.commit

    def hanging(self: SnapshotSink, *arguments: Any) -> Any:
        going.set()
        go.wait()
        return commit(self, *arguments)

    monkeypatch.setattr(SnapshotSink, "commit", hanging)
    job = await begin(site, pause=True)
    async with asyncio.timeout(SETTLE_S):
        await site.agents["a"].snapshot_store.run(going.wait)
    await site.command("a", "job-cancel", id=job.job)
    wire = await ended(job)
    assert (wire["outcome"], wire["status"], wire["error"]["code"]) == ("unknown", "cancelled", "cancelled")
    assert "not known" in wire["sentence"]
    await check_guest_runs(site)
    go.set()


async def test_a_defect_leaves_no_guest_standing(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()

    def broken(self: SnapshotSink, *arguments: Any) -> Any:
        raise KeyError("no such page")

    monkeypatch.setattr(SnapshotSink, "commit", broken)
    wire = await save(site, pause=True)
    assert "defect" in wire["error"]["message"]
    assert "no such page" in wire["error"]["message"]
    await check_guest_runs(site)


async def test_a_guest_that_was_not_started_is_not_told_as_resumed(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SAVE_RETURN_S", 0.1)
    site = await make_site()
    site.director.script("a", cont='Failed to get "write" lock')
    job = await begin(site, **PRECOPY)
    wire = await ended(job)
    assert F.RESUMED not in job.facts
    assert F.HELD in job.facts
    assert (wire["outcome"], wire["error"]["code"]) == ("saved", "held")
    assert "stands still" in wire["sentence"]
    assert "rescue g" in wire["sentence"], "and what can be done"


async def test_a_commit_whose_answer_is_lost_is_looked_for(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    commit, there = SnapshotWriter.commit, False

    def lost(self: SnapshotWriter, *arguments: Any, **more: Any) -> Any:
        self.may_be_there = True
        if there:
            commit(self, *arguments, **more)
        raise StoreTransient("no answer")

    with monkeypatch.context() as context:
        context.setattr(SnapshotWriter, "commit", lost)
        wire = await save(site)
        assert (wire["outcome"], wire["error"]["message"]) == ("unknown", "no answer")
        assert "not known" in wire["sentence"]
        there = True
        wire = await save(site, "two")
        assert (wire["outcome"], wire["error"]) == ("saved", None)
    await check_guest_runs(site)


async def test_a_commit_that_did_not_come_to_its_manifest_is_known_not_to_be_there(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    put_new = Repository.put_new

    def away(self: Repository, name: str, data: bytes) -> None:
        if name.startswith("packs/"):
            raise StoreTransient("no answer")
        put_new(self, name, data)

    with monkeypatch.context() as context:
        context.setattr(Repository, "put_new", away)
        wire = await save(site)
    assert (wire["outcome"], wire["error"]["message"]) == ("none", "no answer")
    assert "not known" not in wire["sentence"]
    await check_guest_runs(site)
    assert (await site.command("a", "snapshots"))["snapshots"] == []


@pytest.mark.parametrize(
    ("faults", "outcome"),
    [
        ({"put snapshots/": [Fault.FULL]}, "none"),
        ({"put snapshots/": [Fault.REFUSED, Fault.DENIED]}, "unknown"),
        (
            {"put snapshots/": [Fault.ANSWER_LOST, Fault.DENIED], "then list snapshots/": [Fault.DENIED]},
            "unknown",
        ),
        ({"put snapshots/": [Fault.ANSWER_LOST, Fault.DENIED]}, "saved"),
        ({"put snapshots/": [Fault.ANSWER_LOST], "get snapshots/": [Fault.DENIED]}, "saved"),
        ({"then size locks/": [Fault.DENIED]}, "saved"),
        ({"size locks/": [Fault.DENIED]}, "none"),
    ],
)
async def test_a_commit_that_may_have_been_carried_out_is_never_told_as_not_there(
    make_site: MakeSite, faults: dict[str, list[Fault]], outcome: str
) -> None:
    """`then`: after the first put of the manifest."""
    site = await make_site()
    then = ""
    found = site.agents["a"].snapshot_store.open_repository()

    def fault_of(call: Call) -> Fault | None:
        nonlocal then
        kind = f"{call.method} {call.name.split('/')[0]}/"
        left = faults.get(then + kind) or faults.get(kind)
        then = "then " if kind == "put snapshots/" else then
        return left.pop(0) if left else None

    found.backend = FailingStore(found.backend, fault_of)
    wire = await save(site)
    assert wire["outcome"] == outcome
    assert ("It is not known whether" in wire["sentence"]) is (outcome == "unknown")
    assert (wire["error"] is None) is (outcome == "saved")
    assert not any(faults.values()), "each was met"
    await check_guest_runs(site)


@pytest.mark.proves("S105")
async def test_the_event_loop_never_waits_for_a_repository_that_is_opened(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    store: SnapshotStore = site.agents["a"].snapshot_store
    going, go = threading.Event(), threading.Event()

    def opening(self: SnapshotStore) -> None:
        going.set()
        go.wait()
        raise StorePermanent("no store")

    monkeypatch.setattr(SnapshotStore, "_open_backend", opening)
    first = asyncio.ensure_future(store.run(store.open_repository))
    await store.run(going.wait)
    assert await store.run(lambda: 3) == 3, "another thread of the store is at once at work"
    go.set()
    with pytest.raises(StorePermanent):
        await first


async def test_a_put_that_hangs_when_the_guest_stops_does_not_keep_it_waiting(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a pack is being put  2. QEMU stops its guest and sends the last pages  3. these are set aside."""
    monkeypatch.setattr(limits, "SAVE_QUEUE_BYTES", 0)
    site = await make_site()
    go, put_some = threading.Event(), SnapshotWriter.put_some

    def hanging(self: SnapshotWriter, *arguments: Any) -> None:
        go.wait()
        put_some(self, *arguments)

    monkeypatch.setattr(SnapshotWriter, "put_some", hanging)
    job = await begin(site, **PRECOPY)
    await until_fact(site, job, F.RESUMED)
    assert F.KEPT not in job.facts
    go.set()
    assert (await ended(job))["outcome"] == "saved"
    check_snapshot(site, "one", way="precopy")


# --- which files a guest goes on in ---------------------------------------------------------------------------


async def test_a_transaction_whose_answer_was_lost_is_asked_for_before_the_end(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. the transaction is sent  2. its answer is lost  3. the guest goes on in the new file."""
    site, _ = await with_disk(make_site)
    execute, silent, is_sent = Machine.execute, 2, False

    async def losing(self: Machine, command: str, *arguments: Any, **more: Any) -> Any:
        nonlocal silent, is_sent
        answer = await execute(self, command, *arguments, **more)
        is_sent = is_sent or command == "transaction"
        if command == "transaction" or (command == "query-block" and is_sent and silent):
            silent -= command == "query-block"
            raise QemuError("no answer in time")
        return answer

    monkeypatch.setattr(Machine, "execute", losing)
    wire = await ended(await begin_h(site))
    assert (wire["outcome"], silent) == ("none", 0)
    over = str(site.directory / "h-disk0.one.qcow2")
    assert site.agents["a"].vms["h"].definition.writable_paths() == (over,)
    assert any(over in note for note in wire["notes"])
    await site.restart("a")
    assert site.agents["a"].vms["h"].definition.writable_paths() == (over,), "and durably"
    await site.check("a", "h")


async def test_a_definition_that_cannot_be_written_down_is_written_again(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _ = await with_disk(make_site)
    journal, refused = site.agents["a"].journal, 0
    append = journal.append

    async def appending(kind: Entry, subject: str, body: Any = None) -> None:
        nonlocal refused
        if kind is Entry.KEPT and refused < 2:
            refused += 1
            raise Unfit("the disk is full")
        await append(kind, subject, body)

    monkeypatch.setattr(journal, "append", appending)
    assert (await ended(await begin_h(site)))["outcome"] == "saved"
    await site.restart("a")
    over = str(site.directory / "h-disk0.one.qcow2")
    assert site.agents["a"].vms["h"].definition.writable_paths() == (over,)
