"""A QEMU that a test or a bench starts and ends: its process, its QMP session, and what it wrote.

Rule 1: only its own process is ended, whatever happened to it, and `close` leaves nothing behind.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.errors import QmpDisconnected

START_S, POLL_S = 60.0, 0.005


class QemuProcess:
    """A context manager: leaving it ends the process and removes `folder`, which is its own.

    `trouble`: what is raised when the process ends, or something is not so in time.
    """

    trouble: type[Exception] = AssertionError

    def __init__(self, argv: Sequence[str], *, version: str, folder: Path, qmp_path: str) -> None:
        self.version, self.folder, self._qmp_path = version, folder, qmp_path
        self.log = (folder / "log").open("w+b")
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        try:
            self.until(self._connect, "QMP", START_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, in whatever state it is. May be called twice."""
        if hasattr(self, "qmp"):
            self.qmp.close()
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def until(self, is_so: Callable[[], Any], what: str, timeout_s: float) -> None:
        """Looks until it is so. Raises `trouble`."""
        until_s = time.monotonic() + timeout_s
        while not is_so():
            if self.process.poll() is not None:
                raise self.trouble(f"QEMU {self.version} ended ({self.process.returncode}): {self.said()}")
            if time.monotonic() > until_s:
                raise self.trouble(f"QEMU {self.version}: no {what} within {timeout_s:g} s; {self._brief()}")
            time.sleep(POLL_S)

    def said(self) -> str:
        """What it wrote on its standard output and error."""
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")[-2000:]

    def _brief(self) -> str:
        try:
            found = self.qmp.execute("query-migrate"), self.qmp.execute("query-status")
        except (AttributeError, QmpDisconnected):
            return self.said()
        return f"{found[0].get('status')} {found[0].get('error-desc', '')}, {found[1]['status']}, {self.said()}"

    def _connect(self) -> bool:
        """Whether QMP answers; a moment after the socket has appeared, QEMU does not listen yet."""
        if not Path(self._qmp_path).exists():
            return False
        try:
            # It answers only when all of its memory is there.
            self.qmp = BlockingClient(self._qmp_path, name=f"QEMU {self.version}", deadline_s=START_S)
        except QmpDisconnected:
            return False
        return True
