"""The Linux guest of the tests: Debian's cloud kernel and one program of ours, `guest/watcher.c`.

The program checks memory, disk and time from inside and tells on the serial console; the line protocol is in
guest/watcher.h, its reader in `serial_log`. Only the standard library is used, so that
tools/setup_machine.py can build the guest before a virtual environment exists.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vmferry.testing import cpio
from vmferry.testing.host_tools import HostToolError, project_root, publish, run

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
    fixed_layout: bool = False,
) -> str:
    """The kernel command line (`-append`).

    `ram_mib` is the region that is rewritten at `dirty_mib_per_s` and checked, `const_mib` a second one that
    is only checked; give the machine at least 96 MiB more than both together (`qemus.ram_size`). A full
    check of both takes (ram_mib + const_mib) / check_mib_per_s seconds. `disk` is a device name such as
    "vda"; everything between 1 MiB and 1 MiB + `disk_blocks` * 4 KiB on it is overwritten. `fault_after_s`
    makes the guest damage one page of its own, for tests of the tests. `fixed_layout`: each boot has the same
    pages in use (99.9 % of them; without it 80 to 90 %, as Linux puts itself and all else at a random address).
    """
    kernel = "console=ttyS0 panic=0 tsc=reliable no_timer_check random.trust_cpu=on"
    words = [kernel if verbose_boot else f"{kernel} quiet loglevel=2"]
    if fixed_layout:
        words.append("nokaslr")
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


def built(cache: Path) -> LinuxGuest | None:
    """The guest if `build` has nothing to do, else None. Reads the sources, starts no process."""
    guest = _files(cache)
    stamp = _stamp_path(cache)
    if not (guest.kernel.exists() and guest.initrd.exists() and stamp.exists()):
        return None
    return guest if stamp.read_text() == _digest_of(_sources()) else None


def build(cache: Path) -> LinuxGuest:
    """Builds what is missing or older than its sources under `cache`/linux-guest; at once if all is there.

    Raises HostToolError. **If this raises**, nothing half-written is left under the final names, and it may
    be called again. Needs root only as far as apt does.
    """
    ready = built(cache)
    if ready is not None:
        return ready
    guest = _files(cache)
    home = guest.kernel.parent
    home.mkdir(parents=True, exist_ok=True)
    modules = [home / "modules" / f"{Path(module).name}.ko" for module in MODULES]
    if not guest.kernel.exists() or not all(module.exists() for module in modules):
        _fetch_kernel(home, guest.kernel)
    sources = _sources()
    publish(_initrd(_compile(sources), modules), guest.initrd)
    publish(_digest_of(sources).encode(), _stamp_path(cache))
    return guest


def worker() -> bytes:
    """The program that lets a guest work beside its checks (`rdinit=/worker`): see guest/work/worker.c. Raises
    HostToolError."""
    return _compile([project_root() / "guest" / "work" / "worker.c"])


def _files(cache: Path) -> LinuxGuest:
    home = cache / "linux-guest"
    return LinuxGuest(kernel=home / "vmlinuz", initrd=home / "initrd.gz")


def _stamp_path(cache: Path) -> Path:
    return cache / "linux-guest" / "stamp"


def _sources() -> list[Path]:
    sources = sorted((project_root() / "guest").glob("*.[ch]"))
    if not sources:
        raise HostToolError("guest/*.c is not there: the test guest can only be built from a source tree")
    return sources


def _digest_of(sources: list[Path]) -> str:
    digest = hashlib.sha256(repr((_CC, MODULES)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _initrd(watcher: bytes, modules: list[Path]) -> bytes:
    entries = [
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.directory("proc"),
        cpio.directory("sys"),
        cpio.directory("modules"),
        cpio.file("init", watcher, executable=True),
    ]
    entries += [cpio.file(f"modules/{path.name}", path.read_bytes()) for path in modules]
    return cpio.archive(entries)


def _compile(sources: list[Path]) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "watcher"
        files = [str(source) for source in sources if source.suffix == ".c"]
        run([*_CC, "-s", "-o", str(program), *files])
        return program.read_bytes()


def _fetch_kernel(home: Path, kernel: Path) -> None:
    """Downloads the kernel package with the machine's own apt and takes what we need; installs nothing."""
    package = _concrete_kernel_package()
    with tempfile.TemporaryDirectory(dir=home) as scratch_name:
        scratch = Path(scratch_name)
        try:
            run(["apt-get", "download", package], cwd=scratch)
        except HostToolError:  # lists that are older than the mirror name files that are gone
            run(["apt-get", "update"])
            run(["apt-get", "download", _concrete_kernel_package()], cwd=scratch)
        unpacked = scratch / "x"
        run(["dpkg-deb", "-x", str(_only(scratch, "*.deb")), str(unpacked)])
        tree = _only(unpacked / "lib" / "modules", "*") / "kernel"
        (home / "modules").mkdir(exist_ok=True)
        for module in MODULES:
            path = tree / f"{module}.ko"
            if not path.exists():
                raise HostToolError(f"the kernel package {package} has no module {module}.ko")
            publish(path.read_bytes(), home / "modules" / path.name)
        publish(_only(unpacked / "boot", "vmlinuz-*").read_bytes(), kernel)


def _concrete_kernel_package() -> str:
    """KERNEL_PACKAGE is empty and depends on the newest real one, such as linux-image-6.1.0-9-cloud-amd64."""
    for attempt in ("first", "after update"):
        try:
            printed = run(["apt-cache", "depends", KERNEL_PACKAGE])
        except HostToolError:
            if attempt == "after update":
                raise
            run(["apt-get", "update"])
            continue
        for line in printed.splitlines():
            name = line.strip().removeprefix("Depends: ")
            if name.startswith("linux-image-") and name != KERNEL_PACKAGE:
                return name
    raise HostToolError(f"apt knows no real kernel behind {KERNEL_PACKAGE}; this needs Debian's package lists")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise HostToolError(f"{folder} has {len(found)} entries that match {pattern}; exactly one was expected")
    return found[0]
