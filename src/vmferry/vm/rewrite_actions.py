"""What becomes of one option of a QEMU command line that moves to another host; the table is in rewrite.py.

Rule 1: an action keeps what the guest can see and changes only what belongs to the host.
Rule 2: a path either stays and is listed as needed on the destination, or moves to the runtime directory.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from vmferry import limits
from vmferry.errors import SpecError
from vmferry.vm import qemuopts
from vmferry.vm.runtime import RuntimePaths

PathKind = Literal["file", "directory", "missing"]
_PROTOCOL = re.compile(r"[A-Za-z0-9_+.-]+:")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option as QEMU reads it; `name` is '' for a bare argument, which QEMU takes as the first disk."""

    name: str
    value: str | None


@dataclasses.dataclass(slots=True)
class Work:
    """One rewriting: what is known, and what has been gathered so far.

    `has_left` says that the QEMU is no longer in `cwd`.
    """

    cwd: str
    runtime: RuntimePaths
    machine: str
    kind: Callable[[str], PathKind]
    monitors: frozenset[str]
    has_left: bool
    notes: list[str] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    taken: set[str] = dataclasses.field(default_factory=set)
    has_machine: bool = False
    display: str = "none"
    serials: int = 0

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def absolute(self, path: str) -> str:
        """An absolute path that the destination must have too."""
        if not path.startswith("/") and not self.cwd:
            raise refused(f"{path!r} is relative, and the directory that QEMU was started in is not known")
        full = posixpath.normpath(posixpath.join(self.cwd, path)) if not path.startswith("/") else path
        if full.startswith("/dev/fdset/") or re.fullmatch(r"/(proc/self|dev)/fd/\d+", full):
            raise refused(f"{full} is a file descriptor that only the running QEMU has")
        if full not in self.files:
            self.files.append(full)
        return full

    def image(self, path: str) -> str:
        """The absolute path of an image that the running QEMU must still be able to open by its name.

        A QEMU opens an image anew to give up its lock at the end of a migration. If a relative name leads
        nowhere by then, every migration fails at the switchover, so it is refused before it starts.
        """
        full = self.absolute(path)
        # A daemon has gone to /, where the same name may have been made to lead to the same file.
        if self.has_left and not path.startswith("/") and self.kind(posixpath.join("/", path)) == "missing":
            raise SpecError(
                f"this VM cannot be migrated: its disk {path!r} has a relative path, and -daemonize made "
                "QEMU leave the directory that it counts from, so QEMU cannot hand the disk over",
                side="source",
                hint=f"start the VM with {full}, or make /{path} lead there",
            )
        return full

    def local(self, path: str) -> str:
        """A path in the runtime directory that takes the place of `path`; two never share one."""
        wanted = self.runtime.rerooted(path)
        if len(wanted.encode()) > limits.UNIX_SOCKET_PATH_BYTES_MAX - 4:
            wanted = self.runtime.rerooted("adopted")
        result, number = wanted, 1
        while result in self.taken or result in (self.runtime.qmp_path, self.runtime.log_path):
            number += 1
            result = f"{wanted}.{number}"
        self.taken.add(result)
        return result


Action = Callable[[Work, Option], list[str]]


def refused(why: str) -> SpecError:
    return SpecError(
        f"this VM's command line cannot be used on another host: {why}",
        side="source",
        hint="start the VM from a vmferry spec, or without this option",
    )


# --- actions: whole options ------------------------------------------------------------------------------


def keep(_work: Work, option: Option) -> list[str]:
    if not option.name:
        return [option.value or ""]
    return [f"-{option.name}"] if option.value is None else [f"-{option.name}", option.value]


def drop(_work: Work, _option: Option) -> list[str]:
    return []


def drop_with(reason: str) -> Action:
    def action(work: Work, option: Option) -> list[str]:
        work.note(f"{' '.join(keep(work, option))} is left out: {reason}")
        return []

    return action


def keep_with(reason: str) -> Action:
    def action(work: Work, option: Option) -> list[str]:
        work.note(f"{' '.join(keep(work, option))} is kept: {reason}")
        return keep(work, option)

    return action


def refuse(reason: str) -> Action:
    def action(_work: Work, option: Option) -> list[str]:
        raise refused(f"-{option.name} {reason}")

    return action


def path(work: Work, option: Option) -> list[str]:
    return keep(work, Option(option.name, work.absolute(option.value or "")))


def image(work: Work, option: Option) -> list[str]:
    return keep(work, Option(option.name, _image_name(work, option.value or "")))


def data_file(work: Work, option: Option) -> list[str]:
    return keep(work, Option(option.name, _data_name(work, option.value or "")))


def local_path(work: Work, option: Option) -> list[str]:
    return keep(work, Option(option.name, work.local(option.value or "")))


# --- values ----------------------------------------------------------------------------------------------


def _image_name(work: Work, name: str) -> str:
    """What QEMU takes as an image: a path, or a protocol such as nbd: that needs no rewriting."""
    if name.startswith("json:"):
        nested = _nested(work, qemuopts.parse_json(name.removeprefix("json:")))
        return "json:" + qemuopts.render_json(nested)
    if name.startswith("file:"):
        return "file:" + work.image(name.removeprefix("file:"))
    if name.startswith(("fat:", "fd:")):
        raise refused(f"the image {name!r} exists only inside the running QEMU or this host")
    if not name or _PROTOCOL.match(name.split("/", 1)[0]):
        return name
    return work.image(name)


def _data_name(work: Work, name: str) -> str:
    """A firmware file: QEMU takes it from the working directory, else from its own data directory."""
    if not name:
        return name
    here = name if name.startswith("/") else posixpath.join(work.cwd, name)
    if name.startswith("/") or work.kind(here) != "missing":
        return work.absolute(name)
    work.note(f"firmware {name!r} comes from QEMU's own data directory, which the destination must have too")
    return name


def _nested(work: Work, value: Any, *, key: str = "") -> Any:
    """A JSON description of a block node, with its file names made absolute, at any depth."""
    if isinstance(value, dict):
        return {name: _nested(work, part, key=name) for name, part in value.items()}
    if isinstance(value, list):
        return [_nested(work, part) for part in value]
    if isinstance(value, str) and key in ("filename", "path") and value:
        return work.image(value)
    return value


def keyed(
    *,
    implied: str | None = None,
    paths: tuple[str, ...] = (),
    data_files: tuple[str, ...] = (),
    descriptors: tuple[str, ...] = (),
) -> Action:
    """Keep the option; make the values of `paths` absolute; refuse the keys in `descriptors`."""

    def action(work: Work, option: Option) -> list[str]:
        text = option.value or ""
        if qemuopts.is_json(text):
            table = qemuopts.parse_json(text)
            for key, value in table.items():
                if isinstance(value, str):
                    table[key] = change(work, option, key, value)
                elif key in descriptors:
                    change(work, option, key, str(value))
            return [f"-{option.name}", qemuopts.render_json(table)]
        pairs = tuple(
            (key, value if value is None else change(work, option, key, value))
            for key, value in qemuopts.parse(text, implied=implied)
        )
        return [f"-{option.name}", qemuopts.render(pairs, implied=implied)]

    def change(work: Work, option: Option, key: str, value: str) -> str:
        if key in descriptors:
            raise refused(f"-{option.name} has {key}={value}, a descriptor that only the running QEMU has")
        if key in paths and value:
            return work.absolute(value)
        return _data_name(work, value) if key in data_files else value

    return action


# --- actions: options with an inner life -----------------------------------------------------------------


def machine(work: Work, option: Option) -> list[str]:
    pairs = qemuopts.parse(option.value or "", implied="type")
    if qemuopts.get(pairs, "type") is not None:
        if qemuopts.get(pairs, "type") != work.machine:
            work.note(f"machine {qemuopts.get(pairs, 'type')} is written as {work.machine}, which it means here")
        pairs = qemuopts.put(pairs, "type", work.machine)
        work.has_machine = True
    fixed = tuple(
        (key, work.absolute(value) if key in ("kernel", "initrd", "dtb") and value else value) for key, value in pairs
    )
    return ["-machine", qemuopts.render(fixed, implied="type")]


def drive(work: Work, option: Option) -> list[str]:
    pairs = qemuopts.parse(option.value or "")
    if qemuopts.is_on(qemuopts.get(pairs, "snapshot")):
        raise refused("-drive has snapshot=on: the guest's writes are in a temporary file of this QEMU")
    result: list[qemuopts.Pair] = []
    for key, value in pairs:
        if key == "file" and value:
            value = _image_name(work, value)
        elif key.rpartition(".")[2] in ("filename", "path") and value:
            value = work.image(value)
        result.append((key, value))
    return ["-drive", qemuopts.render(result)]


def blockdev(work: Work, option: Option) -> list[str]:
    text = option.value or ""
    if qemuopts.is_json(text):
        return ["-blockdev", qemuopts.render_json(_nested(work, qemuopts.parse_json(text)))]
    pairs = [
        (key, work.image(value) if key.rpartition(".")[2] in ("filename", "path") and value else value)
        for key, value in qemuopts.parse(text, implied="driver")
    ]
    return ["-blockdev", qemuopts.render(pairs, implied="driver")]


_OBJECT_PATHS = ("file", "dir", "filename", "evdev", "loadfile", "keytab")


def object(work: Work, option: Option) -> list[str]:
    text = option.value or ""
    as_json = qemuopts.is_json(text)
    table: list[tuple[str, Any]]
    table = list(qemuopts.parse_json(text).items()) if as_json else list(qemuopts.parse(text, implied="qom-type"))
    facts = dict(table)
    kind, object_id = str(facts.get("qom-type")), str(facts.get("id"))
    if kind == "memory-backend-file":
        facts["mem-path"] = _memory_path(work, object_id, str(facts.get("mem-path", "")), facts.get("share"))
    elif kind == "filter-dump":
        facts["file"] = work.local(str(facts.get("file", "")))
    else:
        for key in _OBJECT_PATHS:
            if isinstance(facts.get(key), str):
                facts[key] = work.absolute(facts[key])
                work.note(f"object {object_id!r} ({kind}) needs {facts[key]} on the destination too")
    # Keys may repeat in the text form; only the ones that were looked at are taken from `facts`.
    changed = [(key, facts[key] if key in ("mem-path", *_OBJECT_PATHS) else value) for key, value in table]
    if as_json:
        return ["-object", qemuopts.render_json(dict(changed))]
    return ["-object", qemuopts.render(changed, implied="qom-type")]


def _memory_path(work: Work, object_id: str, path: str, share: Any) -> str:
    """Shared guest memory gets a file of its own: two QEMUs on one file would write over each other."""
    full = path if path.startswith("/") else posixpath.join(work.cwd, path)
    shared = share is True or qemuopts.is_on(share if isinstance(share, str) else None)
    if not shared or work.kind(full) == "directory":
        return work.absolute(path)
    fresh = work.runtime.ram_path(object_id)
    work.note(f"guest memory of {object_id!r} is in {fresh} there, not in {full}")
    return fresh


_NET_DESCRIPTORS = ("fd", "fds", "vhostfd", "vhostfds", "sock_fd")


def network(work: Work, option: Option) -> list[str]:
    text = option.value or ""
    implied = {"netdev": "type", "nic": "type", "net": "type"}[option.name]
    pairs: Sequence[tuple[str, Any]]
    pairs = (
        tuple(qemuopts.parse_json(text).items()) if qemuopts.is_json(text) else qemuopts.parse(text, implied=implied)
    )
    kind = str(dict(pairs).get("type"))
    if kind in ("tap", "bridge", "vhost-vdpa", "vde", "passt"):
        work.note(f"network {text!r} needs the same {kind} on the destination")
    for key, value in pairs:
        if key in ("listen", "hostfwd", "localaddr", "udp", "connect", "mcast", "guestfwd", "addr.port"):
            work.note(f"network has {key}={value}, which the destination must be free to use as well")
        if key.endswith(".type") and value == "fd":
            raise refused(f"-{option.name} {text} uses a descriptor that only the running QEMU has")
    paths = ("script", "downscript", "smb", "tftp", "sock", "vhostdev", "helper", "path", "addr.path")
    free = tuple(path for path in paths if dict(pairs).get(path) not in ("no", "", None))
    return keyed(implied=implied, paths=free, descriptors=_NET_DESCRIPTORS)(work, option)


def device(work: Work, option: Option) -> list[str]:
    text = option.value or ""
    if re.search(r'(^|driver"?[:=]\s*"?)vfio-|sysfsdev', text):
        work.note(f"device {text!r} is hardware of this host; the destination needs the same at that address")
    return keyed(
        implied="driver",
        paths=("file", "mem-path", "evdev"),
        data_files=("romfile",),
        descriptors=("fd", "vhostfd", "vhostfds"),
    )(work, option)


def chardev(work: Work, option: Option) -> list[str]:
    if qemuopts.is_json(option.value or ""):
        raise refused("-chardev is written as JSON, which vmferry reads for devices and disks only")
    pairs = _spelled_out(qemuopts.parse(option.value or "", implied="backend"))
    if (qemuopts.get(pairs, "id") or "") in work.monitors:
        return []
    return ["-chardev", qemuopts.render(_chardev_pairs(work, pairs), implied="backend")]


def _chardev_pairs(work: Work, pairs: qemuopts.Pairs) -> qemuopts.Pairs:
    chardev = qemuopts.get(pairs, "id") or ""
    logfile = qemuopts.get(pairs, "logfile")
    if logfile:
        pairs = qemuopts.put(pairs, "logfile", work.local(logfile))
    path = qemuopts.get(pairs, "path")
    match qemuopts.get(pairs, "backend"):
        case "stdio" | "pipe" as backend:
            work.note(f"chardev {chardev!r} was a {backend}; on the destination it is a file")
            kept = qemuopts.drop(pairs, "backend", "path", "signal")
            own = work.local(f"{chardev}.log")
            return (("backend", "file"), *kept, ("path", own), ("append", "on"))
        case "file":
            return qemuopts.put(qemuopts.put(pairs, "path", work.local(path or chardev)), "append", "on")
        case "socket" if qemuopts.get(pairs, "fd") is not None:
            raise refused(f"chardev {chardev!r} uses a descriptor that only the running QEMU has")
        case "socket" if qemuopts.is_on(qemuopts.get(pairs, "server")):
            pairs = qemuopts.put(pairs, "wait", "off")
            if path:
                return qemuopts.put(pairs, "path", work.local(path))
            work.note(f"chardev {chardev!r} listens on a TCP port, which must be free on the destination")
        case "socket" | "udp" | "serial" | "tty" | "parallel" | "parport" as backend:
            work.note(f"chardev {chardev!r} ({backend}) needs its other end on the destination")
            if path:
                return qemuopts.put(pairs, "path", work.absolute(path))
        case _:
            pass
    return pairs


def character_device(work: Work, option: Option) -> list[str]:
    """-serial, -parallel, -debugcon: the port stays, what it is connected to may change."""
    text = option.value or ""
    if text.startswith("mon:"):
        text = text.removeprefix("mon:")
    head, colon, rest = text.partition(":")
    if head in ("chardev", "none", "null", "vc", "pty", "msmouse", "braille") or text == "":
        return [f"-{option.name}", text]
    work.serials += 1
    chardev = f"vmferry-{option.name}{work.serials}"
    pairs: qemuopts.Pairs
    if head in ("stdio", "con"):
        pairs = (("backend", "stdio"), ("id", chardev))
    elif head in ("file", "pipe") and colon:
        pairs = (("backend", head), ("id", chardev), ("path", rest))
    elif head == "unix" and colon:
        fields = qemuopts.parse(rest, implied="path")
        pairs = (("backend", "socket"), ("id", chardev), *fields)
    elif head in ("tcp", "telnet", "websocket") and colon:
        address, *flags = qemuopts.parse(rest, implied="address")
        host, _, port = (address[1] or "").rpartition(":")
        kind: qemuopts.Pairs = () if head == "tcp" else ((head, "on"),)
        place = (("host", host), ("port", port)) if host else (("host", "0.0.0.0"), ("port", port))
        pairs = (("backend", "socket"), ("id", chardev), *place, *kind, *flags)
    elif text.startswith("/dev/"):
        pairs = (("backend", "serial"), ("id", chardev), ("path", text))
    else:
        raise refused(f"-{option.name} {text} is connected to something that is not known")
    return [
        "-chardev",
        qemuopts.render(_chardev_pairs(work, _spelled_out(pairs)), implied="backend"),
        f"-{option.name}",
        f"chardev:{chardev}",
    ]


def _spelled_out(pairs: qemuopts.Pairs) -> qemuopts.Pairs:
    """'server,nowait' -> 'server=on,wait=off': newer QEMUs do not promise to take the short flags."""
    return tuple(
        (key, value)
        if value is not None
        else (key.removeprefix("no"), "off")
        if key.startswith("no") and key != "nodelay"
        else (key, "on")
        for key, value in pairs
    )


def display(work: Work, option: Option) -> list[str]:
    text = option.value or ""
    if qemuopts.is_json(text):
        text = qemuopts.render(((k, str(v)) for k, v in qemuopts.parse_json(text).items()), implied="type")
    pairs = qemuopts.parse(text, implied="type")
    kind = pairs[0][1] if pairs and pairs[0][0] == "type" else pairs[0][0] if pairs else "none"
    if kind == "vnc":
        return vnc(work, Option("vnc", (option.value or "").removeprefix("vnc=")))
    if kind == "egl-headless":
        work.display = option.value or "egl-headless"
    elif kind != "none":
        work.display = "egl-headless" if qemuopts.get(pairs, "gl") in ("on", "core", "es") else "none"
        work.note(f"-display {kind} becomes {work.display}: the destination has no screen to show it on")
    return []


def vnc(work: Work, option: Option) -> list[str]:
    pairs = qemuopts.parse(option.value or "", implied="vnc")
    if not pairs or pairs[0] == ("vnc", "none"):
        return []
    kept = qemuopts.drop(pairs, "vnc", "to", "websocket", "reverse")
    work.note(f"VNC at {pairs[0][1]!r} becomes the socket {work.runtime.vnc_path} on the destination")
    return ["-vnc", qemuopts.render((("vnc", f"unix:{work.runtime.vnc_path}"), *kept), implied="vnc")]


def spice(work: Work, option: Option) -> list[str]:
    pairs = qemuopts.drop(qemuopts.parse(option.value or ""), "port", "tls-port", "addr", "unix", "ipv4", "ipv6")
    socket = work.local("spice.sock")
    work.note(f"SPICE becomes the socket {socket} on the destination")
    return ["-spice", qemuopts.render((("unix", "on"), ("addr", socket), *pairs))]


def audio(work: Work, option: Option) -> list[str]:
    """The guest's sound card stays; what it plays goes nowhere."""
    text = option.value or ""
    pairs = qemuopts.parse(text, implied="driver") if not qemuopts.is_json(text) else ()
    table = qemuopts.parse_json(text) if qemuopts.is_json(text) else dict(pairs)
    kept = [("driver", "none"), *((key, str(table[key])) for key in ("id", "model") if key in table)]
    if table.get("driver") != "none":
        work.note(f"sound that went to {table.get('driver')!r} goes nowhere on the destination")
    return [f"-{option.name}", qemuopts.render(kept, implied="driver")]


def set(work: Work, option: Option) -> list[str]:
    key, _, value = (option.value or "").partition("=")
    if key.rpartition(".")[2] in ("file", "filename", "path", "mem-path", "fd") and not value.startswith("/"):
        raise refused(f"-set {option.value} changes a path or descriptor behind the other options")
    return keep(work, option)


def acpitable(work: Work, option: Option) -> list[str]:
    """Its files are a list with colons between."""
    pairs = [
        (key, ":".join(work.absolute(part) for part in value.split(":")))
        if key in ("file", "data") and value
        else (key, value)
        for key, value in qemuopts.parse(option.value or "")
    ]
    return ["-acpitable", qemuopts.render(pairs)]


def icount(work: Work, option: Option) -> list[str]:
    if qemuopts.get(qemuopts.parse(option.value or "", implied="shift"), "rr") not in (None, "none"):
        raise refused("-icount records or replays into a file of this host")
    return keep(work, option)
