"""A QEMU command line for another host: the same guest hardware, other sockets, logs and listeners.

Theory of operation
-------------------
Every option of QEMU is in one table with what happens to it. What the guest can see is kept, in its order,
because the order decides addresses and names. What belongs to the host (monitors, log files, displays) is
replaced or dropped. What cannot be carried over (open file descriptors, a snapshot that lives in a
temporary file) is refused with a sentence that says why. Pure: what a path is on this host is asked through
the `kind` that the caller gives.

Rule 1: an option that is not in the table is refused: dropping hardware unseen would break the guest.
Rule 2: a change that a person may miss on the destination is in the notes.
Rule 3: no vCPU runs by itself there: -S and `-incoming defer` are always the last word.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from vmferry.errors import SpecError
from vmferry.vm import qemuopts
from vmferry.vm import rewrite_actions as actions
from vmferry.vm.argv import qmp_args
from vmferry.vm.runtime import RuntimePaths


@dataclasses.dataclass(frozen=True, slots=True)
class DestinationArgv:
    """A command line for the destination, what people should know, and the files it needs there."""

    argv: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    """Whether the option takes an argument, and what becomes of it."""

    takes_value: bool
    action: actions.Action


def rewrite(
    args: Sequence[str],
    *,
    qemu: str,
    cwd: str,
    runtime: RuntimePaths,
    machine: str,
    kind: Callable[[str], actions.PathKind],
    has_left: bool = False,
) -> DestinationArgv:
    """The destination's command line for a guest that runs with `args` (without the program's name).

    `machine` is the versioned machine type the guest runs with, `cwd` the directory its relative paths
    count from (`has_left` when the QEMU is not there any more). Raises SpecError for what cannot be
    carried over; nothing exists then.
    """
    options = split_options(args)
    work = actions.Work(cwd, runtime, machine, kind, _monitor_chardevs(options), has_left)
    result: list[str] = []
    for option in options:
        try:
            result += RULES[option.name].action(work, option)
        except ValueError as error:
            text = f"-{option.name} {option.value}"
            raise SpecError(f"the option '{text}' cannot be read: {error}", side="source") from error
    if not work.has_machine:
        result += ["-machine", machine]
    result += ["-display", work.display, "-monitor", "none", *qmp_args(runtime), "-S", "-incoming", "defer"]
    return DestinationArgv((qemu, *result), tuple(work.notes), tuple(work.files))


def split_options(args: Sequence[str]) -> tuple[actions.Option, ...]:
    """Arguments -> options. Raises SpecError for one that is not in the table or lacks its value."""
    options: list[actions.Option] = []
    rest = iter(args)
    for arg in rest:
        if not arg.startswith("-"):
            options.append(actions.Option("", arg))
            continue
        name = arg[2:] if arg.startswith("--") else arg[1:]
        rule = RULES.get(name)
        if rule is None or not name:
            raise actions.refused(f"the option {arg!r} is not known to vmferry, so it may be part of the hardware")
        value = next(rest, None) if rule.takes_value else None
        if rule.takes_value and value is None:
            raise actions.refused(f"the option {arg!r} lacks its value")
        options.append(actions.Option(name, value))
    return tuple(options)


def _monitor_chardevs(options: Sequence[actions.Option]) -> frozenset[str]:
    """The ids of chardevs that only monitors use."""
    monitors: set[str] = set()
    others: set[str] = set()
    for option in options:
        value = option.value or ""
        if option.name == "mon" and not qemuopts.is_json(value):
            monitors.add(qemuopts.get(qemuopts.parse(value, implied="chardev"), "chardev") or "")
        elif option.name in ("qmp", "qmp-pretty", "monitor"):
            monitors.add(value.removeprefix("chardev:"))
        elif option.name != "chardev":
            others.update(re.findall(r'chardev"?[:=]\s*"?([^,"]+)', value))
    return frozenset(monitors - others)


def _flags(action: actions.Action, *names: str) -> dict[str, _Rule]:
    return {name: _Rule(False, action) for name in names}


def _values(action: actions.Action, *names: str) -> dict[str, _Rule]:
    return {name: _Rule(True, action) for name in names}


_TEMPORARY = "keeps the guest's writes in a temporary file of this QEMU, and they would be left behind"
_XEN = "is for Xen guests, which vmferry does not know"
_UNREADABLE = "takes hardware from somewhere else than the command line"

# What becomes of each option of QEMU 6 to 11.
RULES: dict[str, _Rule] = {
    "": _Rule(True, actions.image),
    **_flags(
        actions.keep,
        "nodefaults", "no-user-config", "nographic", "enable-kvm", "no-reboot", "no-shutdown", "usb",
        "no-acpi", "no-hpet", "no-fd-bootchk", "win2k-hack", "rtc-td-hack", "only-migratable", "mem-prealloc",
        "singlestep", "one-insn-per-tb", "semihosting", "async-teardown", "enable-fips",
        "enable-sync-profile", "old-param", "nouserconfig",
    ),
    **_values(
        actions.keep,
        "cpu", "accel", "smp", "numa", "m", "global", "boot", "k", "name", "uuid", "vga", "rtc", "msg",
        "action", "watchdog", "watchdog-action", "overcommit", "sandbox", "compat", "append", "seed", "echr",
        "usbdevice", "iscsi", "d", "dfilter", "prom-env", "semihosting-config", "g", "tb-size",
    ),
    **_values(actions.machine, "machine", "M"),
    **_values(actions.path, "kernel", "initrd", "dtb", "mtdblock", "sd", "mem-path"),
    **_values(actions.image, "hda", "hdb", "hdc", "hdd", "fda", "fdb", "cdrom", "pflash"),
    **_values(actions.data_file, "bios", "option-rom"),
    **_values(actions.keyed(paths=("file", "path")), "smbios"),
    **_values(actions.acpitable, "acpitable"),
    **_values(actions.keyed(implied="name", paths=("file",)), "fw_cfg"),
    **_values(
        actions.keyed(implied="fsdriver", paths=("path", "socket"), descriptors=("sock_fd",)),
        "fsdev", "virtfs",
    ),
    **_values(actions.keyed(implied="type", paths=("path", "cancel-path")), "tpmdev"),
    **_values(actions.drive, "drive"),
    **_values(actions.blockdev, "blockdev"),
    **_values(actions.object, "object"),
    **_values(actions.network, "netdev", "nic", "net"),
    **_values(actions.device, "device"),
    **_values(actions.chardev, "chardev"),
    **_values(actions.character_device, "serial", "parallel", "debugcon"),
    **_values(actions.display, "display"),
    **_values(actions.vnc, "vnc"),
    **_values(actions.spice, "spice"),
    **_values(actions.audio, "audiodev", "audio"),
    **_values(actions.set, "set"),
    **_values(actions.icount, "icount"),
    **_values(actions.local_path, "D"),
    **_values(actions.drop, "mon", "monitor", "qmp", "qmp-pretty", "pidfile", "incoming", "rotate"),
    **_flags(actions.drop, "S", "daemonize", "full-screen", "portrait", "alt-grab", "ctrl-grab", "no-quit"),
    **_flags(actions.drop_with("the destination has no screen"), "sdl", "curses"),
    **_values(actions.drop_with("a debugger's port belongs to this host"), "gdb"),
    **_flags(actions.drop_with("a debugger's port belongs to this host"), "s"),
    **_values(actions.drop_with("it only watches this QEMU"), "trace", "plugin", "dump-vmstate", "qtest-log"),
    **_flags(actions.drop_with("it only watches this QEMU"), "perfmap", "jitdump"),
    **_values(actions.drop_with("the destination's QEMU has firmware of its own"), "L"),
    **_values(actions.drop_with("the state comes from the migration"), "loadvm"),
    **_values(actions.keep_with("it must make sense on the destination too"), "runas", "chroot", "run-with"),
    **_flags(actions.refuse(_TEMPORARY), "snapshot"),
    **_values(actions.refuse(_UNREADABLE), "readconfig", "writeconfig"),
    **_flags(actions.refuse(_UNREADABLE), "preconfig"),
    **_values(actions.refuse("names a descriptor that only the running QEMU has"), "add-fd"),
    **_values(actions.refuse("is for QEMU's own tests"), "qtest"),
    **_values(actions.refuse(_XEN), "xen-domid"),
    **_flags(actions.refuse(_XEN), "xen-attach", "xen-domid-restrict"),
}  # fmt: skip
