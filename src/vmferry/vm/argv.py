"""From a VM spec to QEMU's command line.

Theory of operation
-------------------
The guest sees what QEMU's device list says, and a migration needs the same list on both sides. So nothing
is left to QEMU's defaults: every device has an id, a bus and an address, memory has a fixed block name,
cards have no option ROM (its size depends on the host's firmware package). The address of a device follows
from its kind and its index in the spec and from nothing else.

Rule 1: an incoming QEMU always has -S and `-incoming defer`: its vCPUs run only when vmferry says so.
Rule 2: guest-visible parts depend on the spec alone; paths, sockets and logs may differ between hosts.
Rule 3: the slot tables below are a promise to every VM that runs: they may grow and never change.
"""

from __future__ import annotations

import posixpath
from typing import Any, Literal

from vmferry import limits
from vmferry.errors import SpecError
from vmferry.vm import qemuopts
from vmferry.vm.runtime import RuntimePaths
from vmferry.vm.spec import Disk, Network, VmSpec

# PCI slots on the root bus. Slots 0 to 2 belong to the chipset and a display card, 0x1f to q35's own
# devices; 0x1a to 0x1e stay free for extra_args.
SLOT_RNG = 0x03
SLOT_SCSI = 0x04
SLOT_NETWORK = 0x05
SLOT_DISK = SLOT_NETWORK + limits.VM_NETWORKS_MAX
SLOT_BALLOON = SLOT_DISK + limits.VM_DISKS_MAX
assert SLOT_BALLOON < 0x1A, "the slot table left no room on the bus"

_CACHE: dict[str, tuple[bool, bool, bool]] = {
    # mode: (direct I/O, no flush, write cache of the guest's disk), as QEMU defines its cache modes
    "none": (True, False, True),
    "writeback": (False, False, True),
    "writethrough": (False, False, False),
    "directsync": (True, False, False),
    "unsafe": (False, True, True),
}


def build_argv(
    spec: VmSpec,
    *,
    qemu: str,
    machine: str,
    accel: Literal["tcg", "kvm"],
    runtime: RuntimePaths,
    incoming: bool,
    start_paused: bool = True,
) -> list[str]:
    """The command line of a QEMU that runs `spec`, or waits for it (`incoming`).

    `machine` is the versioned machine type, `accel` the chosen accelerator. The QEMU listens on
    `runtime.qmp_path`. With `start_paused` (and always when `incoming`) no instruction of the guest runs
    before `cont`. Pure: nothing is created. Raises SpecError when the spec and `machine` do not fit.
    """
    if machine in ("q35", "pc"):
        raise SpecError(f"{spec.name}: machine {machine!r} is an alias; the versioned name is needed")
    if ("q35" in machine) != (spec.machine_family == "q35"):
        raise SpecError(f"{spec.name}: the spec has machine {spec.machine!r}, which is not {machine!r}")
    args = [qemu, "-name", qemuopts.render((("guest", spec.name), ("debug-threads", "on")), implied="guest")]
    args += ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"]
    args += ["-msg", "timestamp=on"]
    if start_paused or incoming:
        args.append("-S")
    args += ["-accel", accel, "-cpu", spec.cpu, "-smp", f"cpus={spec.cpus}"]
    args += _memory(spec, machine, accel, runtime)
    if spec.uuid is not None:
        args += ["-uuid", spec.uuid]
    args += _boot(spec)
    args += _control(spec, runtime)
    args += _rng(spec) + _scsi_controller(spec) + _networks(spec) + _disks(spec) + _balloon(spec)
    args += spec.extra_args
    if incoming:
        args += ["-incoming", "defer"]
    return args


TCG_ODD_BYTES = 8 * 1024
"""QEMU before 9.0 loses writes of a TCG guest that migrates: it reads the dirty bitmap in steps of 256 KiB and
then forgets to have the CPU report its next write there (mended upstream by "physmem: Fix migration dirty bitmap
coherency with TCG memory access"). RAM that is no multiple of 256 KiB is walked page by page, which is right in
every version. Every TCG guest gets this much more, also under a newer QEMU: it may have come from an old one."""
TCG_STEP_BYTES = 256 * 1024


def ram_bytes(spec: VmSpec, accel: Literal["tcg", "kvm"]) -> int:
    """What the guest's memory really measures: the spec's size, and under TCG 8 KiB more (`TCG_ODD_BYTES`)."""
    extra = TCG_ODD_BYTES if accel == "tcg" and spec.memory_bytes % TCG_STEP_BYTES == 0 else 0
    return spec.memory_bytes + extra


def _memory(spec: VmSpec, machine: str, accel: Literal["tcg", "kvm"], runtime: RuntimePaths) -> list[str]:
    """One memory object whose migration name is 'pc.ram', as a QEMU without such an object has it."""
    backend = spec.memory_backend
    size_bytes = ram_bytes(spec, accel)
    options: dict[str, Any] = {
        "qom-type": f"memory-backend-{backend.kind}",
        "id": "pc.ram",
        "size": size_bytes,
        "share": backend.shared,
        "prealloc": backend.prealloc,
        "x-use-canonical-path-for-ramblock-id": False,
    }
    if backend.kind == "file":
        options["mem-path"] = runtime.ram_path("pc.ram")
    if backend.hugepages:
        options["hugetlb"] = True
    return [
        "-object",
        qemuopts.render_json(options),
        "-machine",
        f"{machine},memory-backend=pc.ram",
        "-m",
        f"size={size_bytes // 1024}K",
    ]


def _boot(spec: VmSpec) -> list[str]:
    args = ["-boot", "strict=on"] if any(disk.boot is not None for disk in spec.disk) else []
    if spec.firmware is not None:
        args += ["-bios", spec.firmware]
    if spec.kernel is not None:
        args += ["-kernel", spec.kernel.image]
        if spec.kernel.initrd is not None:
            args += ["-initrd", spec.kernel.initrd]
        if spec.kernel.cmdline:
            args += ["-append", spec.kernel.cmdline]
    return args


def _control(spec: VmSpec, runtime: RuntimePaths) -> list[str]:
    """QMP, and the serial port."""
    serial: tuple[qemuopts.Pair, ...]
    if spec.serial.to == "socket":
        serial = (("path", runtime.serial_socket_path), ("server", "on"), ("wait", "off"))
        serial = (("backend", "socket"), ("id", "serial0"), *serial)
    else:
        serial = (("path", runtime.serial_log_path), ("append", "on"))
        serial = (("backend", "file"), ("id", "serial0"), *serial)
    return [
        *qmp_args(runtime),
        "-chardev",
        qemuopts.render(serial, implied="backend"),
        "-serial",
        "chardev:serial0",
    ]


def qmp_args(runtime: RuntimePaths) -> list[str]:
    """The options that make QEMU listen for QMP on `runtime.qmp_path`."""
    socket = (("backend", "socket"), ("id", "vmferry-qmp"), ("path", runtime.qmp_path))
    socket_text = qemuopts.render((*socket, ("server", "on"), ("wait", "off")), implied="backend")
    return ["-chardev", socket_text, "-mon", "chardev=vmferry-qmp,mode=control"]


def _rng(spec: VmSpec) -> list[str]:
    if not spec.rng:
        return []
    device = _pci(spec, "virtio-rng-pci", "rng0-dev", SLOT_RNG, ("rng", "rng0"))
    return ["-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", device]


def _balloon(spec: VmSpec) -> list[str]:
    if spec.balloon is None:
        return []
    if not spec.balloon.free_page_hint:
        return ["-device", _pci(spec, "virtio-balloon-pci", "balloon0", SLOT_BALLOON)]
    # QEMU wants a thread of its own for the hints, so that they do not hold its main loop.
    pairs = (("free-page-hint", "on"), ("iothread", "balloon0-io"))
    device = _pci(spec, "virtio-balloon-pci", "balloon0", SLOT_BALLOON, *pairs)
    return ["-object", "iothread,id=balloon0-io", "-device", device]


def _scsi_controller(spec: VmSpec) -> list[str]:
    if all(disk.interface != "scsi" for disk in spec.disk):
        return []
    return ["-device", _pci(spec, "virtio-scsi-pci", "scsi0", SLOT_SCSI)]


def _networks(spec: VmSpec) -> list[str]:
    args: list[str] = []
    for index, network in enumerate(spec.network):
        pairs: list[qemuopts.Pair] = []
        if network.type != "none":
            args += ["-netdev", qemuopts.render(_netdev(network, f"net{index}"), implied="type")]
            pairs.append(("netdev", f"net{index}"))
        pairs += [("mac", spec.mac_of(index)), ("romfile", "")]
        args += ["-device", _pci(spec, network.model, f"net{index}-dev", SLOT_NETWORK + index, *pairs)]
    return args


def _netdev(network: Network, net_id: str) -> qemuopts.Pairs:
    match network:
        case Network(type="user"):
            return (("type", "user"), ("id", net_id))
        case Network(ifname=str() as ifname):
            scripts = (("script", "no"), ("downscript", "no"))
            return (("type", "tap"), ("id", net_id), ("ifname", ifname), *scripts)
        case Network(bridge=str() as bridge):
            return (("type", "bridge"), ("id", net_id), ("br", bridge))
        case _:
            raise AssertionError(f"the spec let through a card without a backend: {network}")


def _disks(spec: VmSpec) -> list[str]:
    args: list[str] = []
    ide = scsi = virtio = 0
    for index, disk in enumerate(spec.disk):
        node = f"disk{index}"
        args += _blockdevs(disk, node)
        pairs: list[qemuopts.Pair] = [("drive", node)]
        if disk.boot is not None:
            pairs.append(("bootindex", str(disk.boot)))
        if not disk.is_readonly:
            policy = "report" if spec.on_io_error == "enospc" else spec.on_io_error
            pairs += [("rerror", policy), ("werror", spec.on_io_error)]
            pairs.append(("write-cache", "on" if _CACHE[disk.effective_cache][2] else "off"))
        if disk.interface == "virtio":
            args += ["-device", _pci(spec, "virtio-blk-pci", f"{node}-dev", SLOT_DISK + virtio, *pairs)]
            virtio += 1
            continue
        if disk.interface == "scsi":
            place: list[qemuopts.Pair] = [("bus", "scsi0.0"), ("scsi-id", str(scsi)), ("lun", "0")]
            scsi += 1
        else:
            # q35 has six SATA ports of one disk each, pc two IDE ports of two disks each.
            bus, unit = (ide, 0) if spec.machine_family == "q35" else divmod(ide, 2)
            place = [("bus", f"ide.{bus}"), ("unit", str(unit))]
            ide += 1
        driver = f"{disk.interface}-{'cd' if disk.cdrom else 'hd'}"
        device = (("driver", driver), ("id", f"{node}-dev"), *place, *pairs)
        args += ["-device", qemuopts.render(device, implied="driver")]
    return args


def _blockdevs(disk: Disk, node: str) -> list[str]:
    direct, no_flush, _ = _CACHE[disk.effective_cache]
    cache = {"direct": direct, "no-flush": no_flush}
    common: dict[str, Any] = {"read-only": disk.is_readonly, "auto-read-only": False, "cache": cache}
    if not disk.shared and not disk.is_readonly:
        common["discard"] = "unmap"  # what is written as a hole, by the guest or by a copy of the disk, is one
    is_device = disk.path.startswith("/dev/") and not posixpath.normpath(disk.path).startswith("/dev/shm/")
    protocol = {
        "driver": "host_device" if is_device else "file",
        "node-name": f"{node}-file",
        "filename": disk.path,
        "locking": disk.locking,
        **common,
    }
    image = {"driver": disk.format, "node-name": node, "file": f"{node}-file", **common}
    return ["-blockdev", qemuopts.render_json(protocol), "-blockdev", qemuopts.render_json(image)]


def _pci(spec: VmSpec, driver: str, device_id: str, slot: int, *pairs: qemuopts.Pair) -> str:
    """A device on the root bus at a fixed slot."""
    bus = "pcie.0" if spec.machine_family == "q35" else "pci.0"
    place = (("driver", driver), ("id", device_id), ("bus", bus), ("addr", f"0x{slot:x}"))
    return qemuopts.render((*place, *pairs), implied="driver")
