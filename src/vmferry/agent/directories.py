"""Runtime directories of VMs: made when a QEMU starts, removed when nothing of it is left."""

from __future__ import annotations

from pathlib import Path


def make_directory(path: str) -> None:
    """Makes a runtime directory that only this user may enter; one that is there already is fine."""
    Path(path).mkdir(parents=True, exist_ok=True, mode=0o700)


def remove_directory(directory: Path, *, keep_logs: bool) -> None:
    """Removes a runtime directory of ours: sockets always, logs unless they are to be kept."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if keep_logs and path.suffix == ".log":
            continue
        path.unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def holds_only_logs(directory: Path) -> bool:
    """Nothing else is left of what was there."""
    return all(entry.suffix == ".log" for entry in directory.iterdir())


LOG_DIRECTORIES_KEPT = 50
"""Directories that hold nothing but the logs of VMs that left: the newest are for whoever asks what happened."""


def prune_logs(root: Path) -> None:
    """Forgets the logs of VMs that left long ago."""
    only_logs = [path for path in root.iterdir() if path.is_dir() and holds_only_logs(path)]
    only_logs.sort(key=lambda path: path.stat().st_mtime)
    for path in only_logs[:-LOG_DIRECTORIES_KEPT]:
        remove_directory(path, keep_logs=False)
