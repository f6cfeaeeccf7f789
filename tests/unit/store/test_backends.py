"""Every store keeps to the contract: memory, local folder, object store over HTTP, and the failing one around them."""

from __future__ import annotations

import errno
import os
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.exceptions import PermissionDeniedError

from vmferry.store import local as local_module
from vmferry.store.backend import LEFTOVERS, Backend, checked_name, checked_prefix
from vmferry.store.errors import Damaged, ObjectExists, StorePermanent, StoreTransient
from vmferry.store.local import LocalFolder
from vmferry.store.memory import MemoryStore
from vmferry.store.objects import ObjectStore
from vmferry.store.prune import execute, plan_prune
from vmferry.store.repository import Repository
from vmferry.testing.failing_store import Died, FailingStore, Fault
from vmferry.testing.store_contract import check_backend


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def options(endpoint: str) -> dict[str, str]:
    return {
        "endpoint": endpoint, "region": "us-east-1", "access_key_id": "test", "secret_access_key": "test",
    }  # fmt: skip


@pytest.fixture
def bucket(s3: str, request: pytest.FixtureRequest) -> ObjectStore:
    """An empty folder of a new bucket."""

    name = f"b{abs(hash(request.node.nodeid))}"
    urllib.request.urlopen(urllib.request.Request(f"{s3}/{name}", method="PUT")).close()
    return ObjectStore(f"s3://{name}/folder", options(s3))


def test_memory_keeps_to_the_contract() -> None:
    check_backend(MemoryStore())


def test_a_local_folder_keeps_to_the_contract(tmp_path: Path) -> None:
    check_backend(LocalFolder(tmp_path / "store"))


def test_an_object_store_keeps_to_the_contract(bucket: ObjectStore) -> None:
    check_backend(bucket)


def test_a_failing_store_that_does_not_fail_keeps_to_the_contract(tmp_path: Path) -> None:
    store = FailingStore(LocalFolder(tmp_path / "store"), lambda call: None)
    check_backend(store)
    assert len(store.calls) > 20
    store.close()


# --- what only one of them can show ---------------------------------------------------------------------


def test_names_and_prefixes_are_checked() -> None:
    for name in ("", "/a", "a/", "../a", "a/../b", ".a", "A", "a//b", "a" * 129, "a b"):
        with pytest.raises(AssertionError):
            checked_name(name)
    with pytest.raises(AssertionError):
        checked_prefix("packs")
    assert checked_prefix("") == ""


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StorePermanent), (errno.EACCES, StorePermanent), (errno.EROFS, StorePermanent),
        (errno.EDQUOT, StorePermanent), (errno.EIO, StoreTransient), (errno.ESTALE, StoreTransient),
    ],
)  # fmt: skip
def test_a_local_folder_tells_what_passes_from_what_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    store = LocalFolder(tmp_path / "store")

    def fails(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(expected) as caught:
        store.put("config", b"x")
    is_full = number in (errno.ENOSPC, errno.EDQUOT)
    assert ("vmferry prune --empty-below 0" in getattr(caught.value, "hint", "")) is is_full
    monkeypatch.undo()
    assert store.list("") == [], "nothing is left of it"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, StorePermanent), (errno.EUCLEAN, StorePermanent), (errno.EIO, StoreTransient),
        (errno.ESTALE, StoreTransient),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["snapshots", "packs/ab"])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, number: int, expected: type[Exception]
) -> None:
    """Whoever prunes takes away what no manifest that is listed needs."""
    store = LocalFolder(tmp_path / "store")
    for name in ("snapshots/s", "packs/ab/c", "packs/cd/e"):
        store.put(name, b"x")
    real = os.scandir

    def scandir(path: Path | str) -> object:
        if str(path) == str(store.root / folder):
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for prefix in ("", folder.split("/", maxsplit=1)[0] + "/"):
        with pytest.raises(expected):
            store.list(prefix)
    monkeypatch.undo()
    assert len(store.list("")) == 3
    assert store.list("pins/") == [], "nobody has put one: that is no error"


def test_a_local_folder_that_is_gone_is_no_store_without_objects(tmp_path: Path) -> None:
    """An unmounted file system: an empty folder is left, or none. Nothing may be written there, nor be taken for
    missing, nor for deleted: a lock that is said to be given back would be in others' way when it is mounted again."""
    store = LocalFolder(tmp_path / "store")
    store.put("config", b"x")
    store.put("packs/ab/c", b"x")
    store.close()
    store.root.rename(tmp_path / "away")
    for is_empty in (False, True):
        if is_empty:
            store.root.mkdir()
        for call in (
            lambda: store.put("locks/shared-1", b""), lambda: store.get("packs/ab/c"), lambda: store.size("packs/ab/c"),
            lambda: store.list("packs/"), lambda: store.list(""), lambda: store.delete("packs/ab/c"),
        ):  # fmt: skip
            with pytest.raises(StoreTransient, match=f"{store.root} is gone") as caught:
                call()
            assert "mounted" in caught.value.hint
    assert list(store.root.iterdir()) == [], "nothing was written below the place of the mount"
    store.root.rmdir()
    (tmp_path / "away").rename(store.root)
    assert store.get("packs/ab/c") == b"x"
    (store.root / "tmp").rmdir()  # a copy that was brought back without its empty folders
    store.put("packs/ab/d", b"y")
    assert [entry.name for entry in store.list("")] == ["config", "packs/ab/c", "packs/ab/d"]


def test_a_local_folder_of_which_nobody_can_say_whether_it_is_there_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalFolder(tmp_path / "store")

    def stale(path: Path, **more: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(StoreTransient, match="Stale"):
        store.get("config")


STRANGE = ("locks/.nfs0000a1", "tmp/.DS_Store", "packs/ab/UPPER", "Thumbs.db", "tmp/" + "a" * 130)


def test_what_has_no_name_of_ours_is_not_listed(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = LocalFolder(tmp_path / "store")
    for name in STRANGE:
        (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / name).write_bytes(b"x")
        obstore.put(bucket._store, name, b"x")
    for store in (folder, bucket):
        store.put("locks/shared-1", b"x")
        assert [entry.name for entry in store.list("")] == ["locks/shared-1"]
        assert store.list("tmp/") == []


def test_strange_files_in_a_repository_are_in_nobodys_way(tmp_path: Path) -> None:
    """An NFS client leaves `.nfs…` where a file was deleted that is open; a desktop leaves its own everywhere."""
    folder = LocalFolder(tmp_path / "store")
    repository = Repository.create(folder)
    for name in STRANGE:
        (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / name).write_bytes(b"x")
    repository.shared("read").release()
    repository.exclusive("prune").release()
    execute(repository, plan_prune(repository, grace_s=-1e9))
    assert all((folder.root / name).exists() for name in STRANGE), "and not ours to delete"


def test_a_real_full_disk_leaves_nothing_of_the_object() -> None:
    """/dev/full takes no byte; a folder on it there is not, so the file is opened in its place."""
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        local_module._write_all(full.fileno(), b"x")


def test_a_file_system_without_hard_links_gets_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*names: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuses)
    store = LocalFolder(tmp_path / "store")
    check_is_created_once(store)


def check_is_created_once(store: Backend) -> None:
    store.put("config", b"x")
    with pytest.raises(ObjectExists):
        store.put("config", b"y")
    assert store.get("config") == b"x"
    assert store.list(LEFTOVERS) == []


def test_a_local_folder_syncs_the_object_before_its_name_and_its_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalFolder(tmp_path / "store")
    steps: list[str] = []
    real: dict[str, Callable[..., object]] = {"fsync": os.fsync, "link": os.link, "unlink": Path.unlink}

    def fsync(fd: int) -> None:
        steps.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), store.root).split("/")[0])
        real["fsync"](fd)

    def link(*names: object) -> None:
        steps.append("link")
        real["link"](*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    store.put("packs/ab/c", b"x")
    assert steps == ["sync .", "sync packs", "sync tmp", "link", "sync packs"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_of_an_object_whose_name_may_not_be_durable_nobody_says_that_it_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, links: bool
) -> None:
    """1. it has its name  2. its folder cannot be synced  3. again: it is there, and as durable as any other."""
    store = LocalFolder(tmp_path / "store")
    store.put("packs/ab/c", b"x")
    real, synced = os.fsync, 0

    def refuses(*names: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def fails(fd: int) -> None:
        nonlocal synced
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/ab"):
            synced += 1
            if synced < 3:
                raise OSError(number, os.strerror(number))
        real(fd)

    if not links:
        monkeypatch.setattr(os, "link", refuses)
    monkeypatch.setattr(os, "fsync", fails)
    for _ in range(2):
        with pytest.raises(StoreTransient, match="packs/ab/d: it is there"):
            store.put("packs/ab/d", b"y")
    with pytest.raises(ObjectExists):
        store.put("packs/ab/d", b"y")
    assert synced == 3
    assert store.get("packs/ab/d") == b"y"
    assert store.list(LEFTOVERS) == []


def test_a_read_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalFolder(tmp_path / "store")
    store.put("config", b"abcdef")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 2), offset))
    assert store.get("config") == b"abcdef"
    with pytest.raises(Damaged):
        store.get("config", 0, 7)


def test_files_stay_open_only_as_far_as_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "STORE_OPEN_FILES_MAX", 2)
    store = LocalFolder(tmp_path / "store")
    for name in "abc":
        store.put(name, name.encode())
    for name in "abca":
        assert store.get(name) == name.encode()
    assert list(store._open) == ["c", "a"]
    store.close()
    assert not store._open


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorePermanent):
        LocalFolder(tmp_path / "file")
    with pytest.raises(StorePermanent, match="missing"):
        LocalFolder(tmp_path / "missing" / "parent")


def test_an_object_store_that_is_not_there_may_come_back(s3: str) -> None:
    store = ObjectStore("s3://bucket/x", options("http://127.0.0.1:1"), retries=0)
    for call in (lambda: store.put("a", b""), lambda: store.get("a"), lambda: store.list("")):
        with pytest.raises(StoreTransient) as caught:
            call()
        assert "secret" not in str(caught.value)


def test_an_object_store_that_will_not_is_permanent(s3: str) -> None:
    with pytest.raises(StorePermanent):
        ObjectStore("nonsense://bucket")
    for retries in (0, 1):
        with pytest.raises(StorePermanent) as caught:
            ObjectStore("s3://no-such-bucket/x", options(s3), retries=retries).put("a", b"")
        assert caught.value.may_have_happened is False, "there is no such place"


@pytest.mark.parametrize("retries", [0, 1])
def test_a_put_that_an_object_store_denies_may_have_been_tried_before(
    monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    """1. it is done, and the answer is lost  2. obstore tries again by itself  3. the key has run out."""

    def denied(*arguments: object, **more: object) -> None:
        raise PermissionDeniedError("the key has run out")

    monkeypatch.setattr(obstore, "put", denied)
    store = ObjectStore("s3://bucket/x", options("http://127.0.0.1:1"), retries=retries)
    with pytest.raises(StorePermanent) as caught:
        store.put("a", b"")
    assert caught.value.may_have_happened is (retries > 0)


def test_nothing_is_left_at_an_object_store_by_a_put_that_broke(bucket: ObjectStore) -> None:
    """One request: there is no upload in parts that somebody would have to end."""
    bucket.put("packs/00/a", os.urandom(20 << 20))
    assert [each["path"] for page in obstore.list(bucket._store) for each in page] == ["packs/00/a"]


# --- the store that fails on purpose --------------------------------------------------------------------


def once(fault: Fault, method: str = "put") -> FailingStore:
    seen: list[int] = []

    def choose(call: object) -> Fault | None:
        if getattr(call, "method", "") == method and not seen:
            seen.append(1)
            return fault
        return None

    return FailingStore(MemoryStore(), choose)


def test_it_refuses_loses_answers_and_is_full() -> None:
    store = once(Fault.REFUSED)
    with pytest.raises(StoreTransient):
        store.put("a", b"x")
    assert store.list("") == []

    store = once(Fault.ANSWER_LOST)
    with pytest.raises(StoreTransient):
        store.put("a", b"x")
    with pytest.raises(ObjectExists):
        store.put("a", b"x")

    for fault in (Fault.FULL, Fault.DENIED):
        store = once(fault)
        with pytest.raises(StorePermanent):
            store.put("a", b"x")
    assert store.list("") == []


@pytest.mark.parametrize(("fault", "left"), [(Fault.DIES, None), (Fault.DIES_AFTER, b"xyzw"), (Fault.DIES_TORN, b"xy")])
def test_who_died_stays_dead(fault: Fault, left: bytes | None) -> None:
    store = once(fault)
    for _ in range(2):
        with pytest.raises(Died):
            store.put("a", b"xyzw")
    with pytest.raises(Died):
        store.list("")
    assert [store.inner.get(entry.name) for entry in store.inner.list("")] == ([] if left is None else [left])
