"""Definitions out of a repository: one list of disks, types that are what they should be, and nobody's arguments."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from vmferry.agent.restore_trust import known_powers, powers, read_definition, require_trust
from vmferry.agent.vm_commands import definition_of
from vmferry.engine.frozen import FrozenDisk
from vmferry.errors import PlanRefused, RepositoryError
from vmferry.jobs.journal import Entry, Written
from vmferry.vm import spec as vm_spec
from vmferry.vm.spawn import ProcessIdentity

RUNS_A_PROGRAM = ["-netdev", "tap,id=x,script=/any/program"]


def wire_of(**more: Any) -> dict[str, Any]:
    spec = {"name": "web1", "memory": "64M", "disk": [{"path": "/images/a.img"}], **more}
    return definition_of(vm_spec.pin(vm_spec.from_wire(spec), machine="pc-q35-7.2", accel="tcg")).to_wire()


def frozen(*paths: str) -> list[FrozenDisk]:
    return [FrozenDisk(path=each, format="raw", way="read-only", size_bytes=1, mtime_ns=1) for each in paths]


def test_a_definition_as_it_was_saved_comes_back() -> None:
    wire = wire_of(kernel={"image": "/boot/vmlinuz"})
    assert read_definition(wire, frozen("/boot/vmlinuz")).to_wire() == wire


@pytest.mark.parametrize("path", ["/dev/sda", "/images/of-another-guest.img"])
def test_a_disk_that_only_qemu_would_see_is_refused(path: str) -> None:
    """Nobody would have put it under an overlay, and nobody compared it with other VMs."""
    wire = wire_of()
    hidden = {
        **wire,
        "spec": {**wire["spec"], "disk": [*wire["spec"]["disk"], {**wire["spec"]["disk"][0], "path": path}]},
    }
    with pytest.raises(RepositoryError, match="not those that it lists"):
        read_definition(hidden, [])
    with pytest.raises(RepositoryError, match="not those that it lists"):
        read_definition({**wire, "disks": []}, [])
    readonly = [{**wire["disks"][0], "readonly": True}]
    with pytest.raises(RepositoryError, match="not those that it lists"):
        read_definition({**wire, "disks": readonly}, [])


def test_a_file_that_qemu_reads_and_nobody_describes_is_refused() -> None:
    with pytest.raises(RepositoryError, match="nothing is known of /boot/vmlinuz"):
        read_definition(wire_of(kernel={"image": "/boot/vmlinuz"}), [])


@pytest.mark.parametrize(
    "change",
    [
        {"spec": None}, {"spec": 7}, {"spec": {}}, {"spec": {"disk": "x"}}, {"disks": 7}, {"disks": [7]},
        {"disks": [{"path": 7}]}, {"memory_bytes": "much"}, {"memory_bytes": 1}, {"machine": "pc-i440fx-9.9"},
        {"accel": "xen"}, {"name": "web9"}, {"adopted": {}}, {"spec": None, "adopted": {}},
        {"spec": None, "adopted": {"args": 7}}, {"strange": 1},
    ],
)  # fmt: skip
def test_what_is_malformed_is_an_error_of_the_repository(change: dict[str, Any]) -> None:
    with pytest.raises(RepositoryError, match="definition"):
        read_definition({**wire_of(), **change}, [])
    with pytest.raises(RepositoryError, match="definition"):
        read_definition(7, [])


def asked(wire: dict[str, Any], *, journal: list[Written], key: str | None = None, said: bool = False) -> None:
    agent = SimpleNamespace(
        config=SimpleNamespace(name="host-a", repository_key=key), journal=SimpleNamespace(read=lambda: journal), vms={}
    )
    definition = read_definition(wire, [])
    asyncio.run(require_trust(agent, definition, is_said=said))  # type: ignore[arg-type]


def test_arguments_that_nobody_vouched_for_are_shown_and_refused() -> None:
    wire = wire_of(extra_args=RUNS_A_PROGRAM)
    with pytest.raises(PlanRefused, match="script=/any/program") as caught:
        asked(wire, journal=[])
    assert "--trust-definition" in caught.value.hint
    other = Written(1, Entry.KEPT, "web1", {"definition": wire_of(extra_args=["-device", "edu"])})
    with pytest.raises(PlanRefused):
        asked(wire, journal=[other])


def test_arguments_that_somebody_vouched_for_are_taken() -> None:
    wire = wire_of(extra_args=RUNS_A_PROGRAM)
    asked(wire_of(), journal=[])
    asked(wire, journal=[], said=True)
    asked(wire, journal=[], key="/etc/key")
    asked(wire, journal=[Written(1, Entry.KEPT, "other", {"definition": wire})])


def test_a_command_line_that_somebody_else_wrote_is_a_power() -> None:
    adopted = {"identity": dataclasses.asdict(ProcessIdentity(1, 1, "b")), "qemu_binary": "/qemu", "launcher": [],
               "args": ["-m", "64"], "cwd": "/", "machine_option": "pc", "kinds": {}}  # fmt: skip
    found = dataclasses.replace(read_definition(wire_of(), []), spec=None, adopted=adopted)
    assert powers(found) == ("/qemu", "-m", "64")
    assert known_powers([Written(1, Entry.KEPT, "g", {"definition": found.to_wire()})]) == {powers(found)}
