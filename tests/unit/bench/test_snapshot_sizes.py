"""What `bench lazy` counts as a snapshot's size, and where its spans end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmferry.bench import lazy, snapshots
from vmferry.errors import QemuError
from vmferry.qmp.codec import Event
from vmferry.store.local import LocalFolder
from vmferry.store.manifest import Block
from vmferry.store.repository import Repository
from vmferry.store.writer import SnapshotWriter

PAGES = 64


class Saver:
    """As much of an agent as `saved` uses: a save of pages that nobody can compress."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        self.made = 0

    def vmferry(self, command: str, vm: str, name: str) -> dict[str, Any]:
        place = LocalFolder(self.folder / "state" / "repository")
        repository = Repository.open(place) if self.made else Repository.create(place)
        self.made += 1
        pages = np.random.default_rng(1).integers(0, 255, (PAGES, 4096), np.uint8)
        writer = SnapshotWriter(repository, [Block("pc.ram", PAGES * 4096)])
        writer.put_some("pc.ram", np.arange(PAGES), pages)
        head = writer.commit(name, device_state=bytes(range(256)) * 40, disks=[], metadata={})
        return {"stored_bytes": head.counts.stored_bytes}


def test_a_snapshot_is_all_that_the_repository_grew_by(tmp_path: Path) -> None:
    """A second one of the same pages stores none of them, and has a manifest and a device state all the same."""
    agent: Any = Saver(tmp_path)
    first, again = snapshots.saved(agent, "one", "first"), snapshots.saved(agent, "one", "again")
    assert first["added_bytes"] > first["stored_bytes"] > PAGES * 4096
    assert again["stored_bytes"] == 0
    assert 0 < again["added_bytes"] < PAGES * 4096
    folder = tmp_path / "state" / "repository"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert snapshots.repository_bytes(folder) == sum(path.stat().st_size for path in files)
    (folder / "locks" / "another").write_bytes(bytes(5000))
    (folder / "tmp" / "left").write_bytes(bytes(5000))
    assert snapshots.repository_bytes(folder) == sum(path.stat().st_size for path in files)


def test_a_span_ends_when_qemu_says_that_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [
        Event("MIGRATION", {"status": "active"}, 1_000_000),
        Event("MIGRATION", {"status": "completed"}, 2_000_000),
        Event("RESUME", {}, 3_500_000),
    ]

    class Client:
        def __init__(self) -> None:
            self.left = iter(told)

        def events(self, deadline_s: float) -> Any:
            return self.left

    client: Any = Client()
    assert lazy._event(client, "MIGRATION", status="completed") == 2.0
    assert lazy._event(client, "RESUME") == 3.5
    with pytest.raises(QemuError, match="no RESUME"):
        lazy._event(client, "RESUME")
