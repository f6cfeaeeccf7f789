"""What a client that was written for QEMU wants of the next migration. Pure.

Theory of operation
-------------------
QEMU's migration is set up by several commands, and then told where to go; vmferry's is one command with everything in
it. So what is set beforehand is remembered (`Setup`) and becomes the `Wish` of the next `migrate`.

Rule 1: what is remembered is checked when it is said: a client hears of a mistake where QEMU would have told it.
Rule 2: a client gets what it would get of QEMU where it says nothing: a precopy, and a postcopy only when it asks for
        the switch itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from vmferry.core.option_table import OPTIONS, Kind, Policy
from vmferry.core.options import Mode, check_value, find_option, policy_objection
from vmferry.errors import UsageError

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
