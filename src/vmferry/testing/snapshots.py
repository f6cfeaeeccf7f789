"""Snapshots for tests and benches of restores: a guest from a spec, run without an agent, and put into a repository.

Theory of operation
-------------------
`SpecGuest` starts the QEMU that an agent would start for a spec (same command line, `vm.argv`), and `save` does what a
save does with the guest at rest: precopy into our own `Incoming`, pages into a `SnapshotWriter`. What was captured is
kept as an `Image`, so that whatever is restored can be compared with it page by page.

Rule 1: only its own process is ended, and nothing of it is left but the repository and the spec's disks.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Literal

from vmferry.agent.vm_commands import definition_of
from vmferry.core.facts import Fact
from vmferry.engine import frozen
from vmferry.engine.image import PAGE_BYTES, Image
from vmferry.engine.incoming import Incoming
from vmferry.errors import QemuError
from vmferry.store.manifest import Block
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository
from vmferry.store.writer import SnapshotWriter
from vmferry.testing.qemu_process import QemuProcess
from vmferry.testing.stream_peers import FAST, unix_listener
from vmferry.vm import argv as vm_argv
from vmferry.vm import spec as vm_spec
from vmferry.vm.runtime import RuntimePaths

WAIT_S = 240.0
DOWNTIME_MS_MAX = 2_000_000
"""As much as QEMU takes."""
_RUN_PAGES = 1024


class SpecGuest(QemuProcess):
    """A QEMU that runs a spec."""

    trouble = QemuError

    def __init__(self, spec: Path | str, *, qemu: Path, version: str, machine: str) -> None:
        loaded = vm_spec.load(spec)
        self.spec = vm_spec.pin(loaded, machine=machine, accel="tcg")
        self.folder = Path(tempfile.mkdtemp(prefix="vmf-saved-", dir="/tmp"))
        self.runtime = RuntimePaths(str(self.folder))
        argv = vm_argv.build_argv(
            self.spec, qemu=str(qemu), machine=machine, accel="tcg", runtime=self.runtime, incoming=False,
            start_paused=False,
        )  # fmt: skip
        super().__init__(argv, version=version, folder=self.folder, qmp_path=self.runtime.qmp_path)

    @property
    def serial(self) -> bytes:
        """What the guest wrote so far."""
        path = Path(self.runtime.serial_log_path)
        return path.read_bytes() if path.exists() else b""

    def capture(self) -> Image:
        """The guest as an image. It is stopped and stays so. The caller closes the image."""
        image = Image()
        incoming = Incoming(image)
        path = self.folder / f"out{time.monotonic_ns()}"
        listener, uri = unix_listener(path)
        incoming.listen(listener)
        states = [{"capability": name, "state": True} for name in ("events", "return-path")]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": states})
        # A guest that fills memory all the time is stopped at once: nobody counts how long it stands here.
        self.qmp.execute("migrate-set-parameters", {**FAST, "downtime-limit": DOWNTIME_MS_MAX})
        self.qmp.execute("migrate", {"uri": uri})
        try:
            if incoming.ledger.wait(Fact.ALL_SENT, Fact.ERROR, timeout_s=WAIT_S) is not Fact.ALL_SENT:
                raise QemuError(f"the guest could not be captured: {incoming.error}")
        finally:
            incoming.stop()
            path.unlink()
        self.until(lambda: self.qmp.execute("query-status")["status"] == "postmigrate", "postmigrate", WAIT_S)
        return image

    def go_on(self) -> None:
        """After `capture`: the guest runs again."""
        self.qmp.execute("cont")

    def save(
        self, repository: Repository, name: str, *, base: SnapshotReader | None = None, was_running: bool = True
    ) -> tuple[str, Image]:
        """Captures the guest, which stays stopped, and keeps it under this name: the snapshot's id, and the image."""
        image = self.capture()
        found = put(repository, image, name, words=self.words(was_running=was_running), disks=self.disks(), base=base)
        return found, image

    def words(self, *, was_running: bool = True) -> frozen.SnapshotWords:
        """What the owner of a snapshot of this guest says."""
        return frozen.SnapshotWords(
            vm=self.spec.name, host="test", job="0" * 32, machine=self.spec.machine, qemu_version=self.version,
            was_running=was_running, way="precopy", definition=definition_of(self.spec).to_wire(),
        )  # fmt: skip

    def disks(self) -> list[frozen.FrozenDisk]:
        """Its disks as they are now: nobody may run on them afterwards but in overlays."""
        found = []
        files = [self.spec.kernel.image, self.spec.kernel.initrd] if self.spec.kernel else []
        for path in (*files, self.spec.firmware):
            if path:
                seen = os.stat(path)
                found.append(
                    frozen.FrozenDisk(
                        path=path, format="file", way="read-only", size_bytes=seen.st_size, mtime_ns=seen.st_mtime_ns
                    )
                )
        for disk in self.spec.disk:
            seen = os.stat(disk.path)
            way: Literal["read-only", "external-snapshot"] = "read-only" if disk.is_readonly else "external-snapshot"
            found.append(
                frozen.FrozenDisk(
                    path=disk.path, format=disk.format, way=way, size_bytes=seen.st_size, mtime_ns=seen.st_mtime_ns
                )
            )
        return found


def put(
    repository: Repository,
    image: Image,
    name: str,
    *,
    words: frozen.SnapshotWords,
    disks: list[frozen.FrozenDisk],
    base: SnapshotReader | None = None,
) -> str:
    """Writes an image that is whole as a snapshot; its id."""
    blocks = [Block(each.name, each.wire.used_length, each.wire.page_size or PAGE_BYTES) for each in image]
    with SnapshotWriter(repository, blocks, base=base) as writer:
        for each in image:
            for at in range(0, each.count, _RUN_PAGES):
                writer.put(each.name, at, each.store.read(at, min(_RUN_PAGES, each.count - at)))
        state = frozen.freeze(frozen.state_of(image))
        writer.commit(
            name, device_state=state, disks=[disk.to_wire() for disk in disks], metadata=words.to_wire()
        )  # fmt: skip
        return writer.snapshot
