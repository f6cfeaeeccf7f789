"""A real QEMU that loads a stream file of a kept guest, paused: the outside judge of `vmferry export`.

Rule 1: it is given what anybody would give it: the guest's own command line and `exec:cat FILE`. Nothing of vmferry's
        endpoints is in between.
Rule 2: a loader ends only its own process.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from vmferry.agent.vms import VmDefinition
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.errors import QmpDisconnected
from vmferry.testing.hosts import POLL_S, wait_true
from vmferry.vm.runtime import RuntimePaths

LOAD_S = 60.0
PAGE_BYTES = 4096
_HOLE_PAGES = (640 * 1024 // PAGE_BYTES, 1024 * 1024 // PAGE_BYTES)
"""Below the first MiB the chipset decides what an address shows."""


class StreamLoader:
    """`with StreamLoader(definition, FILE, qemu, folder) as guest:` has it loaded and paused; `run` starts it."""

    def __init__(self, definition: dict[str, Any], file: Path, qemu: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        runtime = RuntimePaths(str(folder))
        argv = VmDefinition.from_wire(definition).incoming_argv(runtime, str(qemu))
        self._log = (folder / "loader.log").open("wb")
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self.qmp = self._connect(runtime.qmp_path)
            self.qmp.execute("migrate-incoming", {"uri": f"exec:cat {file}"})
            wait_true(self._is_loaded, timeout_s=LOAD_S, why="the stream is loaded")
        except BaseException:
            self.close()
            raise

    def _connect(self, path: str) -> BlockingClient:
        end_s = time.monotonic() + LOAD_S
        while True:
            try:
                return BlockingClient(path, name="the loader")
            except QmpDisconnected:
                self._require_alive()
                if time.monotonic() > end_s:
                    raise
                time.sleep(POLL_S)

    def _require_alive(self) -> None:
        assert self.process.poll() is None, (self.folder / "loader.log").read_text(errors="replace")

    def _is_loaded(self) -> bool:
        self._require_alive()
        info = self.qmp.execute("query-migrate")
        assert info.get("status") != "failed", (self.folder / "loader.log").read_text(errors="replace")
        return bool(info.get("status") == "completed" and self.qmp.execute("query-status")["status"] == "paused")

    def ram(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Pages of the guest's memory, by address from 0 on."""
        return read_ram(self.qmp, self.folder / "ram", size_bytes)

    def run(self) -> None:
        """`cont`."""
        self.qmp.execute("cont")

    def close(self) -> None:
        """Ends the process."""
        if hasattr(self, "qmp"):
            self.qmp.close()
        self.process.kill()
        self.process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_ram(qmp: BlockingClient, file: Path, size_bytes: int) -> npt.NDArray[np.uint8]:
    """Pages of a guest's memory, as its QEMU itself reads them (`pmemsave`). The guest must stand still."""
    qmp.execute("pmemsave", {"val": 0, "size": size_bytes, "filename": str(file)}, deadline_s=LOAD_S)
    try:
        return np.fromfile(file, np.uint8).reshape(-1, PAGE_BYTES)
    finally:
        file.unlink()


def differing_pages(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> list[int]:
    """Numbers of pages that differ, but for those that the chipset hides."""
    assert one.shape == other.shape
    different = (one != other).any(axis=1)
    different[slice(*_HOLE_PAGES)] = False
    return [int(each) for each in np.flatnonzero(different)]
