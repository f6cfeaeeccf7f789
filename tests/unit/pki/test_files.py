"""Files that hold keys appear whole or not at all, and never in place of another."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.pki import files


def test_a_directory_is_private_even_if_it_was_not(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir(mode=0o755)
    files.make_private_directory(tmp_path / "room")
    assert (tmp_path / "room").stat().st_mode & 0o777 == 0o700


def test_write_new_never_replaces(tmp_path: Path) -> None:
    files.write_new(tmp_path / "key", b"one", mode=files.KEY_MODE)
    with pytest.raises(FileExistsError):
        files.write_new(tmp_path / "key", b"two", mode=files.KEY_MODE)
    assert (tmp_path / "key").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_replace_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    with pytest.raises(OSError, match="directory"):
        files.replace(tmp_path / "name", b"new", mode=files.KEY_MODE)
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_write_volatile_follows_no_link_and_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        files.write_volatile(tmp_path / "link", b"secret", mode=files.KEY_MODE)
    assert not (tmp_path / "elsewhere").exists()
