"""`vmferry bench disks`: a disk's mirror by vmferry and by a bare QMP script, by turns, in one run.

Theory of operation
-------------------
A guest with one local disk of random bytes, and nothing to do, stands on one host. In each round its disk is mirrored
to the other host once by `vmferry migrate --disks copy`, and once by two QEMUs of a bare script, in an order that
changes from round to round: the same command lines, credentials of the same kind, the same `blockdev-mirror`. What
counts is the time from the first command for the mirror (the connection to the export) until QEMU says that it is
ready; the size of the disk divided by it is the throughput. While one is measured no QEMU of the other is there.

All numbers are medians; only those of the same run may be compared.
"""

from __future__ import annotations

import os
import secrets
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vmferry.bench.raw import RawGuest, RawQemu, exchange
from vmferry.cli.render import table
from vmferry.demo.setup import TwoAgents, choose_qemu
from vmferry.errors import QemuError, UsageError
from vmferry.pki import job_credentials
from vmferry.qmp.codec import Event
from vmferry.testing.netns import Host
from vmferry.units import MIB, format_size
from vmferry.vm import spec as vm_spec
from vmferry.vm.spec import VmSpec

ROUNDS_MIN = 5
DISK_BYTES = 512 * MIB
RATIO_MIN = 0.95
"""What vmferry's throughput has to be of the bare mirror's."""
NAME = "disks"
PORT = "10809"
EXPORT = {"type": "nbd", "id": "raw", "name": "raw", "node-name": "disk0", "writable": True}


@dataclass(frozen=True, slots=True)
class Ground:
    """What both ways have in common."""

    pair: TwoAgents
    spec_path: Path
    spec: VmSpec
    image: Path

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.pair.a.net, self.pair.b.net


def run_bench(*, rounds: int) -> dict[str, Any]:
    """Measures. Raises UsageError, Unfit, QemuError."""
    if rounds < ROUNDS_MIN:
        raise UsageError(f"--rounds {rounds} is too few for a median; at least {ROUNDS_MIN}")
    with TwoAgents(choose_qemu(), disk_dirs=True) as pair:
        ground = _prepare(pair)
        taken: dict[str, list[float]] = {"raw": [], "vmferry": []}
        for number in range(rounds + 1):
            order = ("raw", "vmferry") if number % 2 else ("vmferry", "raw")
            for name in order:
                taken[name].append(_bare(ground) if name == "raw" else _ferried(ground))
        return _result({name: all_of[1:] for name, all_of in taken.items()}, rounds=rounds, qemu=pair.qemu)


def _prepare(pair: TwoAgents) -> Ground:
    image = pair.folder / "disk.img"
    with image.open("wb") as file:
        for _ in range(DISK_BYTES // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    path = pair.folder / f"{NAME}.toml"
    path.write_text(f'name = "{NAME}"\nmemory = "64M"\naccel = "tcg"\n[[disk]]\npath = "{image}"\nshared = false\n')
    machine = str(pair.a.vmferry("run", str(path))["machine"])
    pair.a.vmferry("stop", NAME, "--force")
    return Ground(pair, path, vm_spec.pin(vm_spec.load(path), machine=machine, accel="tcg"), image)


def _ferried(ground: Ground) -> float:
    """Seconds that vmferry's mirror took. The guest has moved then, and is ended where it is."""
    here, there = ground.pair.a, ground.pair.b
    here.vmferry("run", str(ground.spec_path))
    wire = here.vmferry("migrate", NAME, there.name, "--disks", "copy", "--mode", "precopy")
    there.vmferry("stop", NAME, "--force")
    (there.disks / ground.image.name).unlink()
    at_ms = {str(row["what"]): float(row["at_ms"]) for row in wire["timeline"]}
    return (at_ms["disks-ready"] - at_ms["disks-started"]) / 1000


def _bare(ground: Ground) -> float:
    """Seconds that the script's mirror took."""
    copied = ground.pair.folder / "raw.img"
    with copied.open("xb") as file:
        file.truncate(DISK_BYTES)
    (disk,) = ground.spec.disk
    spec_there = msgspec.structs.replace(ground.spec, disk=(msgspec.structs.replace(disk, path=str(copied)),))
    folder = ground.pair.folder / f"raw-{secrets.token_hex(4)}"
    folder.mkdir()
    here = RawGuest(ground.spec, ground.pair.qemu, folder, ground.hosts, with_tls=True)
    other = RawGuest(spec_there, ground.pair.qemu, folder, ground.hosts, with_tls=True, count=1)
    with ground.hosts[0].inside():
        here.start()
    there: RawQemu | None = None
    try:
        with ground.hosts[1].inside():
            there = other.spawn(incoming=True)
        return _mirror(here, there, ground.hosts[1].address)
    finally:
        if there is not None:
            there.close()
        here.close()
        copied.unlink()


def _mirror(here: RawGuest, there: RawQemu, address: str) -> float:
    job, source = secrets.token_hex(16), here.qemu
    setup = {side: here.setup(job, side) for side in ("source", "destination")}
    exchange(setup["source"], setup["destination"])
    creds = f"vmferry-tls-{job_credentials.tag(job)}"
    for side, monitor in (("source", source.monitor), ("destination", there.monitor)):
        monitor.execute("object-add", setup[side].creds)
    at = {"host": address, "port": PORT}
    there.monitor.execute("nbd-server-start", {"addr": {"type": "inet", "data": at}, "tls-creds": creds})
    there.monitor.execute("block-export-add", EXPORT)
    target = {
        "driver": "nbd", "node-name": "copy", "server": {"type": "inet", **at}, "export": "raw", "discard": "unmap",
        "detect-zeroes": "unmap", "tls-creds": creds, "tls-hostname": job_credentials.tls_hostname(job),
    }  # fmt: skip
    version = source.monitor.execute("query-version")["qemu"]
    wanted: dict[str, Any] = {"job-id": "copy", "device": "disk0", "target": "copy", "sync": "full"}
    wanted["copy-mode"] = "background" if (version["major"], version["minor"]) >= (8, 2) else "write-blocking"
    if (version["major"], version["minor"]) >= (10, 1):
        wanted["target-is-zero"] = True
    began_s = time.monotonic()
    source.monitor.execute("blockdev-add", target)
    source.monitor.execute("blockdev-mirror", wanted)
    source.wait(_is_ready)
    took_s = time.monotonic() - began_s
    for part in setup.values():
        part.forget()
    return took_s


def _is_ready(event: Event) -> bool:
    if event.name == "BLOCK_JOB_COMPLETED":
        raise QemuError("the raw mirror failed", cause=str(event.data))
    return event.name == "BLOCK_JOB_READY"


def _result(taken: dict[str, list[float]], *, rounds: int, qemu: str) -> dict[str, Any]:
    speeds = {name: DISK_BYTES / statistics.median(all_of) for name, all_of in taken.items()}
    ratio = speeds["vmferry"] / speeds["raw"]
    return {
        "result": "ok",
        "throughput_ratio": round(ratio, 3),
        "goals_met": {"throughput": ratio >= RATIO_MIN},
        "bytes_per_s": {name: round(speed) for name, speed in speeds.items()},
        "seconds": {name: [round(value, 3) for value in all_of] for name, all_of in taken.items()},
        "disk_bytes": DISK_BYTES,
        "rounds": rounds,
        "qemu": qemu,
        "load_average": os.getloadavg()[0],
    }


def report_lines(result: dict[str, Any]) -> list[str]:
    """The table for people."""
    rows = [
        (name, f"{format_size(result['bytes_per_s'][name])}/s", f"{statistics.median(result['seconds'][name]):.2f} s")
        for name in ("raw", "vmferry")
    ]
    met = "at least" if result["goals_met"]["throughput"] else "BELOW"
    return [
        *table(("BY", "THROUGHPUT", f"FOR {format_size(result['disk_bytes'])}"), rows),
        "",
        f"vmferry's mirror has {result['throughput_ratio']:.3f} of the bare one's throughput, {met} {RATIO_MIN}",
        f"medians of {result['rounds']} rounds; the machine's load was {result['load_average']:.1f}",
    ]
