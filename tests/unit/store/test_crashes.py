"""A death at any step loses no finished snapshot, and leaves nothing that `prune` does not take away.

Exhaustive: the process dies before, after, and in the middle of each single call of the store, in a save, in a forget,
in a prune that empties packs, and in a rebuild. `killed.py` does the same with real processes and SIGKILL.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.store.conftest import ManualClock, Numbered, Store, memory, new_store, touched
from vmferry.errors import RepositoryError
from vmferry.limits import STORE_LOCK_STALE_S, STORE_PRUNE_GRACE_S
from vmferry.store import prune as prune_module
from vmferry.store.config import PassPhrase
from vmferry.store.errors import Damaged, LockLost, StorePermanent, StoreTransient
from vmferry.store.manifest import Block
from vmferry.store.memory import MemoryStore
from vmferry.store.prune import execute, plan_prune
from vmferry.store.rebuild import rebuild_indexes
from vmferry.store.repository import Repository, Shape
from vmferry.store.verify import verify
from vmferry.store.writer import SnapshotWriter
from vmferry.testing.failing_store import Call, Died, FailingStore, Fault

FIRST = memory(110)
SECOND = touched(FIRST, 30)
THIRD = touched(SECOND, 40, seed=4)
TINY = Shape(pack_bytes=70_000, index_pages=50)


def opened(backend: FailingStore | MemoryStore, clock: ManualClock, saved: Store, label: bytes) -> Store:
    repository = Repository.open(backend, clock=clock, random=Numbered(label), shape=TINY)
    return Store(backend, clock, repository, dict(saved.saved))


def save(store: Store) -> None:
    store.later(
        max(store.repository.snapshots(), key=lambda info: info.head.created_s if info.head else 0).snapshot, THIRD
    )


def forget(store: Store) -> None:
    store.repository.forget(next(iter(store.saved)))


def prune(store: Store) -> None:
    execute(store.repository, plan_prune(store.repository, grace_s=0, empty_below=1.0))


def rebuild(store: Store) -> None:
    rebuild_indexes(store.repository)


def prepared(clock: ManualClock) -> Store:
    """Two snapshots, the rest of a third one that was forgotten, the rest of a save that was aborted."""
    store = new_store(clock)
    store.repository.shape = TINY
    first = store.save(FIRST, name="first")
    gone = store.save(memory(60, seed=7), name="gone")
    clock.at_s += 1
    store.later(first, SECOND, name="second")
    store.repository.forget(gone)
    del store.saved[gone]
    return store


def without_an_index(clock: ManualClock) -> Store:
    store = prepared(clock)
    store.backend.delete(store.names("index/")[0])
    return store


def tidied(store: Store) -> None:
    """After a death: time passes, whatever is torn is forgotten, prune runs; then everything is whole and needed."""
    store.clock.at_s += STORE_LOCK_STALE_S + STORE_PRUNE_GRACE_S + 1
    for info in store.repository.snapshots():
        if info.head is None:  # only where a put is not atomic, which the contract forbids
            with pytest.raises(Damaged, match=info.snapshot):
                plan_prune(store.repository)
            store.repository.forget(info.snapshot)
    execute(store.repository, plan_prune(store.repository))
    assert store.names("locks/") == []
    assert store.names("tmp/") == []
    verdict = verify(store.repository)
    assert (verdict.problems, verdict.orphans) == ((), 0)
    assert plan_prune(store.repository).is_empty, "nothing that is not needed"


def emptied(store: Store) -> None:
    """With the last snapshot goes everything."""
    for info in store.repository.snapshots():
        store.repository.forget(info.snapshot)
    store.clock.at_s += STORE_PRUNE_GRACE_S + 1
    execute(store.repository, plan_prune(store.repository))
    assert store.names("") == ["config"]


def at(number: int, fault: Fault) -> Callable[[Call], Fault | None]:
    return lambda call: fault if call.number == number else None


def die_at_each_call(
    deed: Callable[[Store], None], prepare: Callable[[ManualClock], Store], faults: tuple[Fault, ...]
) -> int:
    """Runs the deed as often as it has calls, and judges what is left; how many deaths that were."""
    clock = ManualClock()
    before = prepare(clock)
    assert isinstance(before.backend, MemoryStore)
    deaths = 0
    for fault in faults:
        number = 0
        while True:
            failing = FailingStore(before.backend.copy(), at(number, fault))
            try:
                deed(opened(failing, clock, before, b"alive"))
            except Died:
                deaths += 1
            else:
                break
            assert isinstance(failing.inner, MemoryStore)
            judge(opened(failing.inner, clock, before, b"after"), deed, before)
            number += 1
    return deaths


def judge(after: Store, deed: Callable[[Store], None], before: Store) -> None:
    listed = {info.snapshot: info.head for info in after.repository.snapshots()}
    lost = before.saved.keys() - listed.keys()
    assert not lost or (deed is forget and len(lost) == 1)
    new = {snapshot for snapshot, head in listed.items() if head} - before.saved.keys()
    after.saved = {snapshot: before.saved.get(snapshot, THIRD) for snapshot, head in listed.items() if head}
    assert len(new) <= 1, "a commit that was not told of, at most"
    if deed in (prune, rebuild):  # its lock is in everybody's way until it is stale: this process lives
        after.clock.at_s += STORE_LOCK_STALE_S + 1
    if deed is rebuild:
        rebuild_indexes(after.repository)
    after.check()
    tidied(after)
    after.check()
    emptied(after)


ALL = (Fault.DIES, Fault.DIES_AFTER, Fault.DIES_TORN)
WHOLE = (Fault.DIES, Fault.DIES_AFTER)
"""Torn puts are against the contract. A save survives them; a prune that cannot rely on what it wrote cannot."""


def test_a_death_at_any_step_of_a_save() -> None:
    assert die_at_each_call(save, prepared, ALL) > 60


def test_a_death_at_any_step_of_a_forget() -> None:
    assert die_at_each_call(forget, prepared, ALL) > 6


def test_a_death_at_any_step_of_a_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_module, "STORE_PRUNE_BATCH_PACKS", 1)
    assert die_at_each_call(prune, prepared, WHOLE) > 60


def test_a_death_at_any_step_of_a_rebuild() -> None:
    assert die_at_each_call(rebuild, without_an_index, WHOLE) > 20


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.ANSWER_LOST, Fault.FULL])
@pytest.mark.parametrize("deed", [save, forget, prune])
def test_an_error_at_any_step_is_told_or_mended(deed: Callable[[Store], None], fault: Fault) -> None:
    clock = ManualClock()
    before = prepared(clock)
    assert isinstance(before.backend, MemoryStore)
    number, mended, told = 0, 0, 0
    while True:
        failing = FailingStore(before.backend.copy(), at(number, fault))
        try:
            deed(opened(failing, clock, before, b"alive"))
            mended += 1
        except RepositoryError:
            told += 1
        if number >= len(failing.calls):
            break
        assert isinstance(failing.inner, MemoryStore)
        judge(opened(failing.inner, clock, before, b"after"), deed, before)
        number += 1
    assert mended
    assert told


def test_a_full_disk_stops_a_save_and_nothing_else() -> None:
    clock = ManualClock()
    before = prepared(clock)

    def full(call: Call) -> Fault | None:
        return Fault.FULL if call.name.startswith("packs/") else None

    failing = FailingStore(before.backend, full)
    with pytest.raises(StorePermanent, match="No space left"):
        save(opened(failing, clock, before, b"full"))
    before.check()
    assert before.names("locks/") == []


def test_a_commit_whose_answer_was_lost_thrice_can_be_repeated() -> None:
    clock = ManualClock()
    store = new_store(clock)
    lost = 0

    def lose(call: Call) -> Fault | None:
        nonlocal lost
        if call.method in ("put", "get") and call.name.startswith("snapshots/") and lost < 3:
            lost += 1
            return Fault.ANSWER_LOST
        return None

    failing = opened(FailingStore(store.backend, lose), clock, store, b"x")
    with SnapshotWriter(failing.repository, [Block("pc.ram", 110 * 4096)]) as writer:
        writer.put("pc.ram", 0, FIRST)
        for _ in range(3):
            try:
                writer.commit("vm")
                break
            except StoreTransient:
                clock.at_s += 1
    store.saved = {writer.snapshot: FIRST}
    store.check()
    assert len(store.repository.snapshots()) == 1
    assert lost == 3


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.ANSWER_LOST])
@pytest.mark.parametrize("key", [None, PassPhrase("x")], ids=["open", "encrypted"])
def test_a_commit_that_a_store_did_not_answer_is_whole_when_it_is_called_again(
    fault: Fault, key: PassPhrase | None
) -> None:
    """Wherever that was: the last pack, an index, the manifest. And it is known whether the snapshot may be there."""
    clock = ManualClock()
    kinds: list[str] = []
    number = 0
    while True:
        store = new_store(clock, key)
        failing = FailingStore(store.backend, lambda call: None)
        store.repository.backend, store.repository.shape = failing, TINY
        with SnapshotWriter(store.repository, [Block("pc.ram", 110 * 4096)]) as writer:
            writer.put("pc.ram", 0, FIRST)
            begin = len(failing.calls)
            failed: list[Call] = []

            def fail(call: Call, begin: int = begin, failed: list[Call] = failed, number: int = number) -> Fault | None:
                """All tries of one put, also that of looking what is there."""
                if call.number >= begin + number and call.method == "put" and len({each.name for each in failed}) < 2:
                    failed.append(call)
                    return fault if len(failed) <= 3 and call.name == failed[0].name else None
                return fault if failed and call.method == "get" and len(failed) <= 3 else None

            failing._fault_of = fail
            try:
                writer.commit("vm")
            except StoreTransient:
                kinds.append(failed[0].name.split("/")[0])
                is_manifest = kinds[-1] == "snapshots"
                assert writer.may_be_there is is_manifest
                assert bool(store.repository.snapshot_ids()) is (is_manifest and fault is Fault.ANSWER_LOST)
                failing._fault_of = lambda call: None
                writer.commit("vm")
            if not failed:
                break
        store.saved = {writer.snapshot: FIRST}
        store.check()
        assert verify(store.repository).problems == ()
        number += 1
    assert set(kinds) == {"packs", "index", "snapshots"}


PUT, LOCK, GIVE_BACK = ("put", "snapshots/"), ("size", "locks/"), ("delete", "locks/")


def in_order(*steps: tuple[tuple[str, str], Fault], begin: int = 0) -> Callable[[Call], Fault | None]:
    """Each step is a kind of call and what happens to the next one of that kind; the others pass."""
    left = list(steps)

    def choose(call: Call) -> Fault | None:
        if left and call.number >= begin and call.method == left[0][0][0] and call.name.startswith(left[0][0][1]):
            return left.pop(0)[1]
        return None

    return choose


@pytest.mark.parametrize(
    ("steps", "may_be_there", "is_there"),
    [
        ([(PUT, Fault.FULL)], False, False),
        ([(PUT, Fault.DENIED)], False, False),
        ([(LOCK, Fault.DENIED)], False, False),
        ([(PUT, Fault.REFUSED), (PUT, Fault.FULL)], True, False),
        ([(PUT, Fault.REFUSED)] * 3 + [(PUT, Fault.DENIED)], True, False),
        ([(PUT, Fault.ANSWER_LOST), (("get", "snapshots/"), Fault.DENIED)], True, True),
        ([(PUT, Fault.REFUSED), (PUT, Fault.ANSWER_LOST), (("get", "snapshots/"), Fault.DENIED)], True, True),
        ([(PUT, Fault.SLOW), (LOCK, Fault.DENIED)], True, True),
        ([(PUT, Fault.SLOW)] + [(LOCK, Fault.REFUSED)] * 3 + [(LOCK, Fault.DENIED)], True, True),
    ],
)
def test_of_a_commit_that_fails_it_is_told_whether_its_manifest_may_be_there(
    steps: list[tuple[tuple[str, str], Fault]], may_be_there: bool, is_there: bool
) -> None:
    store = new_store(ManualClock())
    failing = FailingStore(store.backend, lambda call: None)
    failing.may_go_on.set()  # SLOW only marks a step here
    store.repository.backend = failing
    with SnapshotWriter(store.repository, [Block("pc.ram", 110 * 4096)]) as writer:
        writer.put("pc.ram", 0, FIRST)
        writer._packer.finish()
        failing._fault_of = in_order(*steps, begin=len(failing.calls))
        error: RepositoryError | None = None
        for _ in range(3):  # as a save does it
            try:
                writer.commit("vm")
            except StoreTransient:
                continue
            except RepositoryError as found:
                error = found
            break
        assert isinstance(error, StorePermanent)
        assert writer.may_be_there is may_be_there
        assert bool(store.repository.snapshot_ids()) is is_there
        writer.commit("vm")  # somebody has mended it
    store.saved = {writer.snapshot: FIRST}
    store.check()


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.ANSWER_LOST, Fault.DENIED])
def test_a_snapshot_is_there_although_its_lock_cannot_be_given_back(fault: Fault) -> None:
    store = new_store(ManualClock())
    failing = FailingStore(store.backend, in_order(*[(GIVE_BACK, fault)] * (1 if fault is Fault.DENIED else 3)))
    store.repository.backend = failing
    writer = SnapshotWriter(store.repository, [Block("pc.ram", 110 * 4096)])
    writer.put("pc.ram", 0, FIRST)
    head = writer.commit("vm")
    assert writer.commit("vm") == head, "again changes nothing"
    writer.abort()
    assert store.names("locks/") == []
    store.saved = {writer.snapshot: FIRST}
    store.check()


def test_who_lost_its_lock_takes_its_manifest_back_also_when_that_needs_a_second_call() -> None:
    """1. the manifest is put  2. whether the lock is there is not answered  3. somebody prunes  4. again."""
    store = new_store(ManualClock())
    failing = FailingStore(store.backend, lambda call: None)
    store.repository.backend = failing
    with SnapshotWriter(store.repository, [Block("pc.ram", 110 * 4096)]) as writer:
        writer.put("pc.ram", 0, FIRST)
        writer._packer.finish()
        failing._fault_of = in_order((PUT, Fault.SLOW), *[(LOCK, Fault.REFUSED)] * 3, begin=len(failing.calls))
        failing.may_go_on.set()
        with pytest.raises(StoreTransient):
            writer.commit("vm")
        for name in store.names("locks/"):
            store.backend.delete(name)
        failing._fault_of = in_order(*[(("delete", "snapshots/"), Fault.REFUSED)] * 3)
        with pytest.raises(StoreTransient):
            writer.commit("vm")
        assert writer.may_be_there
        with pytest.raises(LockLost):
            writer.commit("vm")
        assert not writer.may_be_there
    assert store.repository.snapshot_ids() == {}


def test_real_processes_that_are_killed(tmp_path: Path) -> None:
    """SIGKILL before and after each system call that changes something, in saves and prunes of a local folder."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.store.killed", str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 60, "kills"
