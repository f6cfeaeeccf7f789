"""Specs: strict, and errors that say what to do."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry import limits
from vmferry.errors import SpecError
from vmferry.vm import spec as vm_spec

FULL = """
name = "web1"
memory = "512M"
cpus = 2
machine = "pc"
accel = "tcg"
extra_args = ["-global", "x=y"]
[kernel]
image = "vmlinuz"
cmdline = "console=ttyS0"
[[disk]]
path = "a.img"
boot = 0
[[disk]]
path = "/iso/x.iso"
interface = "ide"
cdrom = true
[[network]]
type = "tap"
ifname = "tap0"
mac = "52:54:00:00:00:01"
[[network]]
[serial]
to = "socket"
[memory_backend]
kind = "file"
shared = true
[migration]
mode = "postcopy"
options = { downtime = "200ms" }
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "vm.toml"
    path.write_text(text)
    return path


def test_a_full_spec(tmp_path: Path) -> None:
    spec = vm_spec.load(write(tmp_path, FULL))
    assert spec.memory_bytes == 512 << 20
    assert spec.kernel is not None
    assert spec.kernel.image == str(tmp_path / "vmlinuz")
    assert spec.disk[0].path == str(tmp_path / "a.img")
    assert spec.disk[1].is_readonly
    assert spec.migration == {"mode": "postcopy", "options": {"downtime": "200ms"}}
    assert vm_spec.from_wire(msgspec.json.decode(msgspec.json.encode(vm_spec.to_wire(spec)))) == spec


BASE = 'name = "w"\nmemory = "8M"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + "memroy = 1", r"unknown key 'memroy'; did you mean 'memory'\?"),
        (BASE + "zzz = 1", "unknown key 'zzz'; known keys are accel, "),
        (BASE + '[[disk]]\npath = "/a"\n[[disk]]\npth = "b"', r"'disk\[1\].pth'; did you mean 'path'"),
        (BASE + '[kernel]\nimg = "b"', r"unknown key 'kernel.img'; did you mean 'image'\?"),
        ('name = "w"', "the key 'memory' is missing"),
        (BASE + "[[disk]]", r"the key 'path' is missing in disk\[0\]"),
        (BASE + 'cpus = "2"', "cpus: expected a whole number, got text"),
        (BASE + "cpus = 0", "cpus is 1 to "),
        (BASE + 'accel = "xen"', "accel: 'xen' is not one of auto, tcg, kvm"),
        (BASE + '[[disk]]\npath = "a"\ncache = "x"', r"disk\[0\].cache: 'x' is not one of none, writeback"),
        (BASE + "[[disk]]\npath = 3", r"disk\[0\].path: expected text, got a whole number"),
        (BASE + "disk = 3", "disk: expected a list, got a whole number"),
        ('name = "a b"\nmemory = "8M"', "name is 1 to 64 letters"),
        ('name = ".."\nmemory = "8M"', "name is 1 to 64 letters"),
        ('name = "w"\nmemory = "lots"', "memory: 'lots' is not a size"),
        ('name = "w"\nmemory = "1000"', "whole number of MiB"),
        (BASE + 'machine = "virt"', "machine is 'q35', 'pc' or one such"),
        (BASE + 'uuid = "x"', "is not a UUID"),
        (BASE + 'cpu = ""', "CPU model"),
        (BASE + '[[disk]]\npath = "a"\ncdrom = true', "there is no virtio CD-ROM"),
        (BASE + '[[disk]]\npath = "a"\n[[disk]]\npath = "a"', "is there twice"),
        (BASE + '[[disk]]\npath = "a"\nboot = 100', "boot order"),
        (BASE + '[[disk]]\npath = "a"\ninterface = "ide"\n' * 7, "takes 6 IDE disks"),
        (BASE + '[[network]]\nmac = "52:54"', "six lower-case hex pairs"),
        (BASE + '[[network]]\nmac = "01:00:00:00:00:00"', "multicast"),
        (BASE + '[[network]]\ntype = "tap"', "needs either ifname"),
        (BASE + '[[network]]\nbridge = "br0"', "belong to type 'tap'"),
        (BASE + '[[network]]\ntype = "tap"\nbridge = "a b"', "name of a network interface"),
        (BASE + '[memory_backend]\nkind = "file"', "would lose every write"),
        (BASE + "[memory_backend]\nhugepages = true", "needs kind = 'memfd'"),
        (BASE + 'extra_args = ["-S"]', "belongs to vmferry"),
        (BASE + 'extra_args = ["--qmp", "x"]', "belongs to vmferry"),
        ("name =", "is not TOML"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        vm_spec.load(write(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path}/vm.toml: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_specs(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        vm_spec.load(tmp_path / "none.toml")
    big = tmp_path / "big"
    big.write_bytes(b" " * (limits.VM_SPEC_BYTES_MAX + 1))
    with pytest.raises(SpecError, match="not a VM spec"):
        vm_spec.load(big)
    big.write_bytes(b"\xff")
    with pytest.raises(SpecError, match="UTF-8"):
        vm_spec.load(big)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["name", "memory", "disk", "network", "path", "kernel", "image", "serial", "to", "x"]), inner),
)  # fmt: skip


@given(JSON)
def test_whatever_a_peer_sends_gives_a_spec_or_a_spec_error(value: Any) -> None:
    with contextlib.suppress(SpecError):
        spec = vm_spec.from_wire(value)
        assert vm_spec.from_wire(vm_spec.to_wire(spec)) == spec


def test_pinning_fixes_what_a_host_would_choose() -> None:
    spec = vm_spec.from_wire({"name": "w", "memory": "8M"})
    assert not vm_spec.is_pinned(spec)
    pinned = vm_spec.pin(spec, machine="pc-q35-7.2", accel="tcg")
    assert vm_spec.is_pinned(pinned)
    assert vm_spec.pin(pinned, machine="pc-q35-7.2", accel="tcg") == pinned
    assert vm_spec.from_wire(vm_spec.to_wire(pinned)) == pinned


def test_a_card_without_a_mac_has_a_stable_one() -> None:
    spec = vm_spec.from_wire({"name": "w", "memory": "8M", "network": [{}, {}]})
    assert spec.mac_of(0) == spec.mac_of(0) != spec.mac_of(1)
    assert spec.mac_of(0).startswith("52:54:00:")
