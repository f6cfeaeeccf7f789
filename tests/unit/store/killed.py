"""Real processes that are killed with SIGKILL at each step of a save or a prune of a local folder.

    python -m tests.unit.store.killed FOLDER       prints how many were killed; fails at the first broken promise

A step is a system call that changes something on the disk: the process kills itself just before and just after it.
A process of its own, without threads, so that it may fork.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit.store.conftest import Store, memory, touched
from vmferry.clock import SystemClock
from vmferry.store.local import LocalFolder
from vmferry.store.manifest import Block
from vmferry.store.page_ids import PAGE_BYTES
from vmferry.store.prune import execute, plan_prune
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository, Shape
from vmferry.store.verify import verify
from vmferry.store.writer import SnapshotWriter

RAM = "pc.ram"
FIRST = memory(60)
SECOND = touched(FIRST, 20)
TINY = Shape(pack_bytes=60_000, index_pages=30)


def opened(folder: Path) -> Repository:
    return Repository.open(LocalFolder(folder), shape=TINY)


def save(repository: Repository, pages: Any, base: SnapshotReader | None = None) -> str:
    with SnapshotWriter(repository, [Block(RAM, len(pages) * PAGE_BYTES)], base=base) as writer:
        writer.put(RAM, 0, pages)
        writer.commit("vm")
    return writer.snapshot


def save_another(folder: Path) -> None:
    repository = opened(folder)
    (first,) = repository.snapshots()
    with SnapshotReader(repository, first.snapshot) as base, SnapshotWriter(
        repository, [Block(RAM, len(SECOND) * PAGE_BYTES)], base=base
    ) as writer:  # fmt: skip
        writer.put(RAM, 0, SECOND)
        writer.commit("vm")


def prune(folder: Path) -> None:
    repository = opened(folder)
    execute(repository, plan_prune(repository, grace_s=-1e9, empty_below=1.0))


def die_at(step: int) -> None:
    """From now on the process kills itself at its step-th chance."""
    chances = 0

    def chance() -> None:
        nonlocal chances
        if chances == step:
            os.kill(os.getpid(), signal.SIGKILL)
        chances += 1

    def around(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            chance()
            result = real(*args, **kwargs)
            chance()
            return result

        setattr(owner, name, wrapped)

    for name in ("write", "fsync", "link", "mkdir"):
        around(os, name)
    around(Path, "unlink")


def killed(folder: Path, deed: Callable[[Path], None], step: int) -> bool:
    """Whether a process that does the deed was killed; False: it had fewer steps, and ended."""
    pid = os.fork()
    if pid == 0:
        try:
            die_at(step)
            deed(folder)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"{deed.__name__} failed by itself at step {step}"
    return False


def judge(folder: Path, first: str) -> None:
    """The finished snapshot is whole, so is another one if it is there; prune takes the rest away."""
    repository = opened(folder)
    store = Store(repository.backend, None, repository)  # type: ignore[arg-type]
    snapshots = repository.snapshots()
    assert first in {info.snapshot for info in snapshots}
    assert all(info.head is not None for info in snapshots), "a manifest is whole or not there"
    store.saved = {info.snapshot: FIRST if info.snapshot == first else SECOND for info in snapshots}
    store.check()  # whoever was killed is known to be dead: nobody has to wait for his lock to get stale
    execute(repository, plan_prune(repository, grace_s=-1e9))
    store.check()
    assert verify(repository).problems == ()
    assert plan_prune(repository, grace_s=-1e9).is_empty
    assert {entry.name.split("/")[0] for entry in repository.backend.list("")} == {
        "config", "packs", "index", "snapshots",
    }  # fmt: skip
    assert len(repository.backend.list("index/")) <= 4
    repository.backend.close()


def main(root: Path) -> int:
    template = root / "template"
    repository = Repository.create(LocalFolder(template), clock=SystemClock(), shape=TINY)
    first = save(repository, FIRST)
    gone = save(repository, memory(30, seed=5))
    repository.forget(gone)
    repository.backend.close()
    kills = 0
    for deed in (save_another, prune):
        step = 0
        while True:
            folder = root / f"{deed.__name__}-{step}"
            shutil.copytree(template, folder)
            was_killed = killed(folder, deed, step)
            judge(folder, first)
            shutil.rmtree(folder)
            if not was_killed:
                break
            kills += 1
            step += 1
    print(kills)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
