"""The journal: what it says after a restart, what it survives, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import Unfit
from vmferry.jobs import journal as journal_module
from vmferry.jobs.journal import Entry, Journal, Written, replay


def entries(*rows: tuple[Entry, str, dict[str, Any]]) -> list[Written]:
    return [Written(number, kind, subject, body) for number, (kind, subject, body) in enumerate(rows, 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


# --- replay, pure ---------------------------------------------------------------------------------------


def test_an_empty_journal_says_nothing() -> None:
    state = replay([])
    assert (state.vms, state.jobs) == ({}, {})


def test_vms_are_kept_until_they_are_forgotten_and_the_newest_definition_counts() -> None:
    state = replay(
        entries(
            (Entry.KEPT, "web1", {"generation": 1}),
            (Entry.KEPT, "web1", {"generation": 2}),
            (Entry.KEPT, "db1", {}),
            (Entry.FORGOTTEN, "db1", {}),
            (Entry.FORGOTTEN, "never-here", {}),
        )
    )
    assert state.vms == {"web1": {"generation": 2}}


def test_a_qemu_whose_guest_was_given_away_is_remembered_by_its_identity() -> None:
    identity = {"pid": 7, "started": 70}
    state = replay(
        entries(
            (Entry.KEPT, "web1", {}),
            (Entry.KEPT, "db1", {}),
            (Entry.FORGOTTEN, "web1", {"identity": identity}),
            (Entry.FORGOTTEN, "db1", {}),
        )
    )
    assert (state.vms, state.retired) == ({}, [identity])


def test_both_roles_of_a_job_are_told_apart() -> None:
    state = replay(entries((Entry.WANTED, "j1", {"vm": "web1"}), (Entry.PLACE_WANTED, "j2", {"vm": "db1"})))
    assert [(job.job, job.role, job.body["vm"]) for job in state.jobs.values()] == [
        ("j1", "source", "web1"),
        ("j2", "destination", "db1"),
    ]


def test_what_holds_of_a_job_is_a_matter_of_its_entries() -> None:
    first = replay(entries((Entry.WANTED, "j1", {}))).jobs["j1"]
    assert (first.cancel_wanted, first.committed_generation, first.renounced, first.ended) == (False, None, False, None)
    last = replay(
        entries(
            (Entry.WANTED, "j1", {}),
            (Entry.CANCEL_WANTED, "j1", {}),
            (Entry.COMMITTED, "j1", {"generation": 7}),
            (Entry.RENOUNCED, "j1", {}),
            (Entry.ENDED, "j1", {"outcome": "source"}),
        )
    ).jobs["j1"]
    assert (last.cancel_wanted, last.committed_generation, last.renounced) == (True, 7, True)
    assert last.ended == {"outcome": "source"}


def test_a_cancel_that_was_refused_after_all_is_none() -> None:
    rows = entries((Entry.WANTED, "j1", {}), (Entry.CANCEL_WANTED, "j1", {}), (Entry.CANCEL_REFUSED, "j1", {}))
    assert [replay(rows[:length]).jobs["j1"].cancel_wanted for length in (1, 2, 3)] == [False, True, False]


def test_a_switch_by_hand_and_the_first_value_of_each_option_are_remembered() -> None:
    state = replay(
        entries(
            (Entry.WANTED, "j1", {}),
            (Entry.POSTCOPY_WANTED, "j1", {}),
            (Entry.OPTIONS_BEFORE, "j1", {"downtime-limit": 123}),
            (Entry.OPTIONS_BEFORE, "j1", {"downtime-limit": 300, "max-bandwidth": 0}),
            (Entry.WANTED, "j2", {}),
        )
    )
    assert state.jobs["j1"].postcopy_wanted
    assert state.jobs["j1"].options_before == {"downtime-limit": 123, "max-bandwidth": 0}
    assert (state.jobs["j2"].postcopy_wanted, state.jobs["j2"].options_before) == (False, {})


def test_options_that_were_changed_on_the_way_are_the_jobs() -> None:
    wanted = {"options": {"downtime-limit": 1, "max-bandwidth": 2}}
    changes = [(Entry.OPTIONS, "j1", {"max-bandwidth": 3}), (Entry.OPTIONS, "j1", {"max-bandwidth": 4})]
    state = replay(
        entries((Entry.WANTED, "j1", wanted), *changes, (Entry.WANTED, "j2", {}), (Entry.OPTIONS, "j2", {"a": 1}))
    )
    assert state.jobs["j1"].body == {"options": {"downtime-limit": 1, "max-bandwidth": 4}}
    assert state.jobs["j2"].body == {"options": {"a": 1}}
    assert wanted["options"]["max-bandwidth"] == 2


def test_the_newest_policies_of_a_job_count() -> None:
    rows = entries((Entry.WANTED, "j1", {}), (Entry.POLICY, "j1", {"a": 1, "b": 1}), (Entry.POLICY, "j1", {"a": 2}))
    assert replay(rows).jobs["j1"].policy == {"a": 2, "b": 1}


def test_mirrors_and_the_images_that_a_job_made_are_remembered() -> None:
    state = replay(
        entries(
            (Entry.WANTED, "j1", {}), (Entry.MIRRORS, "j1", {"mode": "precopy"}),
            (Entry.PLACE_WANTED, "j2", {}), (Entry.IMAGE_MADE, "j2", {"/a": [1, 2]}),
            (Entry.IMAGE_MADE, "j2", {"/b": [1, 3]}),
        )
    )  # fmt: skip
    assert state.jobs["j1"].mirrors == {"mode": "precopy"}
    assert state.jobs["j2"].images == {"/a": [1, 2], "/b": [1, 3]}


def test_in_what_pages_a_restored_guests_qemu_has_its_memory_is_read_back() -> None:
    rows = entries(
        (Entry.RESTORE_WANTED, "j1", {}), (Entry.HOST_PAGES, "j1", {"ram": 2 << 20}), (Entry.WANTED, "j2", {})
    )
    jobs = replay(rows).jobs
    assert (jobs["j1"].host_pages, jobs["j2"].host_pages) == ({"ram": 2 << 20}, {})


@pytest.mark.proves("S114", "S123")
def test_what_guests_left_is_read_back_until_it_is_let_go() -> None:
    first, newer = {"job": "j1"}, {"job": "j2"}
    rows = [(Entry.LEFT, "/a.img", first), (Entry.LEFT, "/b.img", first), (Entry.LEFT, "/a.img", newer)]
    assert replay(entries(*rows)).left == {"/a.img": newer, "/b.img": first}
    assert replay(entries(*rows, (Entry.LET_GO, "/a.img", {}))).left == {"/b.img": first}


def test_a_dismissed_job_says_so_and_still_proves_what_it_proved() -> None:
    """A place that was not released asks whether it is wanted: what the job ended with answers that."""
    ended = (Entry.ENDED, "j1", {"outcome": "source"})
    state = replay(entries((Entry.WANTED, "j1", {}), ended, (Entry.DISMISSED, "j1", {}))).jobs["j1"]
    assert (state.dismissed, state.ended) == (True, {"outcome": "source"})


BEGINNINGS = (Entry.WANTED, Entry.PLACE_WANTED, Entry.SAVE_WANTED, Entry.RESTORE_WANTED, Entry.CHORE_WANTED)


def test_each_kind_of_job_has_a_beginning_of_its_own() -> None:
    roles = [replay(entries((kind, "j1", {"vm": "web1"}))).jobs["j1"].role for kind in BEGINNINGS]
    assert roles == ["source", "destination", "save", "restore", "chore"]


def test_a_save_is_read_back_and_kept_until_it_is_dismissed() -> None:
    body = {"vm": "web1", "auto_dismiss": False}
    state = replay(entries((Entry.SAVE_WANTED, "j1", body), (Entry.OPTIONS_BEFORE, "j1", {"events": True}))).jobs["j1"]
    assert (state.role, state.body, state.options_before) == ("save", body, {"events": True})


def test_entries_without_their_jobs_beginning_say_nothing() -> None:
    late = [(kind, "j1", {"generation": 1}) for kind in Entry if kind not in BEGINNINGS]
    assert replay(entries(*late)).jobs == {}


@pytest.mark.proves("S97")
def test_leave_and_pauses_are_read_back() -> None:
    wants = [(Entry.FINALIZE_WANTED, "j1", {}), (Entry.PAUSED, "j1", {"paused": True}), (Entry.TURNED_BACK, "j1", {})]
    state = replay(entries((Entry.WANTED, "j1", {}), *wants)).jobs["j1"]
    assert (state.finalize_wanted, state.paused, state.turned_back) == (True, True, True)
    over = (Entry.PAUSED, "j1", {"paused": False})
    assert not replay(entries((Entry.WANTED, "j1", {}), *wants, over)).jobs["j1"].paused


def test_the_newest_way_to_the_destination_is_read_back() -> None:
    ways = [(Entry.RECOVERY_WAY, "j1", {"ports": [port]}) for port in (4000, 4001)]
    assert replay(entries((Entry.WANTED, "j1", {}), *ways)).jobs["j1"].recovery_way == {"ports": [4001]}


def test_how_far_a_save_and_a_restore_may_have_gone_is_read_back() -> None:
    rows = entries(
        (Entry.SAVE_WANTED, "s1", {}), (Entry.SAVE_ACTS, "s1", {"did": "stop"}),
        (Entry.SAVE_ACTS, "s1", {"did": "send"}),
        (Entry.RESTORE_WANTED, "r1", {}), (Entry.STARTING, "r1", {}), (Entry.RAN, "r1", {}),
    )  # fmt: skip
    assert [replay(rows[:length]).jobs["s1"].did for length in (1, 2, 3)] == ["nothing", "stop", "send"]
    restores = [replay(rows[:length]).jobs["r1"] for length in (4, 5, 6)]
    assert [(job.starting, job.ran) for job in restores] == [(False, False), (True, False), (True, True)]


def test_whether_a_saves_commit_may_have_been_tried_is_read_back() -> None:
    rows = entries(
        (Entry.SAVE_WANTED, "s1", {}), (Entry.SAVE_ACTS, "s1", {"commits": True}),
        (Entry.SAVE_ACTS, "s1", {"halted": "guest-panicked"}),
    )  # fmt: skip
    assert [replay(rows[:length]).jobs["s1"].commits for length in (1, 2, 3)] == [False, True, True]


def test_why_a_job_was_fenced_is_read_back() -> None:
    rows = entries(
        (Entry.WANTED, "j1", {}), (Entry.FENCED, "j1", {"text": "the locks say so"}), (Entry.WANTED, "j2", {})
    )
    assert [replay(rows).jobs[job].fenced for job in ("j1", "j2")] == ["the locks say so", ""]


@given(
    st.lists(
        st.tuples(st.sampled_from(Entry), st.sampled_from(["a", "b"]), st.just({"generation": 1})),
        max_size=20,
    )
)
def test_any_prefix_of_any_journal_can_be_replayed(rows: list[tuple[Entry, str, dict[str, Any]]]) -> None:
    """An agent may die between any two entries."""
    for length in range(len(rows) + 1):
        state = replay(entries(*rows[:length]))
        assert all(job.role in ("source", "destination", "save", "restore", "chore") for job in state.jobs.values())


# --- on the disk ----------------------------------------------------------------------------------------


async def test_what_was_appended_is_read_back_in_order(path: Path) -> None:
    journal = Journal(path)
    await journal.append(Entry.WANTED, "j1", {"vm": "wéb1", "options": {"a": [1, 2]}})
    await journal.append(Entry.COMMITTED, "j1", {"generation": 2})
    await journal.append(Entry.DISMISSED, "j9")
    written = [(entry.kind, entry.subject, entry.body) for entry in journal.read()]
    journal.close()
    assert written == [
        (Entry.WANTED, "j1", {"vm": "wéb1", "options": {"a": [1, 2]}}),
        (Entry.COMMITTED, "j1", {"generation": 2}),
        (Entry.DISMISSED, "j9", {}),
    ]


async def test_appends_at_the_same_time_keep_their_order(path: Path) -> None:
    journal = Journal(path)
    await asyncio.gather(*(journal.append(Entry.KEPT, f"vm{n}", {"n": n}) for n in range(50)))
    assert [entry.body["n"] for entry in journal.read()] == list(range(50))
    journal.close()


CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from vmferry.jobs.journal import Entry, Journal

async def main():
    journal = Journal(Path(sys.argv[1]))
    await journal.append(Entry.COMMITTED, "j1", {"generation": 3})
    print("on the disk", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_an_entry_survives_a_kill_right_after_it(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "on the disk\n"
    journal = Journal(path)
    assert [(entry.kind, entry.body) for entry in journal.read()] == [(Entry.COMMITTED, {"generation": 3})]
    journal.close()


def test_a_second_agent_cannot_open_the_journal_of_a_live_one(path: Path) -> None:
    first = Journal(path)
    with pytest.raises(Unfit, match="cannot be used") as caught:
        Journal(path)
    assert "another agent" in caught.value.hint
    first.close()
    Journal(path).close()


def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(Unfit):
        Journal(path)
    assert path.read_bytes() == b"not a database" * 100


def test_a_damaged_journal_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(path).close()
    connect = sqlite3.connect

    class Damaged(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            return super().execute("SELECT 'page 3 is not right'" if "quick_check" in sql else sql, *parameters)

    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "factory": Damaged}))
    with pytest.raises(Unfit, match="page 3 is not right"):
        Journal(path)


async def test_a_full_disk_is_told_and_the_entry_is_not_there(path: Path) -> None:
    journal = Journal(path)
    await journal.append(Entry.WANTED, "j1")
    pages = journal._thread.submit(lambda: journal._db.execute("PRAGMA page_count").fetchone()[0]).result()
    journal._thread.submit(lambda: journal._db.execute(f"PRAGMA max_page_count={pages}").fetchall()).result()
    with pytest.raises(Unfit, match="cannot be written") as caught:
        await journal.append(Entry.COMMITTED, "j1", {"generation": 1, "padding": "x" * 100_000})
    assert caught.value.retry == "yes"
    assert [entry.kind for entry in journal.read()] == [Entry.WANTED]
    journal._thread.submit(lambda: journal._db.execute("PRAGMA max_page_count=100000").fetchall()).result()
    await journal.append(Entry.COMMITTED, "j1", {"generation": 1})
    assert len(journal.read()) == 2
    journal.close()


async def test_a_waiter_that_is_cancelled_leaves_a_whole_entry(path: Path) -> None:
    journal = Journal(path)
    is_cancelled = threading.Event()
    journal._thread.submit(is_cancelled.wait)  # the append is begun and cannot end before its waiter has gone
    task = asyncio.create_task(journal.append(Entry.KEPT, "web1", {"n": 1}))
    await asyncio.wait({asyncio.create_task(asyncio.sleep(0))})
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    is_cancelled.set()
    assert [entry.subject for entry in journal.read()] == ["web1"], "reads queue behind the append"
    journal.close()


async def test_at_the_start_what_nobody_needs_is_dropped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "KEEP_ENDED_JOBS", 2)
    journal = Journal(path)
    for generation in (1, 2):
        await journal.append(Entry.KEPT, "web1", {"generation": generation})
    for number in range(4):
        await journal.append(Entry.WANTED, f"j{number}")
        await journal.append(Entry.ENDED, f"j{number}", {})
    await journal.append(Entry.WANTED, "going-on")
    for job in ("kept", "read"):
        await journal.append(Entry.WANTED, job, {"auto_dismiss": False})
        await journal.append(Entry.ENDED, job, {})
    await journal.append(Entry.DISMISSED, "read")
    for number in (4, 5):
        await journal.append(Entry.WANTED, f"j{number}", {"auto_dismiss": True})
        await journal.append(Entry.ENDED, f"j{number}", {})
    before = replay(journal.read())
    journal.close()
    journal = Journal(path)
    left = journal.read()
    journal.close()
    assert [(entry.kind, entry.subject) for entry in left] == [
        (Entry.KEPT, "web1"),
        (Entry.WANTED, "going-on"),
        (Entry.WANTED, "kept"),
        (Entry.ENDED, "kept"),
        (Entry.WANTED, "j4"),
        (Entry.ENDED, "j4"),
        (Entry.WANTED, "j5"),
        (Entry.ENDED, "j5"),
    ], "two of the newest, and what waits to be dismissed"
    assert replay(left).vms == before.vms


async def test_a_save_of_which_copies_are_left_is_not_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New files in which a guest goes on are its own, and nobody looks for them in an old job."""
    monkeypatch.setattr(journal_module, "KEEP_ENDED_JOBS", 0)
    journal = Journal(path)
    bodies: dict[str, dict[str, Any]] = {
        "copies": {"copies": [{}]},
        "gone": {"copies": [{}]},
        "overlays": {"overlays": [{}]},
    }
    for job, body in bodies.items():
        await journal.append(Entry.SAVE_WANTED, job, {"auto_dismiss": True, **body})
        await journal.append(Entry.IMAGE_MADE, job, {"/a": [1, 2]})
        await journal.append(Entry.ENDED, job, {})
    await journal.append(Entry.IMAGES_GONE, "gone")
    journal.close()
    journal = Journal(path)
    jobs = replay(journal.read()).jobs
    journal.close()
    assert list(jobs) == ["copies"]


async def test_a_restore_of_which_disks_are_left_is_not_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "KEEP_ENDED_JOBS", 0)
    journal = Journal(path)
    for job in ("left", "gone", "without"):
        await journal.append(Entry.RESTORE_WANTED, job, {"auto_dismiss": True})
        if job != "without":
            await journal.append(Entry.IMAGE_MADE, job, {"/a": [1, 2]})
        await journal.append(Entry.ENDED, job, {})
    await journal.append(Entry.IMAGES_GONE, "gone")
    assert replay(journal.read()).jobs["gone"].images == {}
    await journal.append(Entry.PLACE_WANTED, "place")
    await journal.append(Entry.IMAGE_MADE, "place", {"/a": [1, 2]})
    await journal.append(Entry.ENDED, "place", {})
    journal.close()
    journal = Journal(path)
    jobs = replay(journal.read()).jobs
    journal.close()
    assert list(jobs) == ["left"]
    assert jobs["left"].images == {"/a": [1, 2]}


def test_the_folder_is_private(path: Path) -> None:
    Journal(path).close()
    assert os.stat(path.parent).st_mode & 0o777 == 0o700


@pytest.mark.proves("S79")
async def test_blockers_are_read_back_by_name_and_old_ones_dropped_at_the_start(path: Path) -> None:
    journal = Journal(path)
    await journal.append(Entry.KEPT, "web1", {})
    for reason in ("first", "second"):
        await journal.append(Entry.BLOCKED, "web1", {"name": "backup", "reason": reason})
    await journal.append(Entry.BLOCKED, "web1", {"name": "gone", "reason": "?"})
    await journal.append(Entry.UNBLOCKED, "web1", {"name": "gone"})
    await journal.append(Entry.UNBLOCKED, "web2", {"name": "never"})
    before = replay(journal.read()).blockers
    assert before["web1"] == {"backup": {"name": "backup", "reason": "second"}}
    journal.close()
    journal = Journal(path)
    left = journal.read()
    assert [entry.body.get("reason") for entry in left if entry.kind is Entry.BLOCKED] == ["second"]
    assert replay(left).blockers["web1"] == before["web1"]
    await journal.append(Entry.FORGOTTEN, "web1", {})
    assert "web1" not in replay(journal.read()).blockers
    journal.close()


async def test_chores_do_not_push_out_what_migrations_prove(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verify each hour is as many ended jobs in a week as an agent keeps."""
    monkeypatch.setattr(journal_module, "KEEP_ENDED_JOBS", 2)
    journal = Journal(path)
    await journal.append(Entry.WANTED, "moved")
    await journal.append(Entry.ENDED, "moved", {})
    for number in range(4):
        await journal.append(Entry.CHORE_WANTED, f"c{number}")
        await journal.append(Entry.ENDED, f"c{number}", {})
    journal.close()
    journal = Journal(path)
    left = replay(journal.read()).jobs
    journal.close()
    assert list(left) == ["moved", "c2", "c3"]
