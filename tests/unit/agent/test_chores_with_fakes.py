"""Jobs about the repository, of a real agent: verify, prune, export, import. No guest is touched by them."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.save_sites import KEPT, chore, chore_ended, names, repository, save
from vmferry import limits
from vmferry.agent import snapshot_files, snapshot_works
from vmferry.agent.chores import Watch
from vmferry.agent.snapshot_store import SnapshotStore
from vmferry.core.chores import ChoreFact
from vmferry.errors import Busy, CancelRefused, JobRefused, MigrationCancelled, Unfit, UnknownJob, UsageError, from_wire
from vmferry.jobs.journal import Entry
from vmferry.store import pins
from vmferry.store import verify as verifying
from vmferry.store.errors import PlanOutdated, RepositoryBusy, StoreTransient
from vmferry.store.pins import Pin
from vmferry.store.prune import plan_prune
from vmferry.store.repository import Repository
from vmferry.testing.failing_store import Call, FailingStore, Fault
from vmferry.testing.fake_site import SETTLE_S, MakeSite, Site

F = ChoreFact
JOB = "c" * 32
NO_GRACE = functools.partial(plan_prune, grace_s=-1e6)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects are old enough to go as soon as nobody needs them."""
    monkeypatch.setattr(snapshot_works, "plan_prune", NO_GRACE)


class Gate:
    """Holds a chore's thread at a step until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(SETTLE_S), "a test opens it"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Every chore stops there as it tells how far it is, for the first time with something to do."""
    made, tell = Gate(), Watch.tell

    def telling(self: Watch, done: int, whole: int) -> None:
        if whole and not made.opened.is_set():
            made.wait()
        tell(self, done, whole)

    monkeypatch.setattr(Watch, "tell", telling)
    yield made
    made.opened.set()


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(SETTLE_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def fact(site: Site, job: str, wanted: ChoreFact) -> Callable[[], bool]:
    def is_there() -> bool:
        found = site.agents["a"].chores.by_id(job)
        return found is not None and wanted in found.facts

    return is_there


async def begun(site: Site, command: str, **arguments: Any) -> str:
    return str((await site.command("a", command, job=JOB, **arguments))["job"])


async def listed(site: Site) -> list[tuple[str, str, str]]:
    found = await site.command("a", "query-jobs")
    return [(job["type"], job["status"], job["detail"]) for job in found]


def objects(site: Site) -> set[str]:
    """What the repository holds, but for locks."""
    return {
        entry.name for prefix in ("packs/", "index/", "snapshots/") for entry in repository(site).backend.list(prefix)
    }


# --- they are jobs as all others --------------------------------------------------------------------------------


@pytest.mark.proves("S95", "S105")
async def test_a_job_shows_how_far_it_is_and_its_result_stays_until_it_is_dismissed(
    make_site: MakeSite, gate: Gate
) -> None:
    site = await make_site()
    await save(site)
    job = await begun(site, "snapshot-verify", **KEPT)
    await until(gate.reached.is_set)
    (shown,) = await site.command("a", "query-jobs")
    assert (shown["id"], shown["type"], shown["status"]) == (job, "verify", "running")
    assert "cancel" in shown["verbs"]
    wire = await site.command("a", "job-status", job=job)
    assert (wire["over"], wire["outcome"], wire["progress"]["percent"]) == (False, "pending", 0)
    assert await site.command("a", "snapshot-verify", job=job) == wire, "asked twice it is one job"
    gate.opened.set()
    wire = await chore_ended(site, job)
    assert (wire["status"], wire["outcome"], wire["whole"], wire["error"]) == ("completed", "done", True, None)
    assert wire["progress"]["percent"] == 100
    assert [row["what"] for row in wire["timeline"]] == ["wanted", "begun", "done", "cleanup"]
    assert await listed(site) == [("verify", "concluded", "completed")]
    await site.restart("a")
    (shown,) = await site.command("a", "query-jobs")
    assert (shown["status"], shown["result"]) == ("concluded", wire)
    await site.command("a", "job-dismiss", id=job)
    assert await listed(site) == []
    with pytest.raises(UnknownJob):
        await site.command("a", "job-status", job=job)


@pytest.mark.usefixtures("gate")
async def test_verbs_that_a_job_does_not_take_are_refused(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    job = await begun(site, "snapshot-verify")
    for verb in ("pause", "resume", "complete", "finalize", "dismiss", "change"):
        with pytest.raises(JobRefused):
            await site.command("a", f"job-{verb}", id=job)
    for command, more in (("vm-save", {"vm": "g", "name": "x"}), ("vm-migrate", {"vm": "g", "destination": "b"})):
        with pytest.raises(UsageError, match="another job"):
            await site.command("a", command, job=job, **more)
    with pytest.raises(UsageError, match="32 hexadecimal"):
        await site.command("a", "snapshot-verify", job="../x")


async def test_too_many_at_once_are_refused(make_site: MakeSite, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    await save(site)
    monkeypatch.setattr(limits, "CHORES_MAX", 1)
    job = await begun(site, "snapshot-verify")
    with pytest.raises(Busy, match="on their way already"):
        await site.command("a", "snapshot-verify")
    gate.opened.set()
    await chore_ended(site, job)
    assert (await chore(site, "snapshot-verify"))["whole"]


@pytest.mark.parametrize("kind", ["verify", "export", "import"])
async def test_a_cancelled_one_leaves_nothing(make_site: MakeSite, gate: Gate, kind: str) -> None:
    site = await make_site()
    await save(site)
    file, given = site.directory / "one.stream", site.directory / "given.stream"
    if kind == "import":
        gate.opened.set()
        await chore(site, "snapshot-export", name="one", file=str(given))
        gate.opened.clear()
        gate.reached.clear()
    before = objects(site)
    arguments = {"export": {"name": "one", "file": str(file)}, "import": {"name": "two", "file": str(given)}}
    job = await begun(site, f"snapshot-{kind}", **arguments.get(kind, {}))
    await until(gate.reached.is_set)
    await site.command("a", "job-cancel", id=job)
    await site.command("a", "job-cancel", id=job)
    assert (await site.command("a", "job-status", job=job))["status"] == "cancelling"
    gate.opened.set()
    wire = await chore_ended(site, job)
    assert (wire["status"], wire["outcome"], wire["error"]["code"]) == ("cancelled", "none", "cancelled")
    assert sorted(each.name for each in site.directory.glob("*.stream*")) == (
        ["given.stream"] if kind == "import" else []
    )
    assert not list(site.directory.glob(".*"))
    assert objects(site) == before
    assert names(site) == ["one"]


async def test_what_is_being_kept_is_not_cancelled(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    await save(site)
    file = site.directory / "one.stream"
    await chore(site, "snapshot-export", name="one", file=str(file))
    made, no_return = Gate(), Watch.no_return

    def passing(self: Watch) -> None:
        no_return(self)
        made.wait()

    monkeypatch.setattr(Watch, "no_return", passing)
    job = await begun(site, "snapshot-import", name="two", file=str(file))
    await until(made.reached.is_set)
    found = site.agents["a"].chores.by_id(job)
    assert found is not None
    with pytest.raises(CancelRefused):  # also before the loop has heard that it is late
        found.cancel()
    await until(fact(site, job, F.WHOLE))
    with pytest.raises(JobRefused, match="being kept"):
        await site.command("a", "job-cancel", id=job)
    made.opened.set()
    assert (await chore_ended(site, job))["outcome"] == "done"
    assert names(site) == ["one", "two"]


# --- the agent ends on the way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["verify", "prune", "export", "import"])
async def test_one_whose_agent_ended_is_told_as_failed_and_nothing_is_left(
    make_site: MakeSite, gate: Gate, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The thread is one that never hears of it, as that of an agent that was killed."""
    site = await make_site()
    await save(site)
    file, given = site.directory / "one.stream", site.directory / "given.stream"
    gate.opened.set()
    await chore(site, "snapshot-export", name="one", file=str(given))
    gate.opened.clear()
    gate.reached.clear()
    arguments = {"export": {"name": "one", "file": str(file)}, "import": {"name": "two", "file": str(given)}}
    job = await begun(site, f"snapshot-{kind}", **arguments.get(kind, {}), **KEPT)
    await until(gate.reached.is_set)
    part = snapshot_files.part_of(file, job)
    assert part.exists() is (kind == "export")
    await site.restart("a")
    wire = await chore_ended(site, job)
    assert not part.exists()
    assert not file.exists()
    assert (wire["status"], wire["outcome"], wire["error"]["code"]) == ("failed", "none", "failed")
    assert "restarted" in wire["error"]["message"]
    assert (await listed(site)) == [(kind, "concluded", "failed")]
    gate.opened.set()
    assert names(site) == ["one"]
    assert (await chore(site, "snapshot-verify"))["whole"]


async def test_an_import_that_was_kept_before_its_agent_ended_is_told_as_done(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    await save(site)
    file = site.directory / "one.stream"
    await chore(site, "snapshot-export", name="one", file=str(file))
    made, loaded = Gate(), snapshot_files.loaded

    def held(*arguments: Any) -> dict[str, Any]:
        made.wait()
        return loaded(*arguments)

    with monkeypatch.context() as context:
        context.setattr(snapshot_files, "loaded", held)
        job = await begun(site, "snapshot-import", name="two", file=str(file), **KEPT)
        await until(made.reached.is_set)
        await site.stop("a")
    made.opened.set()
    await site.restart("a")
    wire = await chore_ended(site, job)
    assert (wire["status"], wire["outcome"], wire["error"]) == ("completed", "done", None)
    assert wire["snapshot"] in {info.snapshot for info in repository(site).snapshots()}
    assert names(site) == ["one", "two"]


async def test_an_import_of_which_nobody_can_say_whether_it_was_kept_is_told_so(
    make_site: MakeSite, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    await save(site)
    file = site.directory / "one.stream"
    gate.opened.set()
    await chore(site, "snapshot-export", name="one", file=str(file))
    gate.opened.clear()
    gate.reached.clear()
    job = await begun(site, "snapshot-import", name="two", file=str(file))
    await until(gate.reached.is_set)
    await site.stop("a")

    def away(store: SnapshotStore) -> Repository:
        raise StoreTransient("no answer")

    with monkeypatch.context() as context:
        context.setattr(SnapshotStore, "open_repository", away)
        await site.restart("a")
        wire = await chore_ended(site, job)
    assert wire["outcome"] == "none"
    assert "nobody knows: no answer" in wire["error"]["message"]
    assert "snapshots" in wire["error"]["hint"]


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"put": [Fault.FULL]}, "No space left"),
        ({"put": [Fault.REFUSED, Fault.DENIED]}, "whether two is there nobody knows: snapshots/"),
        (
            {"put": [Fault.ANSWER_LOST, Fault.DENIED], "list": [Fault.DENIED]},
            "whether two is there nobody knows: snapsh",
        ),
        ({"put": [Fault.ANSWER_LOST, Fault.DENIED]}, ""),
    ],
)
async def test_an_import_whose_commit_may_have_been_carried_out_is_never_told_as_not_kept(
    make_site: MakeSite, faults: dict[str, list[Fault]], words: str
) -> None:
    site = await make_site()
    await save(site)
    file = site.directory / "one.stream"
    await chore(site, "snapshot-export", name="one", file=str(file))
    found, is_put = repository(site), False

    def fault_of(call: Call) -> Fault | None:
        nonlocal is_put
        is_put = is_put or (call.method == "put" and call.name.startswith("snapshots/"))
        left = faults.get(call.method) if is_put and call.name.startswith("snapshots/") else None
        return left.pop(0) if left else None

    found.backend = FailingStore(found.backend, fault_of)
    job = await begun(site, "snapshot-import", name="two", file=str(file), **KEPT)
    wire = await chore_ended(site, job)
    assert not any(faults.values()), "each was met"
    assert wire["outcome"] == ("none" if words else "done")
    assert words in ("" if wire["error"] is None else wire["error"]["message"])
    assert (wire["error"] is None) is (not words)


# --- what goes wrong --------------------------------------------------------------------------------------------


async def test_a_defect_is_told_as_one_and_ends_the_job(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    await save(site)

    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("by nobody")

    monkeypatch.setattr(verifying, "verify", broken)
    wire = await chore_ended(site, await begun(site, "snapshot-verify", **KEPT))
    assert (wire["status"], wire["error"]["retry"]) == ("failed", "no")
    assert "a defect of vmferry" in wire["error"]["message"]
    assert await listed(site) == [("verify", "concluded", "failed")]


async def test_what_cannot_be_written_down_is_not_begun_and_an_end_is_written_until_it_is(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    await save(site)
    full: set[Entry] = {Entry.CHORE_WANTED}
    refused: list[Entry] = []
    journal = site.agents["a"].journal
    append = journal.append

    async def appending(kind: Entry, subject: str, body: dict[str, Any] | None = None) -> None:
        if kind in full:
            refused.append(kind)
            raise Unfit("no room")
        await append(kind, subject, body)

    monkeypatch.setattr(journal, "append", appending)
    with pytest.raises(Unfit):
        await begun(site, "snapshot-verify")
    assert await listed(site) == []
    full.clear()
    full.add(Entry.ENDED)
    job = await begun(site, "snapshot-verify")
    await until(lambda: len(refused) >= 3)
    assert not (await site.command("a", "job-status", job=job))["over"], "not before it is durable"
    full.clear()
    assert (await chore_ended(site, job))["outcome"] == "done"
    assert refused[0] is Entry.CHORE_WANTED
    assert set(refused[1:]) == {Entry.ENDED}


# --- plan, then do ----------------------------------------------------------------------------------------------


async def planned(site: Site, **more: Any) -> tuple[str, dict[str, Any]]:
    """A prune that shows its plan and waits."""
    job = await begun(site, "snapshot-prune", auto_finalize=False, **more)
    await until(fact(site, job, F.PLANNED))
    wire = dict(await site.command("a", "job-status", job=job))
    assert (wire["status"], wire["over"], wire["done"]) == ("planned", False, None)
    return job, wire["plan"]


@pytest.mark.usefixtures("at_once")
async def test_what_is_done_is_the_plan_that_was_shown(make_site: MakeSite) -> None:
    site = await make_site()
    wire = await save(site)
    await site.command("a", "snapshot-forget", name="one")
    before = objects(site)
    job, plan = await planned(site)
    assert plan["remove_packs"] == 1
    assert wire["stored_bytes"] <= plan["freed_bytes"]
    (shown,) = await site.command("a", "query-jobs")
    assert (shown["status"], shown["reason"]) == ("pending", "its plan waits for leave")
    assert {"finalize", "cancel"} <= set(shown["verbs"])
    assert objects(site) == before, "nothing is done before"
    await site.command("a", "job-finalize", id=job)
    done = await chore_ended(site, job)
    assert done["plan"] == plan
    assert done["done"]["removed"] == plan["remove_packs"] + plan["remove_indexes"] + plan["remove_leftovers"]
    assert done["done"]["removed_bytes"] == plan["freed_bytes"]
    assert objects(site) == set()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("what", ["saved", "forgotten", "pruned"])
async def test_a_plan_that_became_wrong_is_not_carried_out(make_site: MakeSite, what: str) -> None:
    site = await make_site()
    await save(site)
    await save(site, "two")
    await site.command("a", "snapshot-forget", name="one")
    (site.directory / "sa/repository/packs/aa").mkdir(exist_ok=True)
    repository(site).backend.put(f"packs/aa/{'a' * 32}", b"nobody's")
    job, plan = await planned(site)
    assert plan["remove_packs"] == 1
    if what == "saved":
        await save(site, "three")
    elif what == "forgotten":
        await site.command("a", "snapshot-forget", name="two")
    else:
        assert (await chore(site, "snapshot-prune"))["done"]["removed"]
    before = objects(site)
    await site.command("a", "job-finalize", id=job)
    wire = await chore_ended(site, job)
    assert (wire["outcome"], wire["done"]) == ("none", None)
    assert (wire["error"]["code"], wire["error"]["hint"]) == (PlanOutdated.code, PlanOutdated.default_hint)
    assert "not any more what the plan was made for" in wire["error"]["message"]
    assert objects(site) == before


@pytest.mark.usefixtures("at_once")
async def test_a_plan_is_given_up_by_a_cancel_and_by_time(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site()
    await save(site)
    await site.command("a", "snapshot-forget", name="one")
    before = objects(site)
    job, _ = await planned(site)
    await site.command("a", "job-cancel", id=job)
    with pytest.raises(MigrationCancelled):
        raise from_wire((await chore_ended(site, job))["error"])
    monkeypatch.setattr(limits, "PRUNE_HOLD_S", 0.01)
    with pytest.raises(Busy, match="nobody gave leave"):
        await chore(site, "snapshot-prune", auto_finalize=False)
    assert objects(site) == before


async def test_nothing_to_do_waits_for_nobody(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    wire = await chore(site, "snapshot-prune", auto_finalize=False)
    assert (wire["outcome"], wire["done"]) == ("done", None)
    wire = await chore(site, "snapshot-prune", auto_finalize=False, dry_run=True)
    assert (wire["outcome"], wire["done"]) == ("done", None)


# --- pins -------------------------------------------------------------------------------------------------------


def pin(site: Site, host: str, job: str) -> Pin:
    """A guest of that host needs the repository."""
    made = Pin(job, repository(site).snapshots()[0].snapshot, host, "web1")
    pins.put(repository(site), made)
    return made


async def test_pins_of_a_lost_host_are_part_of_the_plan(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    first, other = pin(site, "lost", "1" * 32), pin(site, "host-b", "2" * 32)
    job, plan = await planned(site, drop_pins="lost")
    assert [each["job"] for each in plan["drop_pins"]] == [first.job]
    assert pins.all_pins(repository(site)) == [first, other], "nothing is done before"
    await site.command("a", "job-finalize", id=job)
    wire = await chore_ended(site, job)
    assert [each["job"] for each in wire["dropped_pins"]] == [first.job]
    assert pins.all_pins(repository(site)) == [other]


@pytest.mark.usefixtures("at_once")
async def test_a_host_that_was_thought_lost_and_restores_again_keeps_its_pins(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    first = pin(site, "lost", "1" * 32)
    job, _ = await planned(site, drop_pins="lost")
    second = pin(site, "lost", "2" * 32)
    await site.command("a", "job-finalize", id=job)
    wire = await chore_ended(site, job)
    assert "it is not lost" in wire["error"]["message"]
    assert pins.all_pins(repository(site)) == [first, second]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("what", ["busy", "outdated", "another-guest", "free"])
async def test_pins_stay_when_a_prune_says_that_nothing_was_done(make_site: MakeSite, what: str) -> None:
    """They went before it was known whether anything may be done."""
    site = await make_site()
    await save(site)
    await save(site, "two")
    found = repository(site)
    found.backend.put(f"packs/aa/{'a' * 32}", b"nobody's")
    first = pin(site, "lost", "1" * 32)
    job, plan = await planned(site, drop_pins="lost")
    assert plan["remove_packs"] == 1
    lock = found.shared("a save") if what == "busy" else None
    if what == "outdated":
        found.backend.put(f"packs/bb/{'b' * 32}", b"nobody's")
    others = [pin(site, "host-b", "2" * 32)] if what == "another-guest" else []
    before = objects(site)
    await site.command("a", "job-finalize", id=job)
    wire = await chore_ended(site, job)
    if what == "free":
        assert (wire["error"], pins.all_pins(found), wire["done"]["removed"]) == (None, [], 1)
        return
    assert wire["error"] is not None
    assert pins.all_pins(found) == [first, *others]
    assert objects(site) == before
    if lock is not None:
        lock.release()


@pytest.mark.usefixtures("at_once")
async def test_a_guest_that_was_restored_since_the_plan_stops_it(make_site: MakeSite) -> None:
    site = await make_site()
    await save(site)
    await save(site, "two")
    repository(site).backend.put(f"packs/aa/{'a' * 32}", b"nobody's")
    job, _ = await planned(site)
    made = pin(site, "host-b", "2" * 32)
    before = objects(site)
    await site.command("a", "job-finalize", id=job)
    wire = await chore_ended(site, job)
    assert "web1 on host-b" in wire["error"]["message"]
    assert RepositoryBusy.code == wire["error"]["code"]
    assert objects(site) == before
    assert pins.all_pins(repository(site)) == [made]


@pytest.mark.parametrize("is_away", [False, True], ids=["at once", "after the store is back"])
async def test_an_agent_that_begins_drops_the_pins_of_restores_that_its_journal_says_are_over(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, is_away: bool
) -> None:
    """Of a restore that is not over, that the journal does not have, or that is another host's, the pin stays."""
    site = await make_site()
    await save(site)
    stale, unknown, theirs = pin(site, "a", "1" * 32), pin(site, "a", "2" * 32), pin(site, "b", "3" * 32)
    full = pin(site, "a", "4" * 32)
    journal = site.agents["a"].journal
    for made, is_lazy in ((stale, True), (theirs, True), (full, False)):
        await journal.append(Entry.RESTORE_WANTED, made.job, {"vm": "web1", "lazy": is_lazy})
        await journal.append(Entry.ENDED, made.job, {"vm": "web1", "status": "completed"})
    asked, all_pins = 0, pins.all_pins

    def failing(found: Repository) -> list[Pin]:
        nonlocal asked
        asked += 1
        if is_away and asked < 3:
            raise StoreTransient("no answer")
        return all_pins(found)

    monkeypatch.setattr(pins, "all_pins", failing)
    await site.restart("a")
    # It may be over before the agent's start is: then there is no task left to wait for.
    for task in [task for task in site.agents["a"]._tasks if task.get_name() == "drop-stale-pins"]:
        await asyncio.wait_for(asyncio.shield(task), SETTLE_S)
    assert all_pins(repository(site)) == [unknown, theirs, full]
    assert asked == (3 if is_away else 1)


async def test_an_agent_that_ended_no_lazy_restore_asks_no_repository(make_site: MakeSite) -> None:
    site = await make_site()
    await site.agents["a"].journal.append(Entry.RESTORE_WANTED, "1" * 32, {"vm": "web1", "lazy": False})
    await site.agents["a"].journal.append(Entry.ENDED, "1" * 32, {"vm": "web1", "status": "completed"})
    await site.restart("a")
    assert not [task for task in site.agents["a"]._tasks if task.get_name() == "drop-stale-pins"]
    assert not (site.directory / "sa/repository").exists()
