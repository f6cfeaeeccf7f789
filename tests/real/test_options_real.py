"""The option table against real QEMUs: it knows all they know, and what it builds is accepted and sticks.

A plain socket client on purpose: this test judges the table, not vmferry's own QMP.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmferry.core.migration_status import MigrationStatus
from vmferry.core.options import (
    OPTIONS,
    UNSET,
    AttemptOptions,
    Kind,
    Mode,
    Policy,
    Role,
    TlsChoice,
    Value,
    ValueType,
    build,
    differences,
)
from vmferry.testing.qemus import available

pytestmark = pytest.mark.real

QEMUS = {version: str(path) for version, path in available().items()}
every_qemu = pytest.mark.parametrize("version", sorted(QEMUS))
START_S = 30.0


class Qmp:
    """The least client that asks one QEMU one thing after another."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rwb")
        assert b"QMP" in self._file.readline()
        self.ask("qmp_capabilities")

    def reply(self, command: str, **arguments: Any) -> dict[str, Any]:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while True:
            answer: dict[str, Any] = json.loads(self._file.readline())
            if "event" not in answer:
                return answer

    def ask(self, command: str, **arguments: Any) -> Any:
        answer = self.reply(command, **arguments)
        assert "return" in answer, (command, arguments, answer)
        return answer["return"]

    def read_back(self) -> dict[str, Any]:
        states = {c["capability"]: c["state"] for c in self.ask("query-migrate-capabilities")}
        return {**states, **self.ask("query-migrate-parameters")}

    def apply(self, both: AttemptOptions, role: Role) -> None:
        for command, arguments in both.commands(role):
            self.ask(command, **arguments)


Start = Callable[..., Qmp]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(version, *more arguments) -> a client of a new, stopped QEMU; all are ended afterwards."""
    with contextlib.ExitStack() as stack:

        def run(version: str, *more: str) -> Qmp:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            ours.settimeout(START_S)
            line = [QEMUS[version], "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32M", "-S"]
            line += ["-chardev", f"socket,id=q,fd={theirs.fileno()}", "-mon", "chardev=q,mode=control", *more]
            process = subprocess.Popen(line, pass_fds=[theirs.fileno()])
            stack.callback(process.wait)
            stack.callback(process.kill)
            theirs.close()
            return Qmp(ours)

        yield run


def enum_words(schema: list[dict[str, Any]], wanted: set[str]) -> set[str]:
    """The values of the schema's enum that contains all `wanted`."""
    for entry in schema:
        values = {m["name"] for m in entry.get("members", ()) if "name" in m} if entry["meta-type"] == "enum" else set()
        if wanted <= values:
            return values
    raise AssertionError(f"no enum has {wanted}")


def major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@every_qemu
def test_the_table_and_the_qemu_know_the_same_options(start: Start, version: str) -> None:
    qmp = start(version)
    schema = {entry["name"]: entry for entry in qmp.ask("query-qmp-schema")}
    members = schema[schema["migrate-set-parameters"]["arg-type"]]["members"]
    parameters = {member["name"] for member in members}
    capabilities = {c["capability"] for c in qmp.ask("query-migrate-capabilities")}
    assert set(qmp.ask("query-migrate-parameters")) <= parameters
    at = major_minor(version)
    for kind, known in ((Kind.CAPABILITY, capabilities), (Kind.PARAMETER, parameters)):
        table = {
            name for name, o in OPTIONS.items()
            if o.kind is kind and o.since <= at and (o.gone_in is None or at < o.gone_in)
        }  # fmt: skip
        assert known == table


@every_qemu
def test_defaults_and_words_are_those_of_the_table(start: Start, version: str) -> None:
    qmp = start(version)
    schema = {entry["name"]: entry for entry in qmp.ask("query-qmp-schema")}
    fresh = qmp.read_back()
    for name, value in fresh.items():
        default = OPTIONS[name].qemu_default
        assert (default, type(default)) == (value, type(value)), name
    members = schema[schema["migrate-set-parameters"]["arg-type"]]["members"]
    for member in members:
        words = schema[member["type"]].get("values", [])
        option = OPTIONS[member["name"]]
        if option.type is ValueType.ENUM:
            assert set(words) <= set(option.words), option.name


@every_qemu
def test_statuses_are_those_of_the_table(start: Start, version: str) -> None:
    schema = start(version).ask("query-qmp-schema")
    lists = [set(e["values"]) for e in schema if e["meta-type"] == "enum"]
    (words,) = [values for values in lists if {"postcopy-paused", "wait-unplug"} <= values]
    ours = {status.value for status in MigrationStatus}
    assert words <= ours
    if major_minor(version) >= (11, 1):
        assert words == ours


# Mode, settings, multifd channels; in this order on the same two QEMUs, so that each follows a past.
STORIES: list[tuple[Mode, dict[str, Value], int]] = [
    (Mode.PRECOPY, {}, 0),
    (Mode.POSTCOPY, {}, 0),
    (Mode.PRECOPY, {"multifd-compression": "zstd"}, 3),
    (Mode.PRECOPY, {"zero-copy-send": True}, 2),
    (Mode.PRECOPY, {"multifd-compression": "zlib"}, 4),
    (Mode.POSTCOPY, {"postcopy-preempt": True, "postcopy-blocktime": True, "max-postcopy-bandwidth": 1 << 20}, 0),
    (Mode.PRECOPY, {"xbzrle": True, "xbzrle-cache-size": 1 << 20, "auto-converge": True, "validate-uuid": True}, 0),
    (Mode.PRECOPY, {"cpu-throttle-initial": 50, "max-cpu-throttle": 60, "announce-rounds": 9, "downtime-limit": 20}, 0),
    (Mode.PRECOPY, {"max-cpu-throttle": 40}, 0),
    (Mode.PRECOPY, {}, 0),
]


@pytest.mark.parametrize(("here", "there"), [(a, b) for a in sorted(QEMUS) for b in sorted(QEMUS)], ids=str)
def test_what_is_built_is_accepted_and_reads_back_equal(start: Start, here: str, there: str) -> None:
    source, destination = start(here), start(there, "-incoming", "defer")
    fresh = {Role.SOURCE: source.read_back(), Role.DESTINATION: destination.read_back()}
    for mode, settings, channels in STORIES:
        both = build(
            mode, settings, source_known=frozenset(fresh[Role.SOURCE]),
            destination_known=frozenset(fresh[Role.DESTINATION]), multifd_channels=channels,
        )  # fmt: skip
        assert isinstance(both, AttemptOptions), both
        for role, qmp in ((Role.SOURCE, source), (Role.DESTINATION, destination)):
            qmp.apply(both, role)
            assert differences(both.expected(role), qmp.read_back()) == (), (mode, settings, channels)
            assert {s.name for s in both.skipped if s.role is role} == {"tls-authz"}


@every_qemu
def test_a_qemu_with_a_wild_past_gets_its_known_set(start: Start, version: str) -> None:
    qmp = start(version)
    known = qmp.read_back()
    wild = [
        n for n in ("release-ram", "events", "xbzrle", "auto-converge", "postcopy-ram", "validate-uuid") if n in known
    ]
    qmp.ask("migrate-set-capabilities", capabilities=[{"capability": n, "state": True} for n in wild])
    qmp.ask(
        "migrate-set-parameters", **{"downtime-limit": 7, "max-cpu-throttle": 21, "tls-creds": "x", "tls-hostname": "y"}
    )
    both = build(Mode.PRECOPY, {}, source_known=frozenset(known), destination_known=frozenset(known))
    assert isinstance(both, AttemptOptions)
    qmp.apply(both, Role.SOURCE)
    assert differences(both.expected(Role.SOURCE), qmp.read_back()) == ()


@every_qemu
def test_tls_names_read_back(start: Start, version: str) -> None:
    qmp = start(version, "-incoming", "defer")
    known = frozenset(qmp.read_back())
    tls = TlsChoice("tls-s", "tls-d", hostname="host-b", authz="authz0")
    both = build(Mode.PRECOPY, {}, source_known=known, destination_known=known, tls=tls)
    assert isinstance(both, AttemptOptions)
    qmp.apply(both, Role.DESTINATION)
    assert differences(both.expected(Role.DESTINATION), qmp.read_back()) == ()


@every_qemu
def test_ranges_are_those_that_the_qemu_enforces(start: Start, version: str) -> None:
    """Inside the table's range the QEMU accepts; where it accepts more, the table is the stricter on purpose."""
    qmp = start(version)
    for name, value in qmp.read_back().items():
        option = OPTIONS[name]
        if option.kind is Kind.CAPABILITY or option.high is None or option.policy is Policy.FORBIDDEN:
            continue
        for edge in (option.low, option.high):
            if name == "max-cpu-throttle" and edge == option.low:
                continue  # QEMU wants it not below cpu-throttle-initial; build() refuses that
            assert "return" in qmp.reply("migrate-set-parameters", **{name: edge}), (name, edge)
        qmp.ask("migrate-set-parameters", **{name: value})
        assert option.qemu_default is not UNSET


@pytest.mark.skipif("7.2" not in QEMUS, reason="needs QEMU 7.2")
def test_qemu_7_2_ignores_compression_levels_and_the_comparison_says_so(start: Start) -> None:
    qmp = start("7.2")
    known = frozenset(qmp.read_back())
    settings: dict[str, Value] = {"multifd-compression": "zstd", "multifd-zstd-level": 3}
    both = build(Mode.PRECOPY, settings, source_known=known, destination_known=known, multifd_channels=2)
    assert isinstance(both, AttemptOptions)
    qmp.apply(both, Role.SOURCE)
    found = differences(both.expected(Role.SOURCE), qmp.read_back())
    assert found == ("multifd-zstd-level: wanted 3, QEMU says 1",)


def test_both_versions_are_there() -> None:
    assert {"7.2", "11.1"} <= set(QEMUS)
    assert all(Path(path).exists() for path in QEMUS.values())
