"""One restore at work, with a QEMU, a feed and an agent that are values: how it can end, and what is told of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.restore_beds import BLOCKS, LINES, Bed, FakeFeed, until_true, use_fakes
from vmferry.agent.restore_feed import block_objection
from vmferry.agent.restores import _info
from vmferry.agent.restoring import trouble_text
from vmferry.core import restore as core
from vmferry.core.facts import Fact
from vmferry.core.job import JobStatus
from vmferry.core.restore import RestoreFact as F
from vmferry.engine.frozen import FrozenDisk
from vmferry.errors import QemuError, RepositoryError
from vmferry.jobs.journal import Entry
from vmferry.qmp.errors import QmpCommandError
from vmferry.store.manifest import Block


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch)


@pytest.mark.proves("S39")
async def test_a_lazy_restore_starts_the_guest_when_the_journal_keeps_it(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin()
    feed = await bed.feed()
    assert "cont" not in bed.qemu.told
    bed.qemu.state = "paused"
    feed.say(facts={Fact.PACKAGE_LOADED})
    await bed.until(F.RAN)
    job = bed.attempt.job
    assert bed.agent.entries == [
        (Entry.IMAGE_MADE, job), (Entry.KEPT, "web1"), (Entry.STARTING, job), (Entry.RAN, job),
    ]  # fmt: skip
    assert bed.agent.vms["web1"].machine is bed.qemu
    feed.say(facts={Fact.PEER_ACK})
    ended = await bed.end()
    assert (ended["detail"], ended["state"], ended["error"], ended["resumed_s"]) == (
        "completed",
        "concluded",
        None,
        1.0,
    )
    assert bed.overlay.exists()


async def test_a_full_restore_starts_nothing_before_all_is_there(tmp_path: Path) -> None:
    bed = Bed(tmp_path, lazy=False)
    bed.begin()
    feed = await bed.feed()
    bed.qemu.state = "paused"
    feed.say(facts={Fact.SETUP_DONE})
    assert {kind for kind, _ in bed.agent.entries} == {Entry.IMAGE_MADE}
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"
    assert bed.qemu.told.index("migrate-incoming") < bed.qemu.told.index("cont")


async def test_a_guest_that_is_to_stay_paused_is_not_started(tmp_path: Path) -> None:
    bed = Bed(tmp_path, runs=False)
    bed.begin()
    bed.qemu.state = "paused"
    (await bed.feed()).say(facts={Fact.PACKAGE_LOADED, Fact.PEER_ACK})
    ended = await bed.end()
    assert "cont" not in bed.qemu.told
    assert (ended["detail"], ended["resume_ms"]) == ("completed", None)


@pytest.mark.parametrize("error", [RepositoryError("packs/x is damaged", retry="no"), OSError("no room")])
async def test_a_snapshot_that_cannot_be_read_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    bed = Bed(tmp_path)
    bed.agent.reading.set_exception(error)
    bed.begin(read=False)
    ended = await bed.end()
    assert (ended["detail"], str(error) in ended["error"]["message"]) == ("failed", True)
    assert bed.is_nothing_left()
    assert "migrate-incoming" not in bed.qemu.told


async def test_a_qemu_with_other_memory_gets_nothing(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.opened.reader.head.blocks = [*BLOCKS, Block("vga", 4096)]  # type: ignore[misc]
    bed.begin()
    assert "vga" in (await bed.end())["error"]["message"]
    assert bed.is_nothing_left()
    assert "migrate-incoming" not in bed.qemu.told


async def test_an_image_that_is_changed_after_the_command_looked_ends_the_restore(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    stored = FrozenDisk(path="/nowhere/a.img", format="raw", way="external-snapshot", size_bytes=1, mtime_ns=2)
    bed.opened.disks = (stored,)
    bed.begin()
    ended = await bed.end()
    assert "/nowhere/a.img of the snapshot is not there" in ended["error"]["message"]
    assert bed.is_nothing_left()
    assert not FakeFeed.made


@pytest.mark.proves("S12")
async def test_a_cancel_does_not_wait_for_the_repository(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin(read=False)
    await until_true(lambda: bed.qemu.is_launched)
    bed.attempt.note(F.CANCEL)
    ended = await bed.end()
    assert (ended["detail"], ended["error"]) == ("cancelled", None)
    assert bed.is_nothing_left()


@pytest.mark.proves("S115")
async def test_a_qemu_that_does_not_take_the_guest_is_told_in_its_own_words(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin()
    (await bed.feed()).say(failed=RepositoryError("QEMU did not take it"))
    assert "its last words" in (await bed.end())["error"]["message"]
    assert bed.is_nothing_left()


async def test_a_cancel_is_offered_until_the_guest_may_have_run(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    feed = await bed.loaded()
    bed.agent.at_entry[Entry.STARTING] = lambda: offered.append(_info(bed.attempt).verbs)
    offered: list[list[str]] = []
    await bed.until(F.RAN)
    info = _info(bed.attempt)
    assert (info.status, info.verbs) == (JobStatus.RUNNING, [])
    assert offered == [["cancel"]]
    feed.say(facts={Fact.PEER_ACK})
    await bed.end()


@pytest.mark.proves("S58")
async def test_a_guest_that_qemu_cannot_start_stands_and_is_never_taken_away(tmp_path: Path) -> None:
    """`cont` that is refused may have been the second one, and the guest may have run."""
    bed = Bed(tmp_path)
    bed.qemu.refuses["cont"] = QmpCommandError("cont", "GenericError", "no lock", peer="QEMU")
    feed = await bed.loaded()
    await bed.until(F.STANDS)
    brief = bed.attempt.brief()
    assert (brief["state"], brief["detail"]) == ("paused", "standing")
    assert "no lock" in brief["reason"]
    assert "vmferry job resume" in brief["reason"]
    assert "web1" in bed.agent.vms, "people see it and can end it"
    assert core.cancel_refusal(bed.attempt.log) is not None
    assert _info(bed.attempt).verbs == ["resume"], "what would be refused is not offered"
    bed.attempt.note(F.AGAIN, round_no=1)  # what 'job resume' does
    await bed.until(F.RAN)
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"
    assert bed.overlay.exists()


async def test_a_guest_whose_order_to_run_took_effect_late_is_noticed(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.qemu.refuses["cont"] = QmpCommandError("cont", "GenericError", "no lock", peer="QEMU")
    feed = await bed.loaded()
    await bed.until(F.STANDS)
    bed.qemu.resume()
    await bed.until(F.RAN)
    feed.say(facts={Fact.PEER_ACK})
    await bed.end()
    assert bed.qemu.told.count("cont") == 1


@pytest.mark.parametrize("state", ["io-error", "internal-error", "guest-panicked", "paused"])
async def test_a_guest_that_ran_and_stopped_at_once_keeps_its_disk(tmp_path: Path, state: str) -> None:
    """1. cont  2. the guest's first write finds no room  3. query-status says io-error: that is a guest that ran."""
    bed = Bed(tmp_path)
    bed.qemu.state_after = state
    feed = await bed.loaded()
    await bed.until(F.RAN)
    assert state in bed.attempt.wire()["sentence"]
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"
    assert bed.overlay.exists()
    assert not bed.qemu.is_gone


async def test_a_cancel_that_comes_while_the_last_entry_is_written_is_obeyed(tmp_path: Path) -> None:
    """1. STARTING is being written  2. a cancel is accepted  3. no order to run is sent, and RENOUNCED says so before
    anything is taken away."""
    bed = Bed(tmp_path)
    bed.begin()
    bed.qemu.state = "paused"
    bed.agent.at_entry[Entry.STARTING] = lambda: bed.attempt.note(F.CANCEL)
    (await bed.feed()).say(facts={Fact.PACKAGE_LOADED})
    ended = await bed.end()
    assert ended["detail"] == "cancelled"
    assert "cont" not in bed.qemu.told
    kinds = [kind for kind, _ in bed.agent.entries]
    assert kinds[-3:] == [Entry.RENOUNCED, Entry.FORGOTTEN, Entry.ENDED]
    assert bed.is_nothing_left()


async def test_a_file_that_somebody_else_made_is_never_taken_away(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.overlay.write_text("the disk of another guest")
    bed.begin()
    ended = await bed.end()
    assert ended["detail"] == "failed"
    assert "cannot get its name" in ended["error"]["message"]
    assert bed.overlay.read_text() == "the disk of another guest"
    assert [name for name in os.listdir(tmp_path) if name.startswith("web1.qcow2")] == ["web1.qcow2"]


@pytest.mark.parametrize("error", [KeyError("a field"), ValueError("a state"), MemoryError()])
async def test_a_defect_before_the_guest_may_run_ends_the_restore(tmp_path: Path, error: Exception) -> None:
    bed = Bed(tmp_path)
    bed.qemu.refuses["migrate-incoming"] = error
    bed.begin()
    ended = await bed.end()
    assert ended["detail"] == "failed"
    assert "a defect of vmferry" in ended["error"]["message"]
    assert bed.is_nothing_left()


async def test_a_defect_after_the_guest_may_run_is_told_and_leaves_it_be(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.qemu.refuses["cont"] = KeyError("a field")
    feed = await bed.loaded()
    await bed.until(F.RAN)
    assert bed.attempt.error is not None
    assert "a defect" in bed.attempt.error.message
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"


async def test_a_cont_without_an_answer_is_tried_again_and_never_undone(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.begin()
    bed.qemu.state = "paused"
    bed.qemu.refuses["cont"] = QemuError("no answer")
    feed = await bed.feed()
    feed.say(facts={Fact.PACKAGE_LOADED})
    await bed.until(F.RAN)
    feed.say(facts={Fact.PEER_ACK})
    assert (await bed.end())["detail"] == "completed"
    assert bed.qemu.told.count("cont") == 2


@pytest.mark.parametrize("is_whole", [False, True], ids=["lacks-pages", "has-just-got-its-last"])
async def test_the_end_of_a_guest_that_ran_ends_its_restore_and_takes_nothing_away(
    tmp_path: Path, is_whole: bool
) -> None:
    """Nor is it told as a guest that is here, with an exit code of 0."""
    bed = Bed(tmp_path)
    await bed.ran()
    assert bed.qemu.on_gone is not None
    if is_whole:
        FakeFeed.made[0].say(facts={Fact.PEER_ACK})
    bed.qemu.on_gone()
    ended = await bed.end()
    assert (ended["detail"], ended["error"]["guest"]) == ("lost", "lost")
    assert "its QEMU ended" in ended["sentence"]
    assert bed.overlay.exists()
    assert bed.agent.gone == [bed.agent.vms["web1"]]


async def test_a_guest_that_a_person_stopped_does_not_come_back_with_the_end_of_its_restore(tmp_path: Path) -> None:
    """1. `vmferry stop` takes it out of the VMs  2. its restore, which waited for pages, hears that it is gone."""
    bed = Bed(tmp_path)
    await bed.ran()
    assert bed.qemu.on_gone is not None
    del bed.agent.vms["web1"]
    bed.qemu.on_gone()
    assert (await bed.end())["detail"] == "lost"
    assert bed.agent.vms == {}


@pytest.mark.proves("S93", "S94")
async def test_trouble_pauses_the_job_and_its_end_resumes_it(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    feed = await bed.ran()
    error = RepositoryError("packs/x is damaged", retry="no", hint="verify")
    feed.say(trouble=SimpleNamespace(error=error, guest_waits=True))
    brief = bed.attempt.brief()
    assert (brief["state"], brief["detail"]) == ("paused", "waiting")
    assert "packs/x" in brief["reason"]
    feed.say(trouble=None)
    assert bed.attempt.brief()["state"] == "running"
    feed.say(facts={Fact.PEER_ACK})
    await bed.end()
    states = [data["status"] for name, data in bed.agent.events if name == "JOB_STATUS_CHANGE"]
    assert states == ["created", "running", "paused", "running", "waiting", "pending", "concluded"]


@pytest.mark.parametrize(
    ("waits", "runs", "words"),
    [(True, True, "waits for one"), (False, True, "runs until"), (False, False, "has not begun")],
)
def test_what_trouble_means_for_the_guest(waits: bool, runs: bool, words: str) -> None:
    lost = trouble_text(RepositoryError("no answer", retry="yes"), guest_waits=waits, runs=runs)
    assert words in lost
    assert "again and again" in lost
    damaged = trouble_text(RepositoryError("bad", retry="no", hint="look"), guest_waits=waits, runs=runs)
    assert damaged.endswith("look")


def test_blocks_must_fit() -> None:
    assert block_objection(BLOCKS, LINES) == ""
    assert "room for" in block_objection([BLOCKS[0], Block("pc.bios", 1 << 19)], LINES)
    assert "pc.bios" in block_objection(BLOCKS[:1], LINES)
