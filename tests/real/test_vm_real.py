"""Specs, command lines, adoption and processes against real QEMUs of every installed version."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmferry.clock import SystemClock
from vmferry.errors import SpecError
from vmferry.qmp import client as qmp_client
from vmferry.qmp.client import QmpClient
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpDisconnected
from vmferry.testing.qemus import available
from vmferry.vm import adopt, argv, hardware, image_locks, probe, probe_host, probe_qemu, spawn, spec
from vmferry.vm.runtime import RuntimePaths

pytestmark = pytest.mark.real

QEMUS = {version: str(path) for version, path in available().items()}
VERSIONS = sorted(QEMUS)
OLDEST = VERSIONS[0] if VERSIONS else ""
MARK = b"vmferry-was-here"
TIMEOUT_S = 30.0
# The oldest machine types that all of them know, so that any pair can migrate.
MACHINES = {"q35": "pc-q35-7.2", "pc": "pc-i440fx-7.2"}

every_qemu = pytest.mark.parametrize("version", VERSIONS)
every_pair = pytest.mark.parametrize(("source", "destination"), [(a, b) for a in VERSIONS for b in VERSIONS], ids=str)


@pytest.fixture
def room() -> Iterator[Path]:
    """A directory with a short name, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="vmf-"))
    yield path
    shutil.rmtree(path)


def runtime(room: Path, name: str) -> RuntimePaths:
    (room / name).mkdir(exist_ok=True)
    return RuntimePaths(str(room / name))


def make_spec(room: Path, **more: Any) -> spec.VmSpec:
    disk = room / "disk.img"
    disk.write_bytes(probe_host.boot_sector(MARK).ljust(1 << 20, b"\0"))
    wire: dict[str, Any] = {
        "name": "vm1",
        "memory": "32M",
        "disk": [{"path": str(disk), "cache": "writeback"}],
    }
    machine = MACHINES[more.get("machine", "q35")]
    return spec.pin(spec.from_wire({**wire, **more}), machine=machine, accel="tcg")


def line(vm: spec.VmSpec, version: str, where: RuntimePaths, *, incoming: bool) -> list[str]:
    return argv.build_argv(vm, qemu=QEMUS[version], machine=vm.machine, accel="tcg", runtime=where, incoming=incoming)


async def connect(path: str) -> QmpClient:
    while True:
        try:
            return await qmp_client.connect_unix(path)
        except QmpDisconnected:
            await asyncio.sleep(0.01)  # QEMU makes the socket some time after its start


@contextlib.asynccontextmanager
async def running(args: list[str], where: RuntimePaths) -> AsyncIterator[tuple[spawn.Spawned, QmpClient]]:
    process, client = await spawn.start(args, runtime=where, ready=lambda: connect(where.qmp_path), timeout_s=TIMEOUT_S)
    try:
        yield process, client
    finally:
        await client.close()
        spawn.kill(process.identity)
        await spawn.wait_exit(process.pidfd)
        process.close()


async def migrate(source: QmpClient, destination: QmpClient, room: Path) -> str:
    """Migrate and return the last status that the source announced."""
    over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_event(event: Event) -> None:
        status = event.data.get("status") if event.name == "MIGRATION" else None
        if status in ("completed", "failed", "cancelled") and not over.done():
            over.set_result(str(status))

    source.subscribe(on_event)
    uri = f"unix:{room}/migration.sock"
    capabilities = [{"capability": "events", "state": True}]
    await source.execute("migrate-set-capabilities", {"capabilities": capabilities})
    await destination.execute("migrate-incoming", {"uri": uri})
    await source.execute("migrate", {"uri": uri})
    status = await asyncio.wait_for(over, TIMEOUT_S)
    return status if status == "completed" else str(await source.execute("query-migrate"))


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def fill(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


async def reads(path: str, mark: bytes) -> None:
    """Wait until the guest's log holds `mark`."""
    async with asyncio.timeout(TIMEOUT_S):
        while mark not in content(path):  # noqa: ASYNC110 - a file has no event when it grows
            await asyncio.sleep(0.02)


@every_qemu
@pytest.mark.parametrize("machine", sorted(MACHINES))
async def test_a_spec_boots(version: str, machine: str, room: Path) -> None:
    where = runtime(room, "a")
    fill(where.serial_log_path, b"earlier ")
    async with running(line(make_spec(room, machine=machine), version, where, incoming=False), where) as (
        _,
        qmp,
    ):
        assert (await qmp.execute("query-status"))["running"] is False
        assert (await qmp.execute("query-name"))["name"] == "vm1"
        await qmp.execute("cont")
        await reads(where.serial_log_path, MARK)
    assert content(where.serial_log_path).startswith(b"earlier "), "the log is appended to"


RICH: dict[str, Any] = {
    "cpus": 2,
    "network": [{"type": "user"}, {"type": "none", "model": "e1000"}],
    "memory_backend": {"kind": "file", "shared": True},
    "serial": {"to": "socket"},
}


@pytest.mark.proves("S46")
@every_pair
@pytest.mark.parametrize("machine", sorted(MACHINES))
async def test_both_sides_of_a_spec_are_one_guest(source: str, destination: str, machine: str, room: Path) -> None:
    """The same devices, a stream that loads, and a destination that does not run by itself."""
    disks: list[dict[str, Any]] = [
        {"path": str(room / "disk.img"), "cache": "writeback"},
        {"path": str(room / "b.img"), "interface": "ide", "cache": "writeback"},
        {"path": str(room / "c.img"), "interface": "scsi", "cache": "writeback"},
        {
            "path": str(room / "c.img"),
            "interface": "scsi",
            "cdrom": True,
            "cache": "writeback",
            "locking": "off",
        },
    ]
    for name in ("b.img", "c.img"):
        (room / name).write_bytes(bytes(1 << 20))
    disks[3]["path"] = str(room / "b.img")
    vm = make_spec(room, machine=machine, **{**RICH, "disk": disks})
    here, there = runtime(room, "a"), runtime(room, "b")
    async with (
        running(line(vm, source, here, incoming=False), here) as (_, left),
        running(line(vm, destination, there, incoming=True), there) as (process, right),
    ):
        assert (await right.execute("query-status"))["status"] == "inmigrate"
        assert hardware.differences(await hardware.look(left.execute), await hardware.look(right.execute)) == ()
        await left.execute("cont")
        assert await migrate(left, right, room) == "completed"
        assert "-S" in content(f"/proc/{process.pid}/cmdline").decode().split("\0")
        assert (await right.execute("query-status"))["running"] is False
        await right.execute("cont")
        assert (await right.execute("query-status"))["running"] is True


@every_qemu
async def test_a_refused_spec_says_why_and_leaves_nothing(version: str, room: Path) -> None:
    where = runtime(room, "a")
    vm = make_spec(room, extra_args=["-device", "no-such-device"])
    with pytest.raises(SpecError, match=r"-device no-such-device: .*not a valid device model"):
        async with running(line(vm, version, where, incoming=False), where):
            pass
    assert os.listdir(where.directory) == []


BY_HAND = [
    "-M", "q35", "-m", "32", "-smp", "2", "-name", "hand",
    "-drive", "file=disk.img,format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0",
    "-device", "pcie-root-port,id=rp1", "-device", "virtio-rng-pci,bus=rp1",
    "-netdev", "user,id=n0", "-device", "e1000,netdev=n0,romfile=", "-device", "virtio-serial-pci",
    "-chardev", "socket,path=agent.sock,server,nowait,id=agent",
    "-device", "virtserialport,chardev=agent,name=org.example.0",
    "-serial", "file:serial.txt", "-monitor", "unix:hmp.sock,server,nowait", "-vnc", "unix:vnc.sock",
    "-qmp", "unix:qmp.sock,server,nowait", "-pidfile", "pid", "-accel", "tcg", "-cpu", "qemu64",
]  # fmt: skip


@every_pair
@pytest.mark.parametrize("style", ["plain", "daemonize", "no-devices-named"])
async def test_a_qemu_started_by_hand_can_move(source: str, destination: str, style: str, room: Path) -> None:
    (room / "disk.img").write_bytes(probe_host.boot_sector(MARK).ljust(1 << 20, b"\0"))
    args = list(BY_HAND)
    args[1] = MACHINES["q35"]  # so that the older QEMU can take in what the newer one runs
    if style == "no-devices-named":
        args = [
            "-M", MACHINES["pc"], "-m", "32", "disk.img", "-qmp", "unix:qmp.sock,server,nowait",
            "-vga", "std", "-nographic", "-net", "none", "-accel", "tcg",
        ]  # fmt: skip
    if style == "daemonize":
        args = [arg.replace("disk.img", str(room / "disk.img")) for arg in args] + ["-daemonize"]
    process = await asyncio.create_subprocess_exec(QEMUS[source], *args, cwd=room, stdin=subprocess.DEVNULL)
    pid = process.pid
    try:
        if style == "daemonize":
            assert await process.wait() == 0
            pid = int(content(str(room / "pid")))
        await (await connect(str(room / "qmp.sock"))).close()
        vm = await asyncio.to_thread(adopt.adopt, str(room / "qmp.sock"))
        assert vm.pid == pid
        assert vm.cwd == str(room)
        left = await connect(str(room / "qmp.sock"))
        facts = await probe_qemu.qemu_facts(QEMUS[source])
        machine = adopt.pinned_machine(vm.machine_option, facts.aliases, default=facts.default_machine)
        there = runtime(room, "b")
        target = adopt.destination_argv(
            vm, qemu=QEMUS[destination], machine=machine, runtime=there, kinds=adopt.host_kinds(vm)
        )
        assert str(room / "disk.img") in target.files
        async with running(list(target.argv), there) as (_, right):
            assert hardware.differences(await hardware.look(left.execute), await hardware.look(right.execute)) == ()
            assert await migrate(left, right, room) == "completed", spawn.tail_log(there.log_path)
            assert (await right.execute("query-status"))["running"] is False
            await right.execute("cont")
        await left.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        await process.wait()


async def test_a_daemon_with_a_relative_disk_is_refused_before_it_fails_at_the_switchover(room: Path) -> None:
    fill(str(room / "disk.img"), probe_host.boot_sector(MARK))
    args = ["-hda", "disk.img", "-display", "none", "-daemonize", "-pidfile", "pid", "-accel", "tcg"]
    process = await asyncio.create_subprocess_exec(
        QEMUS[OLDEST], *args, "-qmp", "unix:qmp.sock,server=on,wait=off", cwd=room
    )
    assert await process.wait() == 0
    pid = int(content(str(room / "pid")))
    try:
        vm = adopt.adopt(str(room / "qmp.sock"))
        assert (vm.pid, vm.cwd) == (pid, str(room))
        with pytest.raises(SpecError, match="cannot hand the disk over"):
            adopt.destination_argv(vm, qemu="qemu", machine=MACHINES["pc"], runtime=runtime(room, "b"))
    finally:
        os.kill(pid, signal.SIGKILL)


async def test_the_machine_of_a_bare_command_line_is_the_running_qemus_default(room: Path) -> None:
    facts = await probe_qemu.qemu_facts(QEMUS[OLDEST], state_directory=room)
    assert adopt.pinned_machine(None, facts.aliases, default=facts.default_machine) == facts.aliases["pc"]
    assert await probe_qemu.qemu_facts(QEMUS[OLDEST], state_directory=room) == facts
    assert facts.concrete_machine("q35") == facts.aliases["q35"]
    assert facts.concrete_machine("no-such") is None
    for name in os.listdir(room):
        fill(str(room / name), b"garbage")
    assert await probe_qemu.qemu_facts(QEMUS[OLDEST], state_directory=room) == facts


def test_a_socket_that_a_manager_passed_on_leads_to_the_qemu(room: Path) -> None:
    """The kernel names the process that called listen(); the QEMU is the one that holds the socket."""
    path = str(room / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(5)
        chardev = f"socket,id=m,fd={listener.fileno()},server=on,wait=off"
        process = subprocess.Popen(
            [QEMUS[OLDEST], "-M", "none", "-S", "-display", "none", "-chardev", chardev, "-mon",
             "chardev=m,mode=control"],
            pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        assert adopt.listener_pid(path) == process.pid
        vm = adopt.adopt(path)
        there = RuntimePaths(str(room))
        moved = adopt.destination_argv(vm, qemu="qemu", machine="none", runtime=there)
        assert "fd=" not in " ".join(moved.argv), "a monitor's descriptor is dropped with the monitor"
    finally:
        process.kill()
        process.wait()


async def test_a_guest_outlives_the_agent_that_started_it(room: Path) -> None:
    where = runtime(room, "a")
    args = line(make_spec(room), OLDEST, where, incoming=False)
    code = (
        "import os, signal, sys; from vmferry.vm import spawn; from vmferry.vm.runtime import RuntimePaths\n"
        "s = spawn.spawn(sys.argv[2:], runtime=RuntimePaths(sys.argv[1]))\n"
        "print(s.pid, s.start_time_ticks, s.identity.boot_id, flush=True)\n"
        "os.killpg(os.getpgrp(), signal.SIGKILL)\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, where.directory, *args,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    output, _ = await parent.communicate()
    assert parent.returncode == -signal.SIGKILL
    pid, ticks, boot_id = output.decode().split()
    identity = spawn.ProcessIdentity(int(pid), int(ticks), boot_id)
    try:
        qmp = await connect(where.qmp_path)
        await qmp.execute("cont")
        await reads(where.serial_log_path, MARK)
        await qmp.close()
        assert spawn.is_same_process(identity)
        assert adopt.adopt(where.qmp_path).identity == identity
    finally:
        assert spawn.kill(identity)


@every_qemu
async def test_who_writes_an_image_is_seen_and_a_second_writer_is_refused(version: str, room: Path) -> None:
    here, there = runtime(room, "a"), runtime(room, "b")
    vm = make_spec(room)
    disk = vm.disk[0].path
    assert image_locks.image_locks(disk).can_write
    async with running(line(vm, version, here, incoming=False), here) as (process, _):
        locks = image_locks.image_locks(disk)
        assert [writer.pid for writer in locks.writers] == [process.pid]
        assert locks.can_write is False
        assert locks.foreign == frozenset()
        facts = await probe_host.disk(disk)
        assert (facts.format, facts.virtual_size_bytes) == ("raw", 1 << 20)
        with pytest.raises(SpecError, match='Failed to get "write" lock'):
            async with running(line(vm, version, there, incoming=False), there):
                pass
        async with running(line(vm, version, there, incoming=True), there):
            assert [holder.pid for holder in image_locks.image_locks(disk).writers] == [process.pid]
    assert image_locks.image_locks(disk).can_write


@every_qemu
async def test_probes_of_a_binary(version: str) -> None:
    facts = await probe_qemu.qemu_facts(QEMUS[version])
    assert ".".join(map(str, facts.version)).startswith(version.split("-")[0])
    assert "postcopy-ram" in facts.capabilities
    assert "downtime-limit" in facts.parameters
    assert facts.postcopy == probe_host.userfaultfd().works
    models = {model.name: model for model in facts.cpus["tcg"]}
    assert models["qemu64"].unavailable == ()
    assert (await probe_host.kvm_boot(QEMUS[version], accel="tcg", timeout_s=TIMEOUT_S)).works
    assert "not boot" in (await probe_host.kvm_boot(QEMUS[version], accel="tcg", timeout_s=0.0)).detail
    assert "gave up" in (await probe_host.kvm_boot(QEMUS[version], accel="none")).detail


async def test_doctor_looks_at_everything_and_raises_for_nothing(room: Path) -> None:
    fill(str(room / "disk.img"), bytes(1 << 20))
    good = await probe.doctor(
        qemu=QEMUS[OLDEST],
        clock=SystemClock(),
        state_directory=room,
        ports=(47000, 47099),
        disks=[str(room / "disk.img")],
        offsets=[probe_host.ClockOffset("b", 1.0, 1.0)],
        kvm_boot=False,
    )
    found = {check.name: check for check in good}
    assert {"qemu", "qemu-postcopy", "kvm", "userfaultfd", "memory", "state-directory", "ports"} <= set(found)
    assert found["qemu"].ok
    assert found[f"disk {room}/disk.img"].detail.startswith("raw, 1.0 MiB")
    assert sorted(path for path in os.listdir(room) if not path.startswith("qemu-")) == ["disk.img"]
    bad = await probe.doctor(
        qemu="/no/such/qemu", clock=SystemClock(), state_directory=room / "none", certificates=room, kvm_boot=False
    )
    failed = {check.name for check in bad if check.ok is False}
    assert {"qemu", "state-directory", "certificates"} <= failed
    assert all(check.fix for check in bad if check.ok is False)


async def test_the_best_accelerator_is_tried_once_for_each_boot_of_the_host(room: Path) -> None:
    accel, why = await probe.best_accel(QEMUS[OLDEST], state_directory=room, boot_timeout_s=0.0)
    assert accel == "tcg", "no guest boots in no time"
    assert await probe.best_accel(QEMUS[OLDEST], state_directory=room, boot_timeout_s=0.0) == (accel, why)
    fill(str(room / "accel.json"), b"garbage")
    assert (await probe.best_accel(QEMUS[OLDEST], state_directory=room, boot_timeout_s=0.0))[0] == "tcg"
