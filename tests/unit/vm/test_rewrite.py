"""Command lines of QEMUs that somebody else started, made fit for another host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vmferry.errors import QemuError, SpecError
from vmferry.vm import adopt, hardware, rewrite
from vmferry.vm.rewrite_actions import PathKind
from vmferry.vm.runtime import RuntimePaths
from vmferry.vm.spawn import ProcessIdentity

RUNTIME = RuntimePaths("/run/vmferry/web1")
IDENTITY = ProcessIdentity(7, 8, "boot")
TAIL = ("-display", "none", "-monitor", "none", "-chardev",
        "socket,id=vmferry-qmp,path=/run/vmferry/web1/qmp.sock,server=on,wait=off", "-mon",
        "chardev=vmferry-qmp,mode=control", "-S", "-incoming", "defer")  # fmt: skip


def rewritten(*args: str, kinds: dict[str, PathKind] | None = None) -> rewrite.DestinationArgv:
    known = kinds or {}
    return rewrite.rewrite(
        args, qemu="qemu", cwd="/vm", runtime=RUNTIME, machine="pc-q35-7.2",
        kind=lambda path: known.get(path, "missing"),
    )  # fmt: skip


def middle(*args: str, kinds: dict[str, PathKind] | None = None) -> tuple[str, ...]:
    """What became of `args`, without what is always added."""
    argv = rewritten("-M", "pc-q35-7.2", *args, kinds=kinds).argv
    assert argv[:3] == ("qemu", "-machine", "pc-q35-7.2")
    assert argv[-len(TAIL) :] == TAIL
    return argv[3 : -len(TAIL)]


KEPT = [
    ("-m", "512", "-smp", "2", "-cpu", "max,+x2apic", "-uuid", "x", "-global", "a.b=c", "-boot", "order=c"),
    ("-device", "virtio-blk-pci,drive=a,addr=0x5", "-device", '{"driver":"virtio-rng-pci","id":"r"}'),
    (
        "-drive",
        "file=/x.img,if=none,id=a",
        "-blockdev",
        '{"driver":"file","filename":"/a,b","node-name":"n"}',
    ),
    ("-drive", "file=nbd:localhost:10809,format=raw"),
    ("-netdev", "user,id=n0", "-nic", "none", "-vga", "std"),
    ("-serial", "none", "-serial", "chardev:a", "-serial", "pty", "-parallel", "null"),
    ("-nographic", "-enable-kvm", "-nodefaults"),
    ("-object", "memory-backend-ram,id=m,size=1G", "-object", "iothread,id=io"),
    ("-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages,share=off"),
    ("-bios", "bios-256k.bin"),
    ("-device", "virtio-net-pci,romfile=", "-netdev", "tap,id=t,script=no,downscript=no,ifname=tap0"),
]
CHANGED: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("-S",), ()),
    (("-daemonize", "-pidfile", "p", "-qmp", "unix:q,server,nowait", "-monitor", "stdio"), ()),
    (("-chardev", "socket,id=mon,path=/m,server=on,wait=off", "-mon", "chardev=mon,mode=control"), ()),
    (("--chardev", "pty,id=c,mux=on", "-mon", "c", "-serial", "chardev:c"),
     ("-chardev", "pty,id=c,mux=on", "-serial", "chardev:c")),
    (("-incoming", "tcp:0:4444"), ()),
    (("disk.img",), ("/vm/disk.img",)),
    (("-hda", "../a,b.img", "-cdrom", "x/y.iso"), ("-hda", "/a,b.img", "-cdrom", "/vm/x/y.iso")),
    (("-drive", "file=a,,b.img,if=virtio"), ("-drive", "file=/vm/a,,b.img,if=virtio")),
    (("-drive", "driver=qcow2,file.driver=file,file.filename=q"),
     ("-drive", "driver=qcow2,file.driver=file,file.filename=/vm/q")),
    (("-blockdev", '{"driver":"qcow2","file":{"driver":"file","filename":"q"}}'),
     ("-blockdev", '{"driver":"qcow2","file":{"driver":"file","filename":"/vm/q"}}')),
    (("-kernel", "k", "-append", "a=b,c"), ("-kernel", "/vm/k", "-append", "a=b,c")),
    (("-serial", "file:out"),
     ("-chardev", "file,id=vmferry-serial1,path=/run/vmferry/web1/out,append=on", "-serial",
      "chardev:vmferry-serial1")),
    (("-serial", "mon:stdio"),
     ("-chardev", "file,id=vmferry-serial1,path=/run/vmferry/web1/vmferry-serial1.log,append=on", "-serial",
      "chardev:vmferry-serial1")),
    (("-serial", "unix:/s,server,nowait"),
     ("-chardev", "socket,id=vmferry-serial1,path=/run/vmferry/web1/s,server=on,wait=off", "-serial",
      "chardev:vmferry-serial1")),
    (("-serial", "telnet::4444,server,nodelay"),
     ("-chardev", "socket,id=vmferry-serial1,host=0.0.0.0,port=4444,telnet=on,server=on,nodelay=on,wait=off",
      "-serial", "chardev:vmferry-serial1")),
    (("-chardev", "file,id=a,path=/x/log", "-chardev", "file,id=b,path=/y/log"),
     ("-chardev", "file,id=a,path=/run/vmferry/web1/log,append=on", "-chardev",
      "file,id=b,path=/run/vmferry/web1/log.2,append=on")),
    (("-chardev", "file,id=a,path=/x/qemu.log"),
     ("-chardev", "file,id=a,path=/run/vmferry/web1/qemu.log.2,append=on")),
    (("-vnc", ":1,password=on,to=5"), ("-vnc", "unix:/run/vmferry/web1/vnc.sock,password=on")),
    (("-display", "vnc=:1"), ("-vnc", "unix:/run/vmferry/web1/vnc.sock")),
    (("-spice", "port=5900,disable-ticketing=on"),
     ("-spice", "unix=on,addr=/run/vmferry/web1/spice.sock,disable-ticketing=on")),
    (("-display", "gtk", "-full-screen", "-gdb", "tcp::1234", "-s", "-loadvm", "x"), ()),
    (("-audiodev", "pa,id=snd0,server=/run/pulse"), ("-audiodev", "none,id=snd0")),
    (("-object", "memory-backend-file,id=m,size=1G,mem-path=ram,share=on"),
     ("-object", "memory-backend-file,id=m,size=1G,mem-path=/run/vmferry/web1/vmferry-web1-m.ram,share=on")),
    (("-object", "secret,id=s,file=key"), ("-object", "secret,id=s,file=/vm/key")),
    (("-D", "/log/q"), ("-D", "/run/vmferry/web1/q")),
]  # fmt: skip


@pytest.mark.parametrize("args", KEPT, ids=" ".join)
def test_what_the_guest_sees_is_kept(args: tuple[str, ...]) -> None:
    assert middle(*args) == args


@pytest.mark.parametrize(("args", "expected"), CHANGED)
def test_what_belongs_to_the_host_changes(args: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert middle(*args) == expected


@pytest.mark.parametrize("args", [*KEPT, *(pair[0] for pair in CHANGED)])
def test_a_second_move_changes_nothing_more(args: tuple[str, ...]) -> None:
    once = rewritten(*args).argv
    assert rewritten(*once[1:]).argv == once


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("-snapshot",), "temporary file"),
        (("-drive", "file=a,snapshot=on"), "temporary file"),
        (("-readconfig", "f"), "takes hardware from somewhere else"),
        (("-preconfig",), "takes hardware from somewhere else"),
        (("-add-fd", "fd=3,set=2"), "descriptor"),
        (("-netdev", "tap,id=t,fd=5"), "descriptor"),
        (("-netdev", '{"type":"tap","id":"t","vhostfds":"5:6"}'), "descriptor"),
        (("-netdev", "stream,id=t,addr.type=fd,addr.str=3"), "descriptor"),
        (("-chardev", "socket,id=a,fd=4,server=on"), "descriptor"),
        (("-drive", "file=/dev/fdset/2"), "descriptor"),
        (("-drive", "file=fat:rw:/tmp"), "only inside"),
        (("-device", "vhost-vsock-pci,vhostfd=9"), "descriptor"),
        (("-frobnicate",), "not known to vmferry"),
        (("-m",), "lacks its value"),
        (("-serial", "weird"), "not known"),
        (("-drive", 'file=json:{"file"',), "cannot be read"),
        (("-qtest", "stdio"), "tests"),
        (("-icount", "shift=1,rr=record,rrfile=x"), "records"),
        (("-set", "drive.a.file=b"), "behind the other options"),
    ],
)  # fmt: skip
def test_what_cannot_move_is_refused_with_a_reason(args: tuple[str, ...], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        rewritten(*args)


def test_an_unpinned_machine_is_pinned_and_a_missing_one_added() -> None:
    assert rewritten("-M", "q35,accel=kvm").argv[1:3] == ("-machine", "pc-q35-7.2,accel=kvm")
    assert rewritten("-machine", "accel=kvm").argv[1:5] == (
        "-machine", "accel=kvm", "-machine", "pc-q35-7.2",
    )  # fmt: skip


def test_notes_and_files_name_what_the_destination_needs() -> None:
    result = rewritten("-hda", "a.img", "-netdev", "tap,id=t,ifname=tap7", "-bios", "my.bin", "-vnc", ":1",
                       kinds={"/vm/my.bin": "file"})  # fmt: skip
    assert result.files == ("/vm/a.img", "/vm/my.bin")
    text = "\n".join(result.notes)
    assert "tap7" in text
    assert "vnc.sock" in text


def test_a_hugepage_directory_is_not_replaced() -> None:
    args = ("-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages,share=on")
    assert middle(*args, kinds={"/dev/hugepages": "directory"}) == args


def test_machine_pinning_takes_the_running_qemus_aliases() -> None:
    aliases = {"q35": "pc-q35-7.2", "pc": "pc-i440fx-7.2"}
    assert adopt.pinned_machine("q35", aliases, default="pc") == "pc-q35-7.2"
    assert adopt.pinned_machine(None, aliases, default="pc") == "pc-i440fx-7.2"
    assert adopt.pinned_machine("pc-q35-6.0", aliases, default="pc") == "pc-q35-6.0"
    assert adopt.machine_option(["-machine", "q35", "-M", "accel=kvm"]) == "q35"


@pytest.mark.parametrize(
    ("cmdline", "program", "launcher", "qemu"),
    [
        (["qemu-system-x86_64", "-S"], "/usr/bin/qemu-system-x86_64", (), "/usr/bin/qemu-system-x86_64"),
        (["/r/ld-linux-x86-64.so.2", "--library-path", "/r/lib", "--inhibit-cache", "/r/qemu", "-S"],
         "/r/ld-linux-x86-64.so.2",
         ("/r/ld-linux-x86-64.so.2", "--library-path", "/r/lib", "--inhibit-cache"), "/r/qemu"),
        (["qemu", "--argv0", "q", "/r/qemu-kvm", "-S"], "/r/ld-2.31.so",
         ("qemu", "--argv0", "q"), "/r/qemu-kvm"),
    ],
)  # fmt: skip
def test_a_loader_in_front_is_understood(
    cmdline: list[str], program: str, launcher: tuple[str, ...], qemu: str
) -> None:
    vm = adopt.from_cmdline(cmdline, program=program, cwd="/", identity=IDENTITY)
    assert (vm.launcher, vm.qemu_binary, vm.args) == (launcher, qemu, ("-S",))


@pytest.mark.parametrize(
    ("shell", "opened", "expected"),
    [
        ("/vm", {"/vm/x/d.img", "/dev/null"}, "/vm"),
        ("/elsewhere", {"/vm/x/d.img"}, "/vm"),
        ("", {"/vm/x/d.img"}, "/vm"),
        ("/vm", {"/other/d.img"}, ""),
        ("/vm", set(), ""),
    ],
)
def test_where_a_daemon_was_started_is_proven_or_unknown(shell: str, opened: set[str], expected: str) -> None:
    args = ["-drive", "file=x/d.img,format=raw", "-m", "32"]
    assert adopt.start_directory(args, shell, frozenset(opened)) == expected


def test_a_relative_path_from_an_unknown_directory_is_refused() -> None:
    vm = adopt.from_cmdline(["qemu", "-hda", "d.img"], program="/q/qemu", cwd="", identity=IDENTITY)
    with pytest.raises(SpecError, match="started in is not known"):
        adopt.destination_argv(vm, qemu="qemu", machine="pc-q35-7.2", runtime=RUNTIME)


@pytest.mark.parametrize("args", [("-hda", "d.img"), ("-drive", "file=d.img"), ("-blockdev", "file,filename=d.img")])
def test_a_daemon_with_a_relative_disk_is_refused_because_qemu_cannot_hand_it_over(
    args: tuple[str, ...],
) -> None:
    vm = adopt.from_cmdline(["qemu", *args, "-kernel", "k"], program="/q/qemu", cwd="/vm", identity=IDENTITY)
    adopt.destination_argv(vm, qemu="qemu", machine="pc-q35-7.2", runtime=RUNTIME)
    daemon = dataclasses.replace(vm, has_left_cwd=True)
    with pytest.raises(SpecError, match="cannot hand the disk over") as caught:
        adopt.destination_argv(daemon, qemu="qemu", machine="pc-q35-7.2", runtime=RUNTIME)
    assert "/vm/d.img" in caught.value.hint
    kinds: dict[str, PathKind] = {"/d.img": "file"}
    adopt.destination_argv(daemon, qemu="qemu", machine="pc-q35-7.2", runtime=RUNTIME, kinds=kinds)


def test_host_kinds_finds_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "d.img").touch()
    args = ["qemu", "-hda", "d.img", "-object", "memory-backend-file,id=a,mem-path=/dev,size=1", "-m", "none"]
    vm = adopt.from_cmdline(args, program="/q/qemu", cwd=str(tmp_path), identity=IDENTITY)
    kinds = adopt.host_kinds(vm)
    assert kinds[str(tmp_path / "d.img")] == "file"
    assert kinds["/dev"] == "directory"
    assert str(tmp_path / "none") not in kinds


def test_another_program_is_refused() -> None:
    with pytest.raises(SpecError, match="not a QEMU"):
        adopt.from_cmdline(["sshd"], program="/usr/sbin/sshd", cwd="/", identity=IDENTITY)


def test_nobody_listens() -> None:
    with pytest.raises(QemuError, match="no QEMU listens on /no/such/socket"):
        adopt.adopt("/no/such/socket")


def test_listening_inodes_takes_listeners_only() -> None:
    table = (
        "Num       RefCount Protocol Flags    Type St Inode Path\n"
        "0: 00000002 00000000 00010000 0001 01 111 /run/a b.sock\n"
        "0: 00000003 00000000 00000000 0001 03 222 /run/a b.sock\n"
        "0: 00000003 00000000 00000000 0001 03 333\n"
    )
    assert adopt.listening_inodes(table, "/run/a b.sock") == {111}


PCI = [{"bus": 0, "devices": [{
    "bus": 0, "slot": 3, "function": 0, "qdev_id": "n0", "class_info": {"class": 512}, "regions": [],
    "id": {"vendor": 0x1AF4, "device": 0x1000, "subsystem": 1, "subsystem-vendor": 2},
}]}]  # fmt: skip


def test_hardware_is_compared_by_place() -> None:
    left = hardware.view({"query-pci": PCI, "query-memory-size-summary": {"base-memory": 1}})
    assert hardware.differences(left, left) == ()
    right = hardware.view({"query-memory-size-summary": {"base-memory": 2}})
    found = hardware.differences(left, right)
    assert len(found) == 2
    assert "PCI device 0:03.0" in found[0]
    assert hardware.differences(right, left)[0].endswith("is only on the destination")
    assert dict(left.parts)["memory"] == "base-memory 1"


async def test_hardware_is_asked_for_each_device() -> None:
    async def execute(name: str, arguments: Mapping[str, Any] | None = None, /) -> Any:
        match name, (arguments or {}).get("path"):
            case "qom-list", "/machine/peripheral":
                return [{"name": "n0", "type": "child<e1000>"}, {"name": "type", "type": "string"}]
            case "qom-list", "/machine/peripheral/n0":
                return [{"name": "addr", "type": "int32"}]
            case "qom-get", "/machine/peripheral/n0":
                return 24
            case "query-memory-size-summary", _:
                return {"base-memory": 1}
            case _:
                return []

    view = await hardware.look(execute)
    assert dict(view.parts) == {"device peripheral/n0": "e1000 addr 24", "memory": "base-memory 1"}
