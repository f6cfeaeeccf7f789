"""Real QEMUs at the other end of a stream that one of vmferry's own endpoints speaks.

Theory of operation
-------------------
A `QemuPeer` is a QEMU process with the boot-sector guest (or, waiting for a stream, without), a QMP session, and a
folder of its own with a short name for its sockets. Tests give it capabilities and parameters, an order, and wait
for what it says of itself: a status or a run state, or a deadline. Guest memory is compared page by page with what
QEMU itself reads from its guest (`pmemsave`), in pieces, so that a guest of 4 GiB needs no file of 4 GiB.

Rule 1: a peer ends only its own process, whatever happened to it, and `close` leaves nothing behind.
Rule 2: `pmemsave` asks by address, blocks count by offset: `Region` says which part of which block is where.
"""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from vmferry.engine.image import PAGE_BYTES, Image, ImageBlock, MemoryFile
from vmferry.pki import job_credentials
from vmferry.qmp.codec import Event
from vmferry.testing import bootsector
from vmferry.testing.qemu_process import QemuProcess
from vmferry.testing.qemus import available, ram_size

MIB: Final = 1 << 20
WAIT_S: Final = 30.0
FAST: Final[Mapping[str, int]] = {"max-bandwidth": 100 << 30, "max-postcopy-bandwidth": 0}
"""As fast as it goes. A rate limit would make the source look at its requests only ten times a second."""
_PIECE_BYTES: Final = 64 * MIB
_HOLE: Final = (640 * 1024, MIB)
"""Below the first MiB the chipset decides what an address shows."""


@dataclass(frozen=True, slots=True)
class Region:
    """`length` bytes of a block from `offset` on, which the guest sees at `address`."""

    block: str
    offset: int
    address: int
    length: int


def low_ram(length: int, block: str = "pc.ram") -> list[Region]:
    """Ordinary memory of a pc, below 3 GiB."""
    below, above = _HOLE
    return [Region(block, 0, 0, below), Region(block, above, above, length - above)]


class QemuPeer(QemuProcess):
    """A QEMU. A context manager: leaving it ends the process and removes the folder.

    `touch_mib`: the guest changes pages from 1 MiB up to there, `delay_loops` slows it down; 0: there is no guest but
    the firmware. `memory`: what `-m` takes, if not `ram_mib`. `incoming`: it waits for `migrate_incoming`.
    """

    def __init__(
        self,
        version: str,
        *,
        machine: str = "pc",
        ram_mib: int = 64,
        touch_mib: int = 48,
        delay_loops: int = 2000,
        memory: str = "",
        incoming: bool = False,
        more: Sequence[str] = (),
    ) -> None:
        self.machine = machine
        self.memory = memory or ram_size(ram_mib)
        self.ram_bytes = int(self.memory.removesuffix("k")) * 1024 if self.memory.endswith("k") else ram_mib * MIB
        self.heard: list[Event] = []
        self.folder = Path(tempfile.mkdtemp(prefix="vmf-peer-"))
        self._began_s = time.monotonic()
        argv = [str(available()[version]), "-nodefaults", "-display", "none", "-accel", "tcg"]
        argv += ["-machine", machine, "-m", self.memory, "-serial", f"file:{self.folder}/serial"]
        argv += ["-qmp", f"unix:{self.folder}/qmp,server=on,wait=off", *more]
        disk = self.folder / "disk.img"
        bootsector.write_image(disk, ram_mib=max(touch_mib, 2), delay_loops_per_page=delay_loops)
        argv += ["-drive", f"file={disk},format=raw,if=ide,snapshot=on"]
        if incoming:
            argv += ["-incoming", "defer"]
        super().__init__(argv, version=version, folder=self.folder, qmp_path=f"{self.folder}/qmp")
        if touch_mib and not incoming:
            try:
                self.until_passes(1)
            except BaseException:
                self.close()
                raise

    # --- orders -------------------------------------------------------------------------------------------

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline_s: float = 20) -> Any:
        """A command; the events that come meanwhile are kept."""
        return self.qmp.execute(command, arguments, deadline_s=deadline_s, on_event=self.heard.append)

    def set_up(self, *capabilities: str, off: Any = (), **parameters: Any) -> None:
        """Capabilities beside return-path and events, and parameters (`max_bandwidth=…`) beside `FAST`."""
        wanted = {"return-path": True, "events": True, **dict.fromkeys(capabilities, True), **dict.fromkeys(off, False)}
        states = [{"capability": name, "state": on} for name, on in wanted.items()]
        self.execute("migrate-set-capabilities", {"capabilities": states})
        given = {name.replace("_", "-"): value for name, value in parameters.items()}
        self.execute("migrate-set-parameters", {**FAST, **given})

    def use_tls(self, tls: TlsPair) -> None:
        """The next migration runs under TLS, with this QEMU as its source."""
        self.execute("object-add", tls.source_object())
        arguments = {"tls-creds": tls.source_object()["id"], "tls-hostname": tls.hostname}
        self.execute("migrate-set-parameters", arguments)

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        """The source begins, or goes on after a pause."""
        self.execute("migrate", {"uri": uri, **({"resume": True} if resume else {})})

    def migrate_incoming(self, uri: str) -> None:
        """The destination listens. A newer QEMU is told to survive a failure."""
        stays = {"exit-on-error": False} if self.number >= (9, 1) else {}
        self.execute("migrate-incoming", {"uri": uri, **stays})

    # --- what it says -------------------------------------------------------------------------------------

    @property
    def number(self) -> tuple[int, ...]:
        """(11, 1)."""
        return tuple(int(part) for part in self.version.split("."))

    @property
    def status(self) -> str:
        """The migration's status, "none" before there is one."""
        return str(self.execute("query-migrate").get("status", "none"))

    @property
    def runstate(self) -> str:
        """The guest's run state."""
        return str(self.execute("query-status")["status"])

    @property
    def passes(self) -> int:
        """How often the guest went over its memory, as it says itself. Raises LogError."""
        return bootsector.count_passes((self.folder / "serial").read_bytes())

    def statuses(self) -> list[str]:
        """Every status that was told by event so far."""
        self.execute("query-status")  # the events before its answer are heard then
        return [str(each.data["status"]) for each in self.heard if each.name == "MIGRATION"]

    def until_status(self, *words: str, timeout_s: float = WAIT_S) -> str:
        """Waits until the status is one of these. Raises AssertionError."""
        self.until(lambda: self.status in words, f"status {' or '.join(words)}", timeout_s)
        return self.status

    def until_runstate(self, *words: str, timeout_s: float = WAIT_S) -> str:
        """Waits until the run state is one of these. Raises AssertionError."""
        self.until(lambda: self.runstate in words, f"run state {' or '.join(words)}", timeout_s)
        return self.runstate

    def until_passes(self, count: int, timeout_s: float = WAIT_S) -> None:
        """Waits until the guest has been over its memory so often."""
        serial = self.folder / "serial"
        self.until(lambda: serial.exists() and self.passes >= count, f"{count} passes of the guest", timeout_s)

    def is_alive(self, timeout_s: float = WAIT_S) -> bool:
        """Whether the guest goes on: true once it has done two more passes. Raises AssertionError if it does not."""
        self.until_passes(self.passes + 2, timeout_s)
        return True

    # --- memory -------------------------------------------------------------------------------------------

    def bar_of(self, device: str, number: int = 0) -> int:
        """The address at which a PCI device's memory bar is."""
        for bus in self.execute("query-pci"):
            for each in bus["devices"]:
                if each["qdev_id"] == device:
                    return int(next(bar["address"] for bar in each["regions"] if bar["bar"] == number))
        raise AssertionError(f"no device {device}")

    def differing_pages(self, image: Image, regions: Sequence[Region] | None = None) -> list[tuple[str, int]]:
        """Pages (block, number) whose content differs from the image's. The guest must be stopped."""
        found: list[tuple[str, int]] = []
        for region in low_ram(self.ram_bytes) if regions is None else regions:
            block = image.blocks[region.block]
            for at in range(0, region.length, _PIECE_BYTES):
                length = min(_PIECE_BYTES, region.length - at)
                mine = _read(block, region.offset + at, length)
                theirs = self.read_memory(region.address + at, length)
                bad = np.flatnonzero((mine != theirs).any(axis=1))
                found += [(region.block, (region.offset + at) // PAGE_BYTES + int(each)) for each in bad]
        return found

    def read_memory(self, address: int, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        """Guest memory, one page per row."""
        file = self.folder / "memory"
        self.execute("pmemsave", {"val": address, "size": length, "filename": str(file)}, deadline_s=60)
        found = np.fromfile(file, np.uint8)
        file.unlink()
        return found.reshape(-1, PAGE_BYTES)


def _read(block: ImageBlock, offset: int, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Pages of the image. By `pread`, because looking at a hole of a mapped memory file fills it."""
    assert isinstance(block.store, MemoryFile)
    return np.frombuffer(os.pread(block.store.fd, length, offset), np.uint8).reshape(-1, PAGE_BYTES)


class TlsPair:
    """Certificates of one migration between a QEMU and an endpoint."""

    _JOB = "0123456789abcdef"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        now = datetime.now(UTC)
        source = job_credentials.make(self._JOB, "source", folder, now=now)
        destination = job_credentials.make(self._JOB, "destination", folder, now=now)
        source.accept_peer(destination.ca_pem_own)
        destination.accept_peer(source.ca_pem_own)
        self._sides = {"source": source.directory, "destination": destination.directory}
        self.hostname = job_credentials.tls_hostname(self._JOB)

    def source_object(self) -> dict[str, Any]:
        """What QMP's object-add takes, for a QEMU that is the source."""
        return job_credentials.tls_creds_object(self._JOB, "source", self.folder)

    def destination_object(self) -> dict[str, Any]:
        """What QMP's object-add takes, for a QEMU that is the destination."""
        return job_credentials.tls_creds_object(self._JOB, "destination", self.folder)

    def server(self) -> ssl.SSLContext:
        """For an endpoint that is the destination."""
        return self._context(ssl.PROTOCOL_TLS_SERVER, "destination", "server")

    def client(self) -> ssl.SSLContext:
        """For an endpoint that is the source."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT, "source", "client")
        context.check_hostname = True
        return context

    def _context(self, protocol: int, side: str, endpoint: str) -> ssl.SSLContext:
        directory = self._sides[side]
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cafile=directory / "ca-cert.pem")
        context.load_cert_chain(directory / f"{endpoint}-cert.pem", directory / f"{endpoint}-key.pem")
        return context


def unix_listener(path: Path) -> tuple[socket.socket, str]:
    """A listening socket and its address as a migration's URI."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(32)
    return listener, f"unix:{path}"
