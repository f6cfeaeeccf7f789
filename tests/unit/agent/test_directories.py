"""Runtime directories: what is removed, what is kept, and what goes meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.agent import directories


def filled(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


def test_logs_are_kept_where_they_are_to_be(tmp_path: Path) -> None:
    folder = filled(tmp_path / "web1", "qmp.sock", "qemu.log")
    assert not directories.holds_only_logs(folder)
    directories.remove_directory(folder, keep_logs=True)
    assert [path.name for path in folder.iterdir()] == ["qemu.log"]
    assert directories.holds_only_logs(folder)
    directories.remove_directory(folder, keep_logs=False)
    assert not folder.exists()


@pytest.mark.proves("S53", "S123")
def test_one_that_goes_while_it_is_looked_at_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. an agent that starts lists them  2. a restore of it is undone, and takes its own away  3. it looks at them"""
    gone, there = tmp_path / "gone", filled(tmp_path / "there", "qemu.log")
    listed = Path.iterdir

    def as_before(self: Path) -> Iterator[Path]:
        return iter([gone, there]) if self == tmp_path else listed(self)

    monkeypatch.setattr(Path, "iterdir", as_before)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    directories.prune_logs(tmp_path)
    assert directories.holds_only_logs(gone)
    directories.remove_directory(gone, keep_logs=True)
    assert there.exists()


def test_the_newest_logs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "LOG_DIRECTORIES_KEPT", 2)
    for number in range(4):
        os.utime(filled(tmp_path / f"web{number}", "qemu.log"), (number, number))
    directories.prune_logs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web2", "web3"]
