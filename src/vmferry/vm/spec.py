"""The VM spec: what a person writes in TOML, as frozen values that travel to the destination's agent.

Theory of operation
-------------------
`load` reads a file, `from_wire` reads what another agent sent; both end in the same strict conversion, so a
spec that arrived over the network is checked as hard as one from disk. Everything that decides the guest's
hardware is in the spec or follows from it alone: a pinned spec (`pin`) gives the same guest on every host.

Rule 1: an unknown key is an error and names the nearest known one; nothing is ignored.
Rule 2: nothing here touches the outside but `load`, which reads one file.
Rule 3: the [migration] table is passed on untouched; whoever plans the migration checks it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
import types
import typing
import uuid as uuid_module
from pathlib import Path
from typing import Any, Literal

import msgspec

from vmferry import limits, units
from vmferry.errors import SpecError

_NAME = re.compile(r"[a-zA-Z0-9._-]{1,64}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_WORD = re.compile(r"[a-zA-Z0-9._-]+")
_MACHINE = re.compile(r"q35|pc|pc-(q35|i440fx)-[0-9]+\.[0-9]+[a-z0-9.-]*")
_IFNAME = re.compile(r"[^\s/,]{1,15}")

Switch = Literal["auto", "on", "off"]
Accel = Literal["auto", "tcg", "kvm"]
Cache = Literal["none", "writeback", "writethrough", "directsync", "unsafe"]


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Direct kernel boot. The files must exist with the same content on every host the VM goes to."""

    image: str
    initrd: str | None = None
    cmdline: str = ""

    def __post_init__(self) -> None:
        _absolute("image", self.image)
        _absolute("initrd", self.initrd)


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One disk or CD-ROM.

    `shared` says that every host sees the same bytes under this path, so nothing is copied. `cache` is
    'none' for a shared disk unless written otherwise: another host must not read what this host's page
    cache still holds. `locking` is QEMU's image locking; 'auto' is on wherever the filesystem can do it.
    """

    path: str
    format: Literal["raw", "qcow2"] = "raw"
    interface: Literal["virtio", "ide", "scsi"] = "virtio"
    readonly: bool = False
    shared: bool = True
    cache: Cache | None = None
    locking: Switch = "auto"
    cdrom: bool = False
    boot: int | None = None

    def __post_init__(self) -> None:
        _absolute("path", self.path)
        if self.cdrom and self.interface == "virtio":
            raise ValueError("a cdrom needs interface 'ide' or 'scsi', there is no virtio CD-ROM")
        if self.boot is not None and not 0 <= self.boot <= 99:
            raise ValueError(f"boot is the place in the boot order, 0 to 99, and not {self.boot}")

    @property
    def is_readonly(self) -> bool:
        """Whether the guest can never write to it; a CD-ROM is always read-only."""
        return self.readonly or self.cdrom

    @property
    def effective_cache(self) -> Cache:
        """The cache mode in use: as written, else 'none' for shared disks and 'writeback' for others."""
        return self.cache or ("none" if self.shared else "writeback")


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One network card. `none` is a card with its cable unplugged; no [[network]] at all means no card."""

    type: Literal["user", "tap", "none"] = "user"
    mac: str | None = None
    model: str = "virtio-net-pci"
    ifname: str | None = None
    bridge: str | None = None

    def __post_init__(self) -> None:
        if self.mac is not None and not _MAC.fullmatch(self.mac):
            raise ValueError(f"mac is six lower-case hex pairs such as 52:54:00:12:34:56, not {self.mac!r}")
        if self.mac is not None and int(self.mac[:2], 16) & 1:
            raise ValueError(f"mac {self.mac!r} is a multicast address and cannot belong to a card")
        if not _WORD.fullmatch(self.model):
            raise ValueError(f"model {self.model!r} is not the name of a QEMU device")
        if self.type != "tap" and (self.ifname or self.bridge):
            raise ValueError(f"ifname and bridge belong to type 'tap' and not to {self.type!r}")
        if self.type == "tap" and bool(self.ifname) == bool(self.bridge):
            raise ValueError("type 'tap' needs either ifname (an existing tap device) or bridge")
        for key, value in (("ifname", self.ifname), ("bridge", self.bridge)):
            if value is not None and not _IFNAME.fullmatch(value):
                raise ValueError(f"{key} {value!r} is not the name of a network interface (1 to 15 letters)")


class Serial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first serial port: a log file in the VM's runtime directory, or a socket there to connect to."""

    to: Literal["file", "socket"] = "file"


class MemoryBackend(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where guest memory lives.

    'file' with `shared` keeps guest memory readable when QEMU dies, which can complete a broken postcopy;
    it costs nothing on a RAM filesystem. `hugepages` needs 'memfd'.
    """

    kind: Literal["ram", "memfd", "file"] = "ram"
    shared: bool = False
    prealloc: bool = False
    hugepages: bool = False

    def __post_init__(self) -> None:
        if self.hugepages and self.kind != "memfd":
            raise ValueError("hugepages needs kind = 'memfd'")
        if self.kind == "file" and not self.shared:
            raise ValueError("kind = 'file' without shared = true would lose every write; set shared = true")


class Balloon(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A memory balloon. With `free_page_hint` the guest tells QEMU during a precopy which of its pages are free, and
    those are not sent (QEMU leaves them alone by itself where postcopy stands by). The guest needs its driver."""

    free_page_hint: bool = True


class VmSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole VM. Sizes are text as written ('512M'); `memory_bytes` is the number.

    `cpu` is 'qemu64' by default: the one model that is the same under TCG and KVM, on every host and in
    every QEMU version. 'max' and 'host' mean something else on each of them, so a guest that started with
    them may find instructions missing after a migration. A guest that needs more names a model which all
    hosts have, for example 'Nehalem'.

    `on_io_error` 'stop' pauses the guest when storage fails, instead of handing it an error: storage that
    breaks right after a migration then costs time and no data.
    """

    name: str
    memory: str
    uuid: str | None = None
    cpus: int = 1
    machine: str = "q35"
    accel: Accel = "auto"
    cpu: str = "qemu64"
    kernel: Kernel | None = None
    firmware: str | None = None
    disk: tuple[Disk, ...] = ()
    network: tuple[Network, ...] = ()
    serial: Serial = Serial()
    memory_backend: MemoryBackend = MemoryBackend()
    rng: bool = True
    balloon: Balloon | None = None
    display: Literal["none"] = "none"
    on_io_error: Literal["stop", "report", "enospc"] = "stop"
    extra_args: tuple[str, ...] = ()
    migration: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _check_identity(self)
        try:
            size = units.parse_size_bytes(self.memory)
        except ValueError as error:
            raise ValueError(f"memory: {error}") from None
        if size < limits.VM_MEMORY_BYTES_MIN or size % units.MIB:
            raise ValueError(f"memory {self.memory!r} is not a whole number of MiB, at least 1")
        if not 1 <= self.cpus <= limits.VM_CPUS_MAX:
            raise ValueError(f"cpus is 1 to {limits.VM_CPUS_MAX}, and not {self.cpus}")
        if not self.cpu or self.cpu.startswith("-"):
            raise ValueError(f"cpu {self.cpu!r} is not the name of a CPU model")
        if not _MACHINE.fullmatch(self.machine):
            raise ValueError(f"machine is 'q35', 'pc' or one such as 'pc-q35-7.2', and not {self.machine!r}")
        _absolute("firmware", self.firmware)
        _check_counts(self)
        _check_extra_args(self.extra_args)

    @property
    def memory_bytes(self) -> int:
        """The size of guest memory in bytes."""
        return units.parse_size_bytes(self.memory)

    @property
    def machine_family(self) -> Literal["q35", "pc"]:
        """Which chipset: it decides the buses that devices sit on."""
        return "q35" if "q35" in self.machine else "pc"

    def mac_of(self, index: int) -> str:
        """The MAC address of card `index`: as written, else made from the VM's name, so it is stable."""
        written = self.network[index].mac
        if written is not None:
            return written
        digest = hashlib.sha256(f"{self.name}/{index}".encode()).hexdigest()
        return f"52:54:00:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"


def load(path: Path | str) -> VmSpec:
    """Read a spec from a TOML file. Relative paths in it count from the file's directory.

    Raises SpecError with one sentence naming the file and the key; no guest exists then.
    """
    where = Path(path)
    try:
        with where.open("rb") as file:
            text = file.read(limits.VM_SPEC_BYTES_MAX + 1)
    except OSError as error:
        raise SpecError(f"{where}: cannot be read: {error.strerror}", cause=error) from error
    if len(text) > limits.VM_SPEC_BYTES_MAX:
        raise SpecError(f"{where}: larger than {limits.VM_SPEC_BYTES_MAX // 1024} KiB, so this is not a VM spec")
    try:
        table = tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: is not UTF-8 text", cause=error) from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where}: is not TOML: {error}", cause=error) from error
    return _convert(_absolute_paths(table, where.resolve().parent), str(where))


def to_wire(spec: VmSpec) -> dict[str, Any]:
    """The spec as plain JSON values; keys at their default are left out."""
    wire = msgspec.to_builtins(spec)
    defaults = msgspec.to_builtins(VmSpec(name="x", memory="1M"))
    return {key: value for key, value in wire.items() if key == "memory" or value != defaults[key]}


def from_wire(wire: Any, *, source: str = "spec from a peer") -> VmSpec:
    """The spec that `to_wire` gave. Raises SpecError, naming `source` and the key."""
    return _convert(wire, source)


def pin(spec: VmSpec, *, machine: str, accel: Literal["tcg", "kvm"], uuid: str | None = None) -> VmSpec:
    """The spec with everything concrete that this host would otherwise choose: done once, at first start.

    `machine` is the versioned name ('pc-q35-7.2') that QEMU gave for the spec's alias.
    """
    identity = spec.uuid or uuid or str(uuid_module.uuid4())
    return msgspec.structs.replace(spec, machine=machine, accel=accel, uuid=identity)


def is_pinned(spec: VmSpec) -> bool:
    """Whether two hosts would build the same guest from it: versioned machine, chosen accel, fixed uuid."""
    return spec.uuid is not None and spec.accel != "auto" and spec.machine not in ("q35", "pc")


def _convert(value: Any, source: str) -> VmSpec:
    if not isinstance(value, dict):
        raise SpecError(f"{source}: a spec is a table of keys, and not {type(value).__name__}")
    _refuse_unknown_keys(value, VmSpec, source, "")
    try:
        return msgspec.convert(value, VmSpec, strict=True)
    except msgspec.ValidationError as error:
        raise SpecError(f"{source}: {_sentence(str(error))}") from error


_PLAIN = {
    "str": "text",
    "int": "a whole number",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}


def _sentence(text: str) -> str:
    """msgspec's message, key first: 'Expected `int`, got `str` - at `$.cpus`' -> 'cpus: ...'."""
    reason, _, place = text.partition(" - at `")
    key = place.rstrip("`").removeprefix("$").removeprefix(".")
    missing = re.fullmatch(r"Object missing required field `(.*)`", reason)
    if missing is not None:
        return f"the key '{missing.group(1)}' is missing" + (f" in {key}" if key else "")
    choice = re.fullmatch(r"Invalid enum value '(.*)'", reason)
    if choice is not None:
        return f"{key}: '{choice.group(1)}' is not one of {', '.join(_choices(key))}"
    reason = re.sub(r"`([^`]*)`", lambda found: _in_words(found.group(1)), reason)
    return f"{key}: {reason[:1].lower()}{reason[1:]}" if key else reason


def _in_words(type_names: str) -> str:
    """'str | null' -> 'text'."""
    names = [name for name in type_names.split(" | ") if name != "null"]
    return " or ".join(_PLAIN.get(name, name) for name in names) or "nothing"


def _choices(key: str) -> list[str]:
    """The values that a key of a fixed choice may have."""
    kind: Any = VmSpec
    for word in re.sub(r"\[.*?\]", "", key).split("."):
        while typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
        kind = next(field.type for field in msgspec.structs.fields(kind) if field.name == word)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return [str(value) for value in typing.get_args(kind)]


def _refuse_unknown_keys(value: Any, kind: Any, source: str, place: str) -> None:
    """Walk the table beside the types, so that the error can name the nearest known key."""
    if isinstance(kind, types.UnionType):  # an optional table, such as `Kernel | None`
        kind = next((part for part in typing.get_args(kind) if part is not type(None)), kind)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_unknown_keys(item, typing.get_args(kind)[0], source, f"{place}[{index}]")
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict)):
        return
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, item in value.items():
        here = f"{place}.{key}" if place else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(sorted(known))}"
            raise SpecError(f"{source}: unknown key '{here}'; {advice}")
        _refuse_unknown_keys(item, known[key], source, here)


def _absolute_paths(table: dict[str, Any], base: Path) -> dict[str, Any]:
    """The table with relative paths joined to `base`; values of a wrong type are left for the checks."""

    def join(part: Any, *keys: str) -> Any:
        if not isinstance(part, dict):
            return part
        return {
            key: str(base / value) if key in keys and isinstance(value, str) and value else value
            for key, value in part.items()
        }

    result = dict(join(table, "firmware"))
    if "kernel" in result:
        result["kernel"] = join(result["kernel"], "image", "initrd")
    if isinstance(result.get("disk"), list):
        result["disk"] = [join(disk, "path") for disk in result["disk"]]
    return result


def _absolute(key: str, path: str | None) -> None:
    if path is not None and (not path.startswith("/") or "\0" in path):
        raise ValueError(f"{key} {path!r} is not an absolute path")


def is_name(text: str) -> bool:
    """Whether a VM may be called so: it becomes part of file names."""
    return _NAME.fullmatch(text) is not None and text not in (".", "..")


def _check_identity(spec: VmSpec) -> None:
    if not is_name(spec.name):
        raise ValueError(f"name is 1 to 64 letters, digits, dots, dashes or underscores, and not {spec.name!r}")
    if spec.uuid is not None:
        try:
            canonical = str(uuid_module.UUID(spec.uuid))
        except ValueError:
            canonical = ""
        if canonical != spec.uuid:
            raise ValueError(f"uuid {spec.uuid!r} is not a UUID in lower case with dashes")


def _check_counts(spec: VmSpec) -> None:
    """Refuse what does not fit the machine's slots, and the same disk or card twice."""
    ide = sum(disk.interface == "ide" for disk in spec.disk)
    ide_max = 6 if spec.machine_family == "q35" else 4
    if ide > ide_max:
        raise ValueError(f"disk: machine {spec.machine!r} takes {ide_max} IDE disks, and not {ide}")
    if len(spec.disk) > limits.VM_DISKS_MAX:
        raise ValueError(f"disk: at most {limits.VM_DISKS_MAX} disks fit, and not {len(spec.disk)}")
    if len(spec.network) > limits.VM_NETWORKS_MAX:
        raise ValueError(f"network: at most {limits.VM_NETWORKS_MAX} cards fit, and not {len(spec.network)}")
    uniques: tuple[tuple[str, list[Any]], ...] = (
        ("disk: path", [disk.path for disk in spec.disk if not disk.is_readonly]),
        ("disk: boot", [disk.boot for disk in spec.disk if disk.boot is not None]),
        ("network: mac", [spec.mac_of(index) for index in range(len(spec.network))]),
    )
    for what, values in uniques:
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"{what} {twice!r} is there twice")


# What the agent itself puts on the command line; a second one would take the guest out of its hands.
_OWNED_ARGS = {
    "S", "incoming", "qmp", "qmp-pretty", "mon", "monitor", "daemonize", "pidfile", "snapshot", "name",
    "machine", "M", "m", "uuid", "readconfig", "preconfig", "loadvm", "chroot", "runas",
}  # fmt: skip


def _check_extra_args(args: tuple[str, ...]) -> None:
    for arg in args:
        if "\0" in arg:
            raise ValueError(f"extra_args: {arg!r} holds a NUL character")
        if arg.startswith("-") and arg.lstrip("-") in _OWNED_ARGS:
            raise ValueError(f"extra_args: {arg!r} belongs to vmferry and cannot be given here")
