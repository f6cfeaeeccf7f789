"""The command line made from a spec."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vmferry.errors import SpecError
from vmferry.vm import argv, qemuopts, spec
from vmferry.vm.runtime import RuntimePaths

HERE = RuntimePaths("/run/vmferry/a")
THERE = RuntimePaths("/run/vmferry/b", ram_directory="/dev/shm")


def build(runtime: RuntimePaths = HERE, *, incoming: bool = False, paused: bool = True, **more: Any) -> list[str]:
    machine = "pc-i440fx-7.2" if more.get("machine") == "pc" else "pc-q35-7.2"
    wire = {"name": "web1", "memory": "64M", **more}
    pinned = spec.pin(spec.from_wire(wire), machine=machine, accel="tcg", uuid="0f8ae5c8-0d3f-4f2e-9f34-000000000001")
    return argv.build_argv(
        pinned,
        qemu="qemu",
        machine=machine,
        accel="tcg",
        runtime=runtime,
        incoming=incoming,
        start_paused=paused,
    )


def values(args: list[str], option: str) -> list[str]:
    return [args[index + 1] for index, arg in enumerate(args) if arg == option]


DISKS = [
    {"path": "/a,b.img"},
    {"path": "/c.qcow2", "format": "qcow2", "interface": "ide", "cache": "writethrough"},
    {"path": "/d.iso", "interface": "scsi", "cdrom": True, "boot": 1},
    {"path": "/dev/sdb", "interface": "ide", "shared": False, "locking": "off"},
]


def test_incoming_is_always_paused_and_deferred() -> None:
    args = build(incoming=True, paused=False)
    assert "-S" in args
    assert args[-2:] == ["-incoming", "defer"]
    assert "-incoming" not in build()
    assert "-S" in build()
    assert "-S" not in build(paused=False)


@pytest.mark.parametrize("machine", ["q35", "pc"])
@pytest.mark.parametrize("kind", ["ram", "memfd", "file"])
def test_both_sides_have_the_same_guest_hardware(machine: str, kind: str) -> None:
    backend = {"kind": kind, "shared": True}
    more: dict[str, Any] = {"machine": machine, "disk": DISKS, "network": [{}, {"type": "none"}],
                            "memory_backend": backend}  # fmt: skip
    source, destination = build(HERE, **more), build(THERE, incoming=True, **more)
    different = set(source) ^ set(destination)
    allowed = ("socket,id=vmferry-qmp,", "file,id=serial0,", "-incoming", "defer")
    unexplained = {arg for arg in different if not arg.startswith(allowed)}
    assert {json.loads(arg)["qom-type"] for arg in unexplained} <= {"memory-backend-file"}


def test_every_device_has_a_place_of_its_own() -> None:
    for machine in ("q35", "pc"):
        args = build(machine=machine, disk=[*DISKS, {"path": "/e"}], network=[{}, {}])
        places = []
        for text in values(args, "-device"):
            pairs = qemuopts.parse(text, implied="driver")
            assert qemuopts.get(pairs, "id")
            place = [qemuopts.get(pairs, key) for key in ("bus", "addr", "unit", "scsi-id")]
            assert place[0] is not None
            places.append(place)
        assert len({str(place) for place in places}) == len(places)


def test_a_device_keeps_its_place_when_another_kind_is_added() -> None:
    few = set(values(build(disk=DISKS[:1], network=[{}]), "-device"))
    many = set(values(build(disk=DISKS, network=[{}, {}]), "-device"))
    assert few <= many


def test_disks_say_how_they_are_cached_and_locked() -> None:
    nodes = {node["node-name"]: node for node in map(json.loads, values(build(disk=DISKS), "-blockdev"))}
    assert nodes["disk0-file"]["filename"] == "/a,b.img"
    assert nodes["disk0-file"]["cache"] == {"direct": True, "no-flush": False}
    assert nodes["disk1-file"]["cache"]["direct"] is False
    assert nodes["disk1"]["driver"] == "qcow2"
    assert nodes["disk2"]["read-only"] is True
    assert nodes["disk3-file"]["driver"] == "host_device"
    assert nodes["disk3-file"]["locking"] == "off"
    devices = values(build(disk=DISKS), "-device")
    assert any("write-cache=off" in text and "disk1" in text for text in devices)


def test_storage_errors_pause_the_guest_unless_told_otherwise() -> None:
    assert "rerror=stop,werror=stop" in " ".join(build(disk=DISKS[:1]))
    assert "rerror=report,werror=enospc" in " ".join(build(disk=DISKS[:1], on_io_error="enospc"))


def test_network_backends() -> None:
    cards = [{"type": "tap", "ifname": "tap0"}, {"type": "tap", "bridge": "br0"}, {"type": "none"}, {}]
    args = build(network=cards)
    assert values(args, "-netdev") == [
        "tap,id=net0,ifname=tap0,script=no,downscript=no", "bridge,id=net1,br=br0", "user,id=net3",
    ]  # fmt: skip
    assert sum("mac=52:54:00:" in text for text in values(args, "-device")) == 4


def test_kernel_serial_and_extra_args() -> None:
    args = build(
        kernel={"image": "/k", "initrd": "/i", "cmdline": "a=b,c"}, serial={"to": "socket"},
        firmware="/fw", extra_args=["-global", "x.y=z"], rng=False,
    )  # fmt: skip
    assert values(args, "-kernel") == ["/k"]
    assert values(args, "-append") == ["a=b,c"]
    assert values(args, "-bios") == ["/fw"]
    assert "x.y=z" in args
    assert "virtio-rng-pci" not in " ".join(args)
    assert "socket,id=serial0,path=/run/vmferry/a/serial.sock,server=on,wait=off" in args
    assert "file,id=serial0,path=/run/vmferry/a/serial.log,append=on" in build()


@pytest.mark.proves("S111")
def test_a_balloon_hints_from_a_thread_of_its_own_unless_it_shall_not() -> None:
    place = "bus=pcie.0,addr=0x19"
    hinting = build(balloon={})
    assert f"virtio-balloon-pci,id=balloon0,{place},free-page-hint=on,iothread=balloon0-io" in hinting
    assert "iothread,id=balloon0-io" in values(hinting, "-object")
    plain = build(balloon={"free_page_hint": False})
    assert f"virtio-balloon-pci,id=balloon0,{place}" in plain
    assert "iothread,id=balloon0-io" not in plain
    assert "balloon" not in " ".join(build())


def test_an_alias_or_another_chipset_is_refused() -> None:
    plain = spec.from_wire({"name": "w", "memory": "8M"})
    for machine, words in (("q35", "is an alias"), ("pc-i440fx-7.2", "which is not")):
        with pytest.raises(SpecError, match=words):
            argv.build_argv(plain, qemu="q", machine=machine, accel="tcg", runtime=HERE, incoming=False)


def test_runtime_paths() -> None:
    assert HERE.ram_path("pc.ram") == "/run/vmferry/a/vmferry-a-pc.ram.ram"
    assert THERE.ram_path("pc.ram") == "/dev/shm/vmferry-b-pc.ram.ram"
    with pytest.raises(SpecError, match="longer than"):
        RuntimePaths("/" + "x" * 120)
    with pytest.raises(SpecError, match="not an absolute path"):
        RuntimePaths("relative")
