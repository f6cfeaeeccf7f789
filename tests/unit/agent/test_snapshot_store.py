"""The agent's repository: where it is, that it is opened once, and what is said when it cannot be."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from vmferry.agent.config import AgentConfig
from vmferry.agent.snapshot_store import SnapshotStore, is_address
from vmferry.errors import RepositoryError
from vmferry.store.errors import StorePermanent, WrongKey
from vmferry.store.memory import MemoryStore


def store(tmp_path: Path, **settings: object) -> SnapshotStore:
    return SnapshotStore(AgentConfig("host-a", state_dir=tmp_path, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("s3://bucket/a", True), ("https://host/a", True), ("file:///srv/a", False), ("/srv/a", False), ("", False)],
)
def test_addresses_and_folders(text: str, expected: bool) -> None:
    assert is_address(text) is expected


def test_the_folder_of_the_agent_is_made_once_and_found_again(tmp_path: Path) -> None:
    first = store(tmp_path)
    assert first.place == str(tmp_path / "repository")
    repository = first.open_repository()
    assert first.open_repository() is repository
    assert store(tmp_path).open_repository().config == repository.config


def test_another_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for where, is_new in ((str(elsewhere), True), (f"file://{elsewhere}", False)):
        repository, was_made = store(tmp_path, repository=where).make_repository()
        assert (repository.snapshots(), was_made) == ([], is_new)
        assert store(tmp_path, repository=where).open_repository().config == repository.config
    assert (elsewhere / "config").is_file()
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("is_there", [True, False], ids=["empty-mount-point", "no-folder"])
def test_a_place_that_is_not_mounted_yet_is_not_made_a_repository(tmp_path: Path, is_there: bool) -> None:
    """1. the agent asks before it is mounted  2. it is mounted: what the agent writes must be of that one's keys."""
    mounted, point = tmp_path / "disk", tmp_path / "point"
    there, _ = store(tmp_path, repository=str(mounted)).make_repository()
    if is_there:
        point.mkdir()
    one = store(tmp_path, repository=str(point))
    with pytest.raises(RepositoryError, match=f"no repository in {point}") as caught:
        one.open_repository()
    assert "mounted" in caught.value.hint
    assert "vmferry repository-init" in caught.value.hint
    assert point.exists() == is_there
    assert not is_there or list(point.iterdir()) == []
    if is_there:
        point.rmdir()
    mounted.rename(point)
    assert one.open_repository().config == there.config


def test_no_repository_is_made_among_other_things(tmp_path: Path) -> None:
    """As in one that has lost its configuration: another key would make all of it unreadable."""
    place = tmp_path / "place"
    (place / "packs").mkdir(parents=True)
    one = store(tmp_path, repository=str(place))
    with pytest.raises(RepositoryError, match="something else in it: packs"):
        one.make_repository()
    assert [path.name for path in place.iterdir()] == ["packs"]
    (place / "packs").rename(place / "lost+found")  # as every new ext4 has it
    assert one.make_repository()[1]
    assert not one.make_repository()[1]


def test_an_encrypted_one_opens_with_its_key_file_only(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    with_key = store(tmp_path, repository_key=key)
    assert with_key.open_repository().config.encryption is not None
    without = store(tmp_path)
    with pytest.raises(WrongKey) as caught:
        without.open_repository()
    assert "--repository-key" in caught.value.hint
    assert "no pass phrase" in caught.value.hint
    with pytest.raises(RepositoryError, match="key file cannot be read"):
        store(tmp_path, repository_key=tmp_path / "nowhere").open_repository()


def test_a_place_that_cannot_be_used_is_asked_again(tmp_path: Path) -> None:
    parent = tmp_path / "missing"
    one = store(tmp_path, repository=str(parent / "repository"))
    with pytest.raises(StorePermanent):
        one.make_repository()
    parent.mkdir()
    assert one.make_repository()[0].snapshots() == []
    assert one.open_repository().snapshots() == []


def test_an_object_store_is_made_a_repository_only_when_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MemoryStore()
    monkeypatch.setattr("vmferry.store.objects.ObjectStore", lambda *arguments: backend)
    one = store(tmp_path, repository="s3://bucket/folder")
    with pytest.raises(RepositoryError, match="no repository in s3://bucket/folder"):
        one.open_repository()
    assert list(backend.list("")) == []
    backend.put("packs/other", b"somebody's")
    with pytest.raises(RepositoryError, match="something else in it"):
        one.make_repository()
    backend.delete("packs/other")
    assert one.make_repository()[1]
    assert one.open_repository() is one.make_repository()[0]


def test_an_address_without_the_library_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vmferry.store.objects", None)
    with pytest.raises(RepositoryError, match="this host has no obstore"):
        store(tmp_path, repository="s3://bucket/folder").open_repository()


def test_an_address_leads_to_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Made(Exception):
        pass

    def remember(*arguments: object) -> None:
        made.extend(arguments)
        raise Made

    monkeypatch.setattr("vmferry.store.objects.ObjectStore", remember)
    with pytest.raises(Made):
        store(tmp_path, repository="s3://b", repository_options={"region": "x"}).open_repository()
    assert made == ["s3://b", {"region": "x"}]


async def test_work_runs_in_named_threads(tmp_path: Path) -> None:
    one = store(tmp_path)
    assert (await one.run(lambda: threading.current_thread().name)).startswith("snapshot")
    assert await one.with_repository(lambda repository: repository.snapshots()) == []
    one.close()
    one.close()
