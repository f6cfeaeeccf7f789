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
    for where in (str(elsewhere), f"file://{elsewhere}"):
        assert store(tmp_path, repository=where).open_repository().snapshots() == []
    assert (elsewhere / "config").is_file()
    assert not (tmp_path / "repository").exists()


def test_an_encrypted_one_opens_with_its_key_file_only(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    with_key = store(tmp_path, repository_key=key)
    assert with_key.open_repository().config.encryption is not None
    without = store(tmp_path)
    with pytest.raises(WrongKey):
        without.open_repository()
    with pytest.raises(RepositoryError, match="key file cannot be read"):
        store(tmp_path, repository_key=tmp_path / "nowhere").open_repository()


def test_a_place_that_cannot_be_used_is_asked_again(tmp_path: Path) -> None:
    parent = tmp_path / "missing"
    one = store(tmp_path, repository=str(parent / "repository"))
    with pytest.raises(StorePermanent):
        one.open_repository()
    parent.mkdir()
    assert one.open_repository().snapshots() == []


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
