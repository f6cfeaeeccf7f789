"""The Linux guest of the tests: Debian's cloud kernel and one program of ours, `guest/watcher.c`.

The program checks memory, disk and time from inside and tells on the serial console; the line protocol is in
guest/watcher.h, its reader in `serial_log`. Only the standard library is used, so that
tools/setup_machine.py can build the guest before a virtual environment exists.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vmferry.testing import cpio

KERNEL_PACKAGE = "linux-image-cloud-amd64"
# guest/drivers.c loads them in this order, as far as the devices are there; the package has no modules.dep.
MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/block/virtio_blk",
    "drivers/char/hw_random/virtio-rng",
    "drivers/virtio/virtio_balloon",
)
_CC = ("gcc", "-static", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread")


class GuestBuildError(RuntimeError):
    """The test guest could not be built; the message holds the failed command and what it printed."""


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """What `-kernel` and `-initrd` take."""

    kernel: Path
    initrd: Path


def cmdline(
    *,
    dirty_mib_per_s: int = 0,
    ram_mib: int = 32,
    const_mib: int = 8,
    check_mib_per_s: int = 32,
    tick_ms: int = 10,
    disk: str | None = None,
    disk_write_ms: int = 50,
    disk_blocks: int = 128,
    fault_after_s: int = 0,
    verbose_boot: bool = False,
) -> str:
    """The kernel command line (`-append`).

    `ram_mib` is the region that is rewritten at `dirty_mib_per_s` and checked, `const_mib` a second one that
    is only checked; give the machine at least 96 MiB more than both together. A full check of both takes
    (ram_mib + const_mib) / check_mib_per_s seconds. `disk` is a device name such as "vda"; everything between
    1 MiB and 1 MiB + `disk_blocks` * 4 KiB on it is overwritten. `fault_after_s` makes the guest damage one
    page of its own, for tests of the tests.
    """
    kernel = "console=ttyS0 panic=0 tsc=reliable no_timer_check random.trust_cpu=on"
    words = [kernel if verbose_boot else f"{kernel} quiet loglevel=2"]
    numbers = {
        "dirty_mib_per_s": dirty_mib_per_s,
        "ram_mib": ram_mib,
        "const_mib": const_mib,
        "check_mib_per_s": check_mib_per_s,
        "tick_ms": tick_ms,
        "disk_write_ms": disk_write_ms,
        "disk_blocks": disk_blocks,
        "fault_after_s": fault_after_s,
    }
    words += [f"vmferry.{name}={value}" for name, value in numbers.items()]
    if disk is not None:
        words.append(f"vmferry.disk={disk}")
    return " ".join(words)


def default_cache() -> Path:
    """Where built and downloaded things live: $VMFERRY_CACHE, else `.cache` in the project's root."""
    chosen = os.environ.get("VMFERRY_CACHE")
    return Path(chosen) if chosen else _project_root() / ".cache"


def build(cache: Path) -> LinuxGuest:
    """Builds what is missing or older than its sources under `cache`/linux-guest; at once if all is there.

    Raises GuestBuildError. **If this raises**, nothing half-written is left under the final names, and it may
    be called again. Needs root only as far as apt does.
    """
    home = cache / "linux-guest"
    home.mkdir(parents=True, exist_ok=True)
    guest = LinuxGuest(kernel=home / "vmlinuz", initrd=home / "initrd.gz")
    unpacked = home / "kernel-package"
    if not guest.kernel.exists() or not unpacked.exists():
        _fetch_kernel(home, unpacked)
        _publish(_only(unpacked / "boot", "vmlinuz-*").read_bytes(), guest.kernel)
    sources = sorted((_project_root() / "guest").glob("*.[ch]"))
    if not sources:
        raise GuestBuildError("guest/*.c is not there: the test guest can only be built from a source tree")
    digest = _digest_of(sources)
    built_from = home / "initrd.sources"
    if not guest.initrd.exists() or not built_from.exists() or built_from.read_text() != digest:
        _publish(_initrd(_compile(sources), unpacked), guest.initrd)
        _publish(digest.encode(), built_from)
    return guest


def _project_root() -> Path:
    return Path(__file__).resolve().parents[3]


def _digest_of(sources: list[Path]) -> str:
    digest = hashlib.sha256(repr((_CC, MODULES)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _initrd(watcher: bytes, unpacked: Path) -> bytes:
    modules = _only(unpacked / "lib" / "modules", "*") / "kernel"
    entries = [
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.directory("proc"),
        cpio.directory("sys"),
        cpio.directory("modules"),
        cpio.file("init", watcher, executable=True),
    ]
    for module in MODULES:
        path = modules / f"{module}.ko"
        if not path.exists():
            raise GuestBuildError(f"the kernel package has no module {module}.ko")
        entries.append(cpio.file(f"modules/{path.name}", path.read_bytes()))
    return cpio.archive(entries)


def _compile(sources: list[Path]) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "watcher"
        files = [str(source) for source in sources if source.suffix == ".c"]
        _run([*_CC, "-s", "-o", str(program), *files])
        return program.read_bytes()


def _fetch_kernel(home: Path, unpacked: Path) -> None:
    """Downloads the kernel package with the machine's own apt and unpacks it; installs nothing."""
    package = _concrete_kernel_package()
    with tempfile.TemporaryDirectory(dir=home) as scratch_name:
        scratch = Path(scratch_name)
        try:
            _run(["apt-get", "download", package], cwd=scratch)
        except GuestBuildError:  # lists that are older than the mirror name files that are gone
            _run(["apt-get", "update"])
            _run(["apt-get", "download", _concrete_kernel_package()], cwd=scratch)
        _run(["dpkg-deb", "-x", str(_only(scratch, "*.deb")), str(scratch / "x")])
        if unpacked.exists():
            shutil.rmtree(unpacked)
        (scratch / "x").rename(unpacked)


def _concrete_kernel_package() -> str:
    """KERNEL_PACKAGE is empty and depends on the newest real one, such as linux-image-6.1.0-9-cloud-amd64."""
    for attempt in ("first", "after update"):
        try:
            printed = _run(["apt-cache", "depends", KERNEL_PACKAGE])
        except GuestBuildError:
            if attempt == "after update":
                raise
            _run(["apt-get", "update"])
            continue
        for line in printed.splitlines():
            name = line.strip().removeprefix("Depends: ")
            if name.startswith("linux-image-") and name != KERNEL_PACKAGE:
                return name
    raise GuestBuildError(f"apt knows no real kernel behind {KERNEL_PACKAGE}; this needs Debian's package lists")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise GuestBuildError(f"{folder} has {len(found)} entries that match {pattern}; exactly one was expected")
    return found[0]


def _publish(data: bytes, path: Path) -> None:
    """The file appears whole or not at all, also when two builds run at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as half:
        half.write(data)
    Path(half.name).chmod(0o644)
    os.replace(half.name, path)


def _run(argv: list[str], *, cwd: Path | None = None) -> str:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GuestBuildError(f"{argv[0]}: {error}") from error
    if done.returncode != 0:
        raise GuestBuildError(f"{' '.join(argv)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
