"""Runtime directories of VMs: made when a QEMU starts, removed when nothing of it is left.

Rule 1: one that goes while it is looked at is gone, and no trouble: a restore that is undone takes its own away in a
        thread.
"""

from __future__ import annotations

import contextlib
from pathlib import Path


def make_directory(path: str) -> None:
    """Makes a runtime directory that only this user may enter; one that is there already is fine."""
    Path(path).mkdir(parents=True, exist_ok=True, mode=0o700)


def remove_directory(directory: Path, *, keep_logs: bool) -> None:
    """Removes a runtime directory of ours: sockets always, logs unless they are to be kept."""
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            if keep_logs and path.suffix == ".log":
                continue
            path.unlink(missing_ok=True)
        if not any(directory.iterdir()):
            directory.rmdir()


def holds_only_logs(directory: Path) -> bool:
    """Nothing else is left of what was there; nothing at all of one that is gone."""
    try:
        return all(entry.suffix == ".log" for entry in directory.iterdir())
    except FileNotFoundError:
        return True


LOG_DIRECTORIES_KEPT = 50
"""Directories that hold nothing but the logs of VMs that left: the newest are for whoever asks what happened."""


def prune_logs(root: Path) -> None:
    """Forgets the logs of VMs that left long ago."""
    only_logs = [path for path in root.iterdir() if path.is_dir() and holds_only_logs(path)]
    only_logs.sort(key=_changed_s)
    for path in only_logs[:-LOG_DIRECTORIES_KEPT]:
        remove_directory(path, keep_logs=False)


def _changed_s(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0
