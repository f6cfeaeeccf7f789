"""What comes out of a snapshot: names, overlays, and whom the guest would clash with."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmferry.agent import image_chain
from vmferry.agent.image_chain import Look
from vmferry.agent.restore_definition import (
    SAME_ADDRESS,
    UNCHECKED_DISK,
    GuestIdentity,
    clashes,
    disk_doubts,
    disk_objections,
    host_objections,
    identity_of,
    memory_objection,
    renew,
    unless_accepted,
)
from vmferry.agent.vm_commands import definition_of
from vmferry.agent.vms import DiskRef, VmDefinition
from vmferry.engine.frozen import FrozenDisk, FrozenImage
from vmferry.errors import PlanRefused, SpecError
from vmferry.store.manifest import Block
from vmferry.vm import spec as vm_spec
from vmferry.vm.probe_qemu import CpuModel, QemuFacts

UUID = "11111111-2222-3333-4444-555555555555"


def definition(**more: Any) -> VmDefinition:
    wire = {"name": "web1", "memory": "64M", **more}
    return definition_of(vm_spec.pin(vm_spec.from_wire(wire), machine="pc-q35-7.2", accel="tcg", uuid=UUID))


def frozen_disk(path: str = "/images/a.img", **more: Any) -> FrozenDisk:
    return FrozenDisk(**{"path": path, "format": "raw", "way": "external-snapshot", "size_bytes": 1, "mtime_ns": 2,
                         **more})  # fmt: skip


DISKS = [{"path": "/images/a.img"}, {"path": "/images/cd.iso", "readonly": True}]


def test_a_restore_has_overlays_of_its_own_and_keeps_what_the_guest_knows() -> None:
    old = definition(disk=DISKS, network=[{"type": "user"}])
    found = renew(old, [frozen_disk()], name="web2", folder="/disks", tag="cafe")
    (overlay,) = found.overlays
    assert (overlay.path, overlay.backing, overlay.backing_format) == (
        "/disks/web2-cafe-0.qcow2",
        "/images/a.img",
        "raw",
    )
    assert found.definition.name == "web2"
    assert [disk.path for disk in found.definition.disks] == [overlay.path, "/images/cd.iso"]
    assert found.definition.spec is not None
    spec, before = vm_spec.from_wire(found.definition.spec), vm_spec.from_wire(old.spec)
    assert spec.name == "web2"
    assert (spec.uuid, spec.mac_of(0)) == (UUID, before.mac_of(0)), "its address does not follow the new name"
    assert (spec.disk[0].path, spec.disk[0].format, spec.disk[0].shared) == (overlay.path, "qcow2", False)
    assert spec.disk[1].path == "/images/cd.iso"


def test_a_restore_of_a_copy_lies_on_the_copy(tmp_path: Path) -> None:
    copy = tmp_path / "a.stored.qcow2"
    copy.write_bytes(b"abc")
    stored = frozen_disk(str(copy), way="mirror", format="qcow2", disk="/images/a.img", size_bytes=3)
    found = renew(definition(disk=DISKS), [stored], name="web2", folder="/disks", tag="cafe")
    (overlay,) = found.overlays
    assert (overlay.backing, overlay.backing_format) == (str(copy), "qcow2")
    assert "was changed since" in disk_objections([stored])[0]
    assert disk_objections([dataclasses.replace(stored, mtime_ns=os.stat(copy).st_mtime_ns)]) == ()


def test_a_disk_that_the_snapshot_does_not_keep_is_refused() -> None:
    for disks in ([], [frozen_disk(way="none")], [frozen_disk("/images/other.img")]):
        with pytest.raises(PlanRefused, match="does not keep what web1 had on /images/a"):
            renew(definition(disk=DISKS), disks, name="web2", folder="/disks", tag="cafe")


def adopted(*args: str, disks: tuple[DiskRef, ...] = ()) -> VmDefinition:
    wire = {"args": list(args)}
    return dataclasses.replace(definition(), spec=None, adopted=wire, disks=disks)


def test_an_adopted_guest_keeps_its_command_line() -> None:
    found = renew(adopted("-nodefaults"), [], name="web2", folder="/disks", tag="cafe")
    assert found.definition.name == "web2"
    with pytest.raises(SpecError, match="was not started from a spec"):
        renew(adopted(disks=(DiskRef("/images/a.img"),)), [frozen_disk()], name="web2", folder="/disks", tag="cafe")


def test_what_a_guest_could_clash_with() -> None:
    cards = [
        {"type": "user", "mac": "52:54:00:00:00:01"},
        {"type": "tap", "ifname": "tap7", "mac": "52:54:00:00:00:02"},
    ]
    found = identity_of(
        definition(disk=DISKS, network=cards, extra_args=["-chardev", "socket,id=c,path=/run/x.sock,server=on"]),
        host="host-a",
    )
    assert found == GuestIdentity(
        "web1",
        "host-a",
        UUID,
        ("52:54:00:00:00:01",),
        ("52:54:00:00:00:02",),
        ("/images/a.img",),
        ("/run/x.sock", "tap7"),
    )
    assert GuestIdentity.from_wire({**found.to_wire(), "newer": 1}) == found
    more = ["-device", "e1000,mac=52:54:00:AA:00:03", "-device", '{"driver": "e1000", "mac": "52:54:00:aa:00:04"}']
    found = identity_of(definition(network=cards[:1], extra_args=more), host="host-a")
    assert found.loud_macs == ("52:54:00:aa:00:03", "52:54:00:aa:00:04"), "nobody knows on which network they are"
    args = ("-uuid", UUID, "-device", "e1000,mac=52:54:00:AA:00:01")
    assert identity_of(adopted(*args), host="host-b") == GuestIdentity(
        "web1", "host-b", UUID, (), ("52:54:00:aa:00:01",), ()
    )


MINE = GuestIdentity("web2", "host-a", UUID, ("q",), ("l",), ("/d",), ("tap7",))


@pytest.mark.parametrize(
    ("other", "accept", "refused", "noted"),
    [
        (GuestIdentity("x", "host-b"), (), "", ""),
        (GuestIdentity("x", "host-b", uuid=UUID), (), "", "the same UUID"),
        (GuestIdentity("x", "host-b", quiet_macs=("q",)), (), "", "on another network"),
        (GuestIdentity("x", "host-b", loud_macs=("l",)), (), "same address on a network (l)", ""),
        (GuestIdentity("x", "host-b", quiet_macs=("l",)), (SAME_ADDRESS,), "", "as was accepted"),
        (GuestIdentity("x", "host-b", writable=("/d",)), (SAME_ADDRESS,), "may write to the same disk (/d)", ""),
        (GuestIdentity("x", "host-a", exclusive=("tap7",)), (), "uses the same tap7", ""),
        (GuestIdentity("x", "host-b", exclusive=("tap7",)), (), "", ""),
    ],
)
def test_what_forbids_a_restore_and_what_is_only_named(
    other: GuestIdentity, accept: tuple[str, ...], refused: str, noted: str
) -> None:
    found = clashes(MINE, [other], accept=accept)
    for texts, wanted in zip(found, (refused, noted), strict=True):
        assert [wanted in text and f"x on {other.host}" in text for text in texts] == ([True] if wanted else [])


def test_stored_images_must_be_what_they_were(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"abc")
    seen = os.stat(image)
    same = frozen_disk(str(image), size_bytes=seen.st_size, mtime_ns=seen.st_mtime_ns)
    assert disk_objections([same, frozen_disk("/dev/null"), frozen_disk("/not/there", way="none")]) == ()
    assert disk_doubts([same, frozen_disk("/not/there")]) == ()
    for other in (dataclasses.replace(same, size_bytes=4), dataclasses.replace(same, mtime_ns=1, way="read-only")):
        assert "was changed since" in disk_objections([other])[0]
    base = tmp_path / "base.img"
    base.write_bytes(b"base")
    seen = os.stat(base)
    under = FrozenImage(path=str(base), format="raw", size_bytes=seen.st_size, mtime_ns=seen.st_mtime_ns)
    layered = dataclasses.replace(same, chain=(under,))
    assert disk_objections([layered]) == ()
    os.utime(base, ns=(1, 1))
    assert disk_objections([layered]) == (
        f"the disk image {base} under {image} was changed since the snapshot was made",
    )
    base.unlink()
    assert f"{base} under {image} of the snapshot is not there" in disk_objections([layered])[0]
    image.unlink()
    assert "is not there" in disk_objections([same])[0]


def test_of_a_device_nobody_can_say_whether_it_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    under = FrozenImage(path="/dev/zero", format="raw", size_bytes=1 << 20, mtime_ns=2)
    disks = [
        frozen_disk("/dev/null", size_bytes=0, way="read-only", chain=(under,)),
        frozen_disk("/dev/full", way="none"),
    ]
    doubts = disk_doubts(disks)
    assert [doubt.partition(" is a device, and nobody can say")[0] for doubt in doubts] == [
        "/dev/null", "/dev/zero under /dev/null",
    ]  # fmt: skip
    refused, notes = unless_accepted(doubts, (SAME_ADDRESS,))
    assert (len(refused), notes) == (2, ())
    assert all("--accept unchecked-disk" in text for text in refused)
    refused, notes = unless_accepted(doubts, (UNCHECKED_DISK,))
    assert (refused, len(notes)) == ((), 2)
    assert all("that was accepted" in text for text in notes)

    def look(path: str) -> Look:
        return Look({"/dev/null": 4096, "/dev/zero": 1 << 21}[path], 5, is_file=False)

    monkeypatch.setattr(image_chain, "look", look)
    assert disk_objections(disks) == (
        "the disk image /dev/zero under /dev/null has 2097152 bytes, and had 1048576 when the snapshot was made",
    )


@pytest.mark.parametrize("way", ["read-only", "external-snapshot"])
def test_an_image_of_which_nobody_knew_what_it_lies_on_is_doubtful(tmp_path: Path, way: str) -> None:
    """Its base may have been changed since; nothing would tell."""
    image = tmp_path / "a.qcow2"
    image.write_bytes(b"abc")
    seen = os.stat(image)
    disk = frozen_disk(str(image), format="qcow2", way=way, size_bytes=3, mtime_ns=seen.st_mtime_ns)
    assert disk_objections([disk]) == ()
    (doubt,) = disk_doubts([disk])
    assert f"what {image} lies on was not known" in doubt
    for known in (dataclasses.replace(disk, chain=()), dataclasses.replace(disk, format="raw")):
        assert disk_doubts([known]) == ()


def test_a_file_below_dev_is_a_file(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        seen = os.stat(file.name)
        disk = frozen_disk(file.name, size_bytes=0, mtime_ns=seen.st_mtime_ns)
        assert (disk_objections([disk]), disk_doubts([disk])) == ((), ())
        file.write(b"x")
        file.flush()
        assert "was changed since" in disk_objections([disk])[0]


def test_a_snapshot_with_more_memory_than_its_guest_has_is_not_read() -> None:
    mib = 1 << 20
    blocks = [Block("pc.ram", 64 * mib, 4096), Block("vga.vram", 16 * mib, 4096)]
    assert memory_objection(definition(), blocks) == ""
    forged = [*blocks, Block("more", 1 << 40, 4096)]
    assert "and its definition says 64" in memory_objection(definition(), forged)


def facts(**more: Any) -> QemuFacts:
    cpus = {"tcg": (CpuModel("qemu64", (), True), CpuModel("Icelake-Server", ("avx512f",), True))}
    found = {"machines": ("pc-q35-7.2",), "version": (7, 2, 22), "cpus": cpus, **more}
    return SimpleNamespace(**found, accelerators=lambda: tuple(found["cpus"]))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "asked", "words"),
    [
        ({}, {}, ""),
        ({}, {"available_bytes": None}, ""),
        ({}, {"available_bytes": 64 << 20}, "needs"),
        ({"cpu": "Icelake-Server"}, {}, "avx512f"),
        ({"cpu": "Icelake-Server,-avx512f"}, {}, "avx512f"),
        ({"cpu": "Future-Server"}, {}, "does not know the CPU model Future-Server"),
        ({"cpu": "max"}, {}, ""),
        ({"machine": "pc-q35-9.9"}, {}, "no machine type pc-q35-9.9"),
        ({"accel": "kvm"}, {}, "ran under kvm"),
    ],
)
def test_what_a_host_lacks_for_a_guest(change: dict[str, Any], asked: dict[str, Any], words: str) -> None:
    old = dataclasses.replace(definition(), **change)
    found, notes = host_objections(old, facts(), **{"available_bytes": 1 << 40, **asked})
    assert notes == []
    assert [words in each for each in found] == ([True] if words else [])


@pytest.mark.parametrize(
    ("cpu", "saved_by", "words"),
    [
        ("max", "7.2.22", ""),
        ("max", "", ""),
        ("max", "6.2.0", "differs between QEMU 6.2.0 and 7.2.22"),
        ("qemu64", "6.2.0", ""),
        ("Quiet-Server", "7.2.22", "does not say whether its CPU has all features"),
    ],
)
def test_what_of_its_cpu_nobody_can_say(cpu: str, saved_by: str, words: str) -> None:
    models = {"tcg": (CpuModel("qemu64", (), True), CpuModel("Quiet-Server", None, True))}
    old = dataclasses.replace(definition(), cpu=cpu)
    found, notes = host_objections(old, facts(cpus=models), available_bytes=None, saved_by=saved_by)
    assert found == []
    assert [words in each for each in notes] == ([True] if words else [])


def test_a_cpu_that_is_the_hosts_is_a_note() -> None:
    kvm = facts(cpus={"kvm": (CpuModel("host", (), False),)})
    found, notes = host_objections(
        dataclasses.replace(definition(), cpu="host", accel="kvm"), kvm, available_bytes=None
    )
    assert found == []
    assert "nobody knows" in notes[0]
