"""What a VM's monitor does with each command of a client that was written for QEMU. Pure.

Theory of operation
-------------------
A client of the monitor socket believes that it talks to the VM's QEMU, and mostly it does. What would move the guest is
answered by vmferry instead (`Fate.OURS`), and what would start, stop or end the guest behind the back of a migration
that is on its way is refused for so long (`Fate.HELD`). Everything else goes to QEMU, and its answer comes back as it
is.

QEMU's migration is set up by several commands, and then told where to go; vmferry's is one command with everything in
it. So what is set beforehand is remembered (`Setup`) and becomes the `Wish` of the next `migrate`.

Rule 1: what is remembered is checked when it is said: a client hears of a mistake where QEMU would have told it.
Rule 2: a client gets what it would get of QEMU where it says nothing: a precopy, and a postcopy only when it asks for
        the switch itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from vmferry.core.option_table import OPTIONS, Kind, Policy
from vmferry.core.options import Mode, check_value, find_option, policy_objection
from vmferry.errors import UsageError


class Fate(StrEnum):
    """What becomes of a command."""

    PASSED = "passed"
    OURS = "ours"
    HELD = "held"
    """Passed on, but not while the guest is on its way."""
    NEVER = "never"


OURS: Final[frozenset[str]] = frozenset(
    {
        "migrate", "migrate-incoming", "migrate_cancel", "migrate-pause", "migrate-recover", "migrate-continue",
        "migrate-start-postcopy", "migrate-set-parameters", "migrate-set-capabilities", "query-migrate",
        "query-migrate-parameters", "query-migrate-capabilities", "query-jobs",
        "job-cancel", "job-pause", "job-resume", "job-complete", "job-finalize", "job-dismiss", "job-change",
    }
)  # fmt: skip
HELD: Final[frozenset[str]] = frozenset(
    {
        "cont", "stop", "quit", "blockdev-set-active", "snapshot-load",
        "block-job-cancel", "block-job-complete", "blockdev-del", "block-export-del", "nbd-server-stop",
    }
)  # fmt: skip
"""They decide whether the guest runs here, or take its mirrors away: that is the migration's until it is over."""
NEVER: Final[Mapping[str, str]] = MappingProxyType(
    {
        "getfd": "a file descriptor cannot be passed on to QEMU here",
        "add-fd": "a file descriptor cannot be passed on to QEMU here",
    }
)
_HMP_HELD: Final = frozenset({"c", "cont", "s", "stop", "q", "quit", "loadvm"})


def fate(name: str, arguments: Mapping[str, Any]) -> tuple[Fate, str]:
    """What becomes of this command, and for one that is never passed on the reason."""
    if name in OURS:
        return Fate.OURS, ""
    if name in NEVER:
        return Fate.NEVER, NEVER[name]
    if name == "human-monitor-command":
        return _of_line(str(arguments.get("command-line", "")))
    return (Fate.HELD if name in HELD else Fate.PASSED), ""


def _of_line(line: str) -> tuple[Fate, str]:
    """A line for people: it must not be a way around."""
    word = (line.split() or [""])[0]
    if word.startswith("migrate"):
        return Fate.NEVER, f"use the command {word.replace('_', '-')} itself: vmferry moves this guest"
    return (Fate.HELD if word in _HMP_HELD else Fate.PASSED), ""


# --- where to -------------------------------------------------------------------------------------------------


def destination_of(arguments: Mapping[str, Any], hosts: Mapping[str, tuple[str, ...]]) -> str:
    """The host that `migrate` means: its `uri`, or its one main channel, names a known host or an address of one.

    Args:
        hosts: the addresses (without ports) of each known host's agent.

    Raises UsageError, naming what is possible.
    """
    place = _address(arguments)
    if place in hosts:
        return place
    for name, addresses in hosts.items():
        if place in addresses:
            return name
    known = ", ".join(sorted(hosts)) or "none"
    raise UsageError(
        f"{place or 'this'} is not a known host (known: {known})",
        hint="write uri=vmferry:HOST, or the address of a known host's agent, as in tcp:HOST:PORT",
    )


def _address(arguments: Mapping[str, Any]) -> str:
    uri = arguments.get("uri")
    if isinstance(uri, str):
        scheme, _, rest = uri.partition(":")
        if scheme not in ("tcp", "vmferry") or not rest:
            raise UsageError(
                f"{uri!r} leads to no host that vmferry could move the guest to",
                hint="write uri=vmferry:HOST, or tcp:HOST:PORT with a known host",
            )
        return rest if scheme == "vmferry" else _without_port(rest)
    channels = arguments.get("channels")
    if isinstance(channels, list) and len(channels) == 1 and isinstance(channels[0], dict):
        address = channels[0].get("addr", {})
        if isinstance(address, dict) and address.get("transport") == "socket" and address.get("type") == "inet":
            return str(address.get("host", ""))
    raise UsageError("migrate needs a uri, or one main channel over a socket of the type inet")


def _without_port(text: str) -> str:
    host = text.rpartition(":")[0] or text
    return host.removeprefix("[").removesuffix("]")


# --- how ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants of the next migration, in the words of `vm-migrate`."""

    mode: Mode
    multifd_channels: int = 0
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Options by QEMU's names, with QEMU's own types."""
    waits: bool = False
    """It wants to be asked before the switchover."""


_MULTIFD_CHANNELS: Final = "multifd-channels"
_BY_THEIR_OWN: Final = frozenset({"postcopy-ram", "multifd", _MULTIFD_CHANNELS, "pause-before-switchover"})
"""Options that are arguments of `vm-migrate`."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What clients have set for the next migration, by QEMU's names, in QEMU's units."""

    values: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def with_capabilities(self, arguments: Mapping[str, Any]) -> Setup:
        """After `migrate-set-capabilities`. Raises UsageError; nothing of the command counts then."""
        pairs = arguments.get("capabilities")
        if not isinstance(pairs, list):
            raise UsageError("migrate-set-capabilities needs 'capabilities', an array")
        values: dict[str, Any] = {}
        for pair in pairs:
            if not isinstance(pair, dict) or not isinstance(pair.get("state"), bool):
                raise UsageError("each capability needs its name ('capability') and a 'state' of true or false")
            values[str(pair.get("capability"))] = pair["state"]
        return self._changed(values, Kind.CAPABILITY)

    def with_parameters(self, arguments: Mapping[str, Any]) -> Setup:
        """After `migrate-set-parameters`. Raises UsageError; nothing of the command counts then."""
        return self._changed(arguments, Kind.PARAMETER)

    def _changed(self, values: Mapping[str, Any], kind: Kind) -> Setup:
        for name, value in values.items():
            check(name, value, kind)
        return Setup(MappingProxyType({**self.values, **values}))

    def shown(self, kind: Kind) -> dict[str, Any]:
        """What of it a query of that kind shows."""
        return {name: value for name, value in self.values.items() if OPTIONS[name].kind is kind}

    def wish(self) -> Wish:
        """What the next migration shall be."""
        values = self.values
        channels = int(values.get(_MULTIFD_CHANNELS, OPTIONS[_MULTIFD_CHANNELS].qemu_default))
        return Wish(
            mode=Mode.POSTCOPY if values.get("postcopy-ram") else Mode.PRECOPY,
            multifd_channels=channels if values.get("multifd") else 0,
            config=MappingProxyType({name: value for name, value in values.items() if _is_free(name)}),
            waits=bool(values.get("pause-before-switchover")),
        )


def _is_free(name: str) -> bool:
    return name not in _BY_THEIR_OWN and OPTIONS[name].policy is Policy.FREE


def check(name: str, value: Any, kind: Kind) -> None:
    """Raises UsageError unless the next migration may have this value."""
    option = find_option(name)
    if option.kind is not kind:
        raise UsageError(f"{name} is a {option.kind}, not a {kind}")
    checked = check_value(option, value)
    if name in _BY_THEIR_OWN or checked == "":
        return  # an empty text takes back what was set before
    objection = policy_objection(option, checked)
    if objection is not None:
        raise UsageError(objection)
