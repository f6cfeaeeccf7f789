"""The program that lets a measured guest work changes what it says: so many pages, so many bytes, the same ones."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from vmferry.testing import linux_guest
from vmferry.testing.hosts import wait_true

pytestmark = pytest.mark.real

PAGES, BYTES = 40, 107


def changed(file: Path, before: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Of each page how many bytes differ."""
    return np.asarray(np.count_nonzero(pages_of(file) != before, axis=1), np.int64)


def pages_of(file: Path) -> npt.NDArray[np.uint8]:
    """Its whole pages."""
    data = file.read_bytes()
    return np.frombuffer(data[: len(data) // 4096 * 4096], np.uint8).reshape(-1, 4096)


def test_it_rewrites_the_same_pages_again_and_again(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "m").mkdir(parents=True)
    program, file = root / "worker", root / "m" / "0-file"
    program.write_bytes(linux_guest.worker())
    program.chmod(0o755)
    before = np.random.default_rng(1).integers(0, 256, (256, 4096), dtype=np.uint8)
    file.write_bytes(before.tobytes() + b"not a whole page")
    numbers = {"work_pages": str(PAGES), "work_bytes": str(BYTES), "work_seconds": "1"}
    # There is no /init here: the one that would become it ends, and the other one works in its group.
    process = subprocess.Popen(["/worker"], preexec_fn=lambda: os.chroot(root), env=numbers, start_new_session=True)
    try:
        assert process.wait(20) == 1
        wait_true(lambda: changed(file, before).astype(bool).sum() == PAGES, why="each was rewritten once")
        first = changed(file, before)
        assert 90 < np.median(first[first > 0]) <= BYTES
        assert first.max() <= BYTES
        middle = pages_of(file)
        wait_true(lambda: changed(file, middle).astype(bool).sum() == PAGES, why="and again")
        assert np.array_equal(changed(file, before) > 0, first > 0), "the same pages"
        assert file.read_bytes().endswith(b"not a whole page")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
