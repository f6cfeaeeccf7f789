"""What to set before a migration, what may change during one, and why not: decisions over the option table.

Theory of operation
-------------------
`parse_setting` reads what a person wrote. `build` turns a mode and the person's settings into the complete
set of values for both QEMUs: it names *every* option that the QEMU knows, so that a QEMU with a past has a
known state. `AttemptOptions.commands` gives the QMP commands in an order that QEMU accepts from any earlier
state; `differences` compares what QEMU reads back. From then on `refusal` keeps the set frozen until the
attempt is over.

Rule 1: QEMU itself accepts nearly every change at any time; only `refusal` protects a running migration.
Rule 2: `OPEN` lists the statuses that allow a change. Every other status, also one invented tomorrow, locks.
Rule 3: all objections are given at once; a `Refused` is a value, so nobody can overlook it by not catching.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, cast

from vmferry.core.migration_status import MigrationStatus
from vmferry.core.option_table import (
    BOTH,
    CAPABILITIES,
    DESTINATION,
    OPTIONS,
    PARAMETERS,
    SOURCE,
    UNSET,
    Kind,
    Option,
    Policy,
    Role,
    Value,
    ValueType,
    Window,
)
from vmferry.errors import UsageError
from vmferry.units import format_size, parse_size_bytes, parse_time_ms

__all__ = [
    "BOTH", "CAPABILITIES", "DESTINATION", "ENDING", "OPEN", "OPTIONS", "OVER", "PARAMETERS", "SOURCE",
    "UNSET", "AttemptOptions", "Config", "Kind", "Mode", "Option", "Policy", "Refused", "Role", "Skipped",
    "TlsChoice", "Value", "ValueType", "Window", "build", "check_value", "differences", "docs_markdown", "find_option",
    "format_value", "help_lines", "parse_setting", "parse_value", "policy_objection", "refusal",
]  # fmt: skip

_S = MigrationStatus
OVER: Final[frozenset[str]] = frozenset({_S.NONE, _S.COMPLETED, _S.FAILED, _S.CANCELLED})
"""Statuses in which options are free, provided that the attempt (if any) is cleaned up."""
ENDING: Final[frozenset[str]] = frozenset({_S.FAILING, _S.CANCELLING})
"""Statuses of the cleanup: not even the allow-list is open, as it may need a healthy migration."""
OPEN: Final[Mapping[Window, frozenset[str]]] = MappingProxyType(
    {
        Window.LOCKED: frozenset(),
        Window.ACTIVE: frozenset({_S.ACTIVE}),
        Window.ACTIVE_AND_POSTCOPY: frozenset({_S.ACTIVE, _S.POSTCOPY_ACTIVE}),
        Window.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_PAUSED}),
    }
)


class Mode(StrEnum):
    """How memory moves: all before the VM does, or some after it."""

    PRECOPY = "precopy"
    POSTCOPY = "postcopy"


# --- what a person wrote -----------------------------------------------------------------------------

_BOOLS: Final = {"on": True, "true": True, "yes": True, "1": True,
                 "off": False, "false": False, "no": False, "0": False}  # fmt: skip
_PER_SECOND = re.compile(r"(/s|ps)$", re.IGNORECASE)
_BITS = re.compile(r"bit(/s|ps)?$|[kmgt]bps$|\dbps$", re.IGNORECASE)


def find_option(name: str) -> Option:
    """The row of an option by QEMU's spelling. Raises UsageError that names the nearest spelling."""
    option = OPTIONS.get(name)
    if option is not None:
        return option
    near = difflib.get_close_matches(name.lower().replace("_", "-"), OPTIONS, n=1, cutoff=0.6)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"there is no migration option {name!r}{guess}", hint="'vmferry options' lists all of them")


def parse_setting(text: str) -> tuple[Option, Value]:
    """'downtime-limit=200ms' -> its row and 200. Rates are bytes per second, times ms, sizes bytes.

    Raises UsageError for a missing '=', an unknown name, or a value that is malformed or out of range.
    Whether vmferry permits the option at all is said by `policy_objection` and `build`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is not a setting; write NAME=VALUE, for example downtime-limit=200ms")
    option = find_option(name.strip())
    return option, parse_value(option, value.strip())


def parse_value(option: Option, text: str) -> Value:
    """The value in QEMU's unit. Raises UsageError with what is allowed."""
    try:
        value = _read(option, text)
    except ValueError as error:
        raise UsageError(
            f"{option.name}={text} is not possible: {error}", hint=f"allowed: {option.allowed()}"
        ) from error
    _check_range(option, value)
    return value


_TYPES: Final[dict[ValueType, type]] = {
    ValueType.BOOL: bool,
    ValueType.ENUM: str,
    ValueType.STR: str,
    ValueType.LIST: list,
}
"""What a value is in JSON; all others are numbers."""


def check_value(option: Option, given: Any) -> Value:
    """A value in QEMU's own type and unit, as it is. Raises UsageError with what is allowed."""
    kind = _TYPES.get(option.type, int)
    if type(given) is not kind or (option.words and given not in option.words):
        raise UsageError(f"{option.name} cannot be {given!r}", hint=f"allowed: {option.allowed()}, as {kind.__name__}")
    value = cast(Value, given)
    _check_range(option, value)
    return value


def _check_range(option: Option, value: Value) -> None:
    if option.low is not None and option.high is not None:
        assert isinstance(value, int), "only numbers have a range"
        if not option.low <= value <= option.high:
            raise UsageError(f"{option.name}={value} is out of range; allowed: {option.allowed()}")
    if option.power_of_two and isinstance(value, int) and value & (value - 1):
        raise UsageError(f"{option.name}={value} is not a power of two")


def _read(option: Option, text: str) -> Value:
    match option.type:
        case ValueType.BOOL:
            if text.lower() not in _BOOLS:
                raise ValueError("it is a switch; write on or off")
            return _BOOLS[text.lower()]
        case ValueType.RATE:
            if _BITS.search(text):
                raise ValueError("rates are in bytes per second here, not bits; 10 Gbit/s is about 1.1G")
            return parse_size_bytes(_PER_SECOND.sub("", text))
        case ValueType.SIZE:
            return parse_size_bytes(text)
        case ValueType.TIME:
            return parse_time_ms(text)
        case ValueType.ENUM:
            if text not in option.words:
                raise ValueError(f"it takes one of {', '.join(option.words)}")
            return text
        case ValueType.STR:
            return text
        case ValueType.LIST:
            raise ValueError("it is a list, which cannot be given here")
        case _:
            number = text.removesuffix("%") if option.type is ValueType.PERCENT else text
            if not (number.isascii() and number.isdigit()):
                raise ValueError("it takes a whole number")
            return int(number)


def format_value(option: Option, value: Value) -> str:
    """A value as people read it: 'on', '200 ms', '1.5 GiB/s'."""
    match option.type, value:
        case ValueType.BOOL, bool():
            return "on" if value else "off"
        case ValueType.TIME, int():
            return f"{value} ms"
        case ValueType.RATE, int():
            return f"{format_size(value)}/s"
        case ValueType.SIZE, int():
            return format_size(value)
        case ValueType.PERCENT, int():
            return f"{value} %"
        case _:
            return str(value) if value != "" else "(empty)"


# --- when it may change ------------------------------------------------------------------------------


def refusal(
    option: Option,
    status: MigrationStatus,
    *,
    role: Role,
    cleanup_done: bool,
    attempt: int,
    has_attempt: bool,
    waits_for_disks: bool = False,
) -> str | None:
    """None = the option may change now; else one sentence that names the window which locks it.

    `has_attempt`: an attempt was prepared here (destination) or started (source) and is not forgotten;
    `cleanup_done`: its cleanup fact is there; `attempt`: its number, for the sentence. `waits_for_disks`: all is set up
    and no byte of memory has gone, since the disks are copied before: what changes with the memory is not in use yet.
    """
    over = status in OVER
    again = "it may change again when this migration is over"
    if over and (cleanup_done or not has_attempt):
        return None
    if not has_attempt:
        return f"{option.name} is locked: a migration that vmferry did not start is at work here ({status})"
    if status in ENDING or (over and status != _S.NONE):
        return f"attempt {attempt} is cleaning up ({status}); no option may change until it is over"
    if role in option.roles and (
        status in OPEN[option.window] or (waits_for_disks and _S.ACTIVE in OPEN[option.window])
    ):
        return None
    if status == _S.NONE or (role is Role.DESTINATION and option.window is not Window.POSTCOPY_PAUSED):
        return f"{option.name} is fixed on the {role} since attempt {attempt} was prepared; {again}"
    if option.window is Window.LOCKED:
        return f"{option.name} is in use since {option.first_use}; {again}"
    return f"{option.name} may change only {option.window}; now the migration is in {status}"


def policy_objection(option: Option, value: Value) -> str | None:
    """None = vmferry permits this value; else why not.

    What is forced or forbidden may be repeated by hand ('events=on', 'release-ram=off'); what follows from
    another choice may not be set at all, so that the two can never disagree.
    """
    if option.policy is Policy.FREE:
        return None
    if option.policy is not Policy.MANAGED and type(option.default) is type(value) and option.default == value:
        return None
    verb = {
        Policy.FORCED_ON: "stays on",
        Policy.FORBIDDEN: "is refused",
        Policy.MANAGED: "is not set by hand",
    }
    return f"{option.name} {verb[option.policy]}: {option.reason}"


# --- the set for one attempt -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TlsChoice:
    """Ids of the TLS objects on each side. `hostname` = the name that the certificate must carry, or ''."""

    source_creds: str
    destination_creds: str
    hostname: str = ""
    authz: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """An option that the QEMU knows and that is left as it is."""

    name: str
    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The settings cannot be used; every reason, each one sentence."""

    objections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """What was chosen for one attempt, before it is spread over the two QEMUs. Part of the journal."""

    mode: Mode
    settings: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))
    tls: TlsChoice | None = None
    multifd_channels: int = 0

    def chosen(self, role: Role) -> dict[str, Value]:
        """Every option that this configuration gives a value other than its default, for one side."""
        values: dict[str, Value] = {"postcopy-ram": self.mode is Mode.POSTCOPY}
        if self.multifd_channels:
            values |= {"multifd": True, "multifd-channels": self.multifd_channels}
        if self.tls is not None:
            creds = self.tls.source_creds if role is Role.SOURCE else self.tls.destination_creds
            values |= {"tls-creds": creds, "tls-hostname": self.tls.hostname if role is Role.SOURCE else ""}
            if self.tls.authz is not None and role is Role.DESTINATION:
                values["tls-authz"] = self.tls.authz
        values |= {name: True for name, o in OPTIONS.items() if o.policy is Policy.FORCED_ON and role in o.roles}
        values |= {name: value for name, value in self.settings.items() if role in OPTIONS[name].roles}
        return values


@dataclass(frozen=True, slots=True)
class AttemptOptions:
    """Every value that both QEMUs get, and what stays as it is. Values are QEMU's own types and units."""

    source_capabilities: Mapping[str, bool]
    source_parameters: Mapping[str, Any]
    destination_capabilities: Mapping[str, bool]
    destination_parameters: Mapping[str, Any]
    expected_unsent: Mapping[Role, Mapping[str, Any]]
    skipped: tuple[Skipped, ...]

    def capabilities(self, role: Role) -> Mapping[str, bool]:
        """The capabilities of one side."""
        return self.source_capabilities if role is Role.SOURCE else self.destination_capabilities

    def parameters(self, role: Role) -> Mapping[str, Any]:
        """The parameters of one side."""
        return self.source_parameters if role is Role.SOURCE else self.destination_parameters

    def expected(self, role: Role) -> dict[str, Any]:
        """What must be read back: everything sent, and what cannot be sent but must have its default."""
        return {**self.capabilities(role), **self.parameters(role), **self.expected_unsent[role]}

    def commands(self, role: Role) -> tuple[tuple[str, dict[str, Any]], ...]:
        """The QMP commands in order. zero-copy-send goes last: QEMU checks it against the parameters."""
        capabilities = dict(self.capabilities(role))
        late = {name: True for name in ("zero-copy-send",) if capabilities.get(name)}
        first = capabilities | dict.fromkeys(late, False)
        steps = [_set_capabilities(first), ("migrate-set-parameters", dict(self.parameters(role)))]
        return tuple(steps + ([_set_capabilities(late)] if late else []))


def _set_capabilities(states: Mapping[str, bool]) -> tuple[str, dict[str, Any]]:
    pairs = [{"capability": name, "state": state} for name, state in states.items()]
    return "migrate-set-capabilities", {"capabilities": pairs}


@dataclass(frozen=True, slots=True)
class _Clash:
    """Refused when all of `these` are on and (if given) `needs` is off."""

    these: frozenset[str]
    needs: str
    why: str


_CLASHES: Final = (
    _Clash(frozenset({"postcopy-preempt"}), "postcopy-ram", "postcopy-preempt works only with --mode postcopy"),
    _Clash(frozenset({"multifd-compression"}), "multifd", "multifd-compression works only with --multifd"),
    _Clash(frozenset({"zero-copy-send"}), "multifd", "zero-copy-send works only with --multifd"),
    _Clash(frozenset({"zero-copy-send", "multifd-compression"}), "", "zero-copy-send cannot compress"),
    _Clash(frozenset({"zero-copy-send", "tls-creds"}), "", "zero-copy-send cannot encrypt"),
    _Clash(frozenset({"zero-copy-send", "xbzrle"}), "", "zero-copy-send cannot send differences (xbzrle)"),
    _Clash(frozenset({"multifd", "xbzrle"}), "", "multifd cannot send differences (xbzrle)"),
    _Clash(frozenset({"dirty-limit", "auto-converge"}), "", "dirty-limit and auto-converge exclude each other"),
)


def with_switchover_ack(
    settings: Mapping[str, Value], *, has_vfio: bool | None, known: Iterable[frozenset[str]]
) -> dict[str, Value]:
    """The settings, and that a passed-through device (VFIO) is asked before the switchover: how long its state takes
    is known to it alone. Not where a QEMU (before 8.1) cannot ask, nor where the person chose.

    Args:
        known: the names of options of each QEMU.
    """
    asks = has_vfio is True and all("switchover-ack" in names for names in known)
    return {"switchover-ack": True, **settings} if asks else dict(settings)


def build(
    mode: Mode,
    settings: Mapping[str, Value],
    *,
    source_known: frozenset[str],
    destination_known: frozenset[str],
    tls: TlsChoice | None = None,
    multifd_channels: int = 0,
) -> AttemptOptions | Refused:
    """The complete options of both QEMUs for one attempt, or every reason against them.

    Args:
        settings: what the person chose, by QEMU's names, values in QEMU's units (from `parse_setting`).
        source_known, destination_known: names that each QEMU reports, capabilities and parameters together.
        multifd_channels: 0 = one channel for everything, else the number of extra ones (1 to 255).
    """
    unknown = [f"there is no migration option {name!r}" for name in settings if name not in OPTIONS]
    if unknown:
        return Refused(tuple(unknown))
    config = Config(mode, settings, tls, multifd_channels)
    known = {Role.SOURCE: source_known, Role.DESTINATION: destination_known}
    chosen = {role: config.chosen(role) for role in Role}
    objections = tuple(_objections(config, chosen, known))
    if objections:
        return Refused(objections)
    skipped: list[Skipped] = []
    values = {role: _spread(role, chosen[role], known[role], skipped) for role in Role}
    expected = {role: _expected_unsent(values[role], known[role]) for role in Role}
    return AttemptOptions(
        source_capabilities=_of_kind(Kind.CAPABILITY, values[Role.SOURCE]),
        source_parameters=_of_kind(Kind.PARAMETER, values[Role.SOURCE]),
        destination_capabilities=_of_kind(Kind.CAPABILITY, values[Role.DESTINATION]),
        destination_parameters=_of_kind(Kind.PARAMETER, values[Role.DESTINATION]),
        expected_unsent=expected,
        skipped=tuple(skipped),
    )


def _objections(
    config: Config, chosen: Mapping[Role, Mapping[str, Value]], known: Mapping[Role, frozenset[str]]
) -> Iterator[str]:
    channels = OPTIONS["multifd-channels"]
    assert channels.high is not None, "the number of channels has a limit"
    if not 0 <= config.multifd_channels <= channels.high:
        yield f"{config.multifd_channels} multifd channels are not possible; allowed: 0 to {channels.high}"
    for name, value in config.settings.items():
        objection = policy_objection(OPTIONS[name], value)
        if objection:
            yield objection
    for role, values in chosen.items():
        for name, value in values.items():
            wanted = name in config.settings or value != OPTIONS[name].qemu_default
            if wanted and name not in known[role]:
                yield f"the {role}'s QEMU does not know {name}"
    on = {name for values in chosen.values() for name, value in values.items() if value not in (False, "", "none")}
    if _number("max-cpu-throttle", config) < _number("cpu-throttle-initial", config):
        yield "max-cpu-throttle is less than cpu-throttle-initial"
    yield from (c.why for c in _CLASHES if c.these <= on and not (c.needs and c.needs in on))


def _number(name: str, config: Config) -> int:
    value = config.settings.get(name, OPTIONS[name].default)
    assert isinstance(value, int), f"{name} is a number"
    return value


def _spread(role: Role, chosen: Mapping[str, Value], known: frozenset[str], skipped: list[Skipped]) -> dict[str, Value]:
    """A value for all this QEMU knows: the chosen one, else the default; the rest goes to `skipped`."""
    values: dict[str, Value] = {}
    for name in sorted(known):
        option = OPTIONS.get(name)
        if option is None:
            skipped.append(Skipped(name, role, "this vmferry does not know it; it stays as QEMU has it"))
        elif name in chosen:
            values[name] = chosen[name]
        elif option.policy is Policy.FORCED_ON:
            values[name] = False  # forced on for the other role only
        elif option.default is UNSET:
            skipped.append(Skipped(name, role, "it cannot be set back; it stays as QEMU has it"))
        else:
            values[name] = option.default
    return values


def _expected_unsent(values: Mapping[str, Value], known: frozenset[str]) -> dict[str, Value]:
    """What is not sent although its default is known: it must still read as that default."""
    unsent = (OPTIONS[name] for name in sorted(known) if name in OPTIONS and name not in values)
    return {o.name: o.qemu_default for o in unsent if o.qemu_default is not UNSET}


def _of_kind(kind: Kind, values: Mapping[str, Value]) -> Mapping[str, Any]:
    return MappingProxyType({name: value for name, value in values.items() if OPTIONS[name].kind is kind})


def differences(wanted: Mapping[str, Any], read_back: Mapping[str, Any]) -> tuple[str, ...]:
    """What QEMU reads back against what was set; empty = equal. A bool is never equal to a number here."""
    missing = object()
    found = []
    for name, value in wanted.items():
        got = read_back.get(name, missing)
        if got is missing:
            found.append(f"{name}: wanted {value!r}, QEMU does not report it")
        elif type(got) is not type(value) or got != value:
            found.append(f"{name}: wanted {value!r}, QEMU says {got!r}")
    return tuple(found)


def help_lines() -> tuple[str, ...]:
    """One line per option that a person may set, for 'vmferry options'."""
    return tuple(f"{o.name:28} {o.allowed():32} {o.what}" for o in OPTIONS.values() if o.policy is Policy.FREE)


_DOCS_HEAD: Final = """\
# Migration options

<!-- made by tools/gen_docs.py from src/vmferry/core/option_table.py; do not edit -->

Give an option with `--set NAME=VALUE`. Names are QEMU's. Rates are bytes per second, times milliseconds,
sizes bytes; `200ms`, `1.5s`, `64M` and `2G/s` are understood. vmferry sets *every* option that a QEMU knows
before each attempt, so what an earlier migration left behind has no effect.

Policies: **free** = yours to set; **managed** = follows from another choice; **forced on** and **forbidden**
= the same for every migration, with the reason.

Windows: when an option may change while a migration runs. Whatever is not listed as open is locked, and
nothing at all may change while an attempt fails, is cancelled or is cleaned up.
"""


def docs_markdown() -> str:
    """docs/options.md."""
    parts = [_DOCS_HEAD]
    for title, rows in (("Parameters", PARAMETERS), ("Capabilities", CAPABILITIES)):
        parts.append(
            f"## {title}\n\n| option | meaning | allowed | vmferry sets (QEMU's default) | side | window "
            "| policy | in use since | known to QEMU |\n|---|---|---|---|---|---|---|---|---|\n"
            + "\n".join(_docs_row(option) for option in rows)
            + "\n"
        )
    opened = [o for o in OPTIONS.values() if o.window is not Window.LOCKED]
    parts.append(
        "## What may change while a migration runs\n\n| option | when | why that is safe | useful then |\n"
        "|---|---|---|---|\n"
        + "\n".join(f"| `{o.name}` | {o.window} | {o.safe_because} | {o.meaningful_later} |" for o in opened)
        + "\n"
    )
    parts.append("## What excludes what\n\n" + "\n".join(f"- {clash.why}" for clash in _CLASHES) + "\n")
    return "\n".join(parts)


def _docs_row(o: Option) -> str:
    ours, theirs = ("–" if v is UNSET else format_value(o, v) for v in (o.default, o.qemu_default))
    value = ours if ours == theirs else f"{ours} ({theirs})"
    known = f"{o.since[0]}.{o.since[1]} on"
    if o.gone_in is not None:
        known = f"{o.since[0]}.{o.since[1]} to before {o.gone_in[0]}.{o.gone_in[1]}"
    policy = str(o.policy) + (f": {o.reason}" if o.reason else "")
    side = " and ".join(sorted(o.roles, reverse=True))
    cells = (f"`{o.name}`", o.what, o.allowed(), value, side, str(o.window), policy, o.first_use, known)
    return "| " + " | ".join(cells) + " |"
