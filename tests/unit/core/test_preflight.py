"""Preflight: every blocker at once, with its side and its fix; what is not known is an objection, never a guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.core import options, preflight
from vmferry.core.disk_reports import DiskReport, DiskUse
from vmferry.core.options import Mode, TlsChoice
from vmferry.core.preflight import (
    QEMU_OVERHEAD_BYTES,
    RULES,
    RUN_STATES,
    GuestReport,
    HostReport,
    Objection,
    Weight,
    Wish,
    blockers,
    check,
)
from vmferry.errors import UsageError
from vmferry.units import GIB

NEW = frozenset(name for name, o in options.OPTIONS.items() if o.gone_in is None)
CAPABILITIES = frozenset(o.name for o in options.CAPABILITIES) & NEW
DISK = DiskReport(exists=True, writable=True, size_bytes=1 << 30, format="raw", identity="nfs:1:42")
MACHINES = {name: name for name in ("pc-q35-11.1", "pc-q35-9.0", "pc-q35-7.2", "pc-i440fx-7.2")}
SOURCE = HostReport(
    name="host-a", host_id="a", agent_version="0.1.0", qemu_found=True, qemu_version=(11, 1, 2),
    machines=MACHINES | {"q35": "pc-q35-11.1"}, cpu_models={"qemu64": ()}, host_cpu="EPYC",
    devices=frozenset({"virtio-net"}), accelerators=frozenset({"tcg", "kvm"}), capabilities=CAPABILITIES,
    parameters=NEW - CAPABILITIES, memory_available_bytes=8 * GIB, userfaultfd=True, disks={"/d": DISK},
    vms=frozenset({"web1"}), clock_offset_ms=0.0,
)  # fmt: skip
DESTINATION = replace(SOURCE, name="host-b", host_id="b", vms=frozenset(), ports_free={4000: True})
GUEST = GuestReport(
    name="web1", machine="pc-q35-7.2", cpu_model="qemu64", accelerator="tcg", memory_bytes=GIB, page_bytes=4096,
    disks=(DiskUse("/d"),), devices=frozenset({"virtio-net"}), has_vfio=False, blocked_reasons=(),
    run_state="running",
)  # fmt: skip
WISH = Wish(ports=(4000,), tls=TlsChoice("vmferry-tls-1", "vmferry-tls-1", "vmferry-1"))
POST = replace(WISH, mode=Mode.POSTCOPY)
OLD = {"qemu_version": (7, 2, 22)}
OLD_MACHINES = {"machines": {"pc-q35-7.2": "pc-q35-7.2"}}


def ask(
    *,
    source: dict[str, Any] | None = None,
    destination: dict[str, Any] | None = None,
    guest: dict[str, Any] | None = None,
    wish: Wish = WISH,
) -> tuple[Objection, ...]:
    return check(
        replace(SOURCE, **(source or {})),
        replace(DESTINATION, **(destination or {})),
        replace(GUEST, **(guest or {})),
        wish,
    )


def disk(**changes: Any) -> dict[str, Any]:
    return {"disks": {"/d": replace(DISK, **changes)}}


def test_a_clean_case_has_no_objection() -> None:
    assert ask() == ()
    assert ask(wish=POST) == ()


# One entry per rule: how to make it happen, and words of its sentences.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("same-host", {"destination": {"name": "host-a"}}, "is the host that web1 runs on"),
    ("same-host", {"destination": {"host_id": "a"}}, "is the host that web1 runs on"),
    ("qemu-missing", {"destination": {"qemu_found": False}}, "has no qemu-system-x86_64"),
    ("vm-there", {"destination": {"vms": frozenset({"web1"})}}, "already has a VM named web1"),
    ("job-exists", {"guest": {"job": "j7"}}, "already has the job j7"),
    ("run-state", {"guest": {"run_state": "inmigrate"}}, "still arriving"),
    ("run-state", {"guest": {"run_state": "dreaming"}}, "does not know this state"),
    ("run-state-odd", {"guest": {"run_state": "io-error"}}, "disk error"),
    ("run-state-kept", {"guest": {"run_state": "paused"}}, "arrives paused"),
    ("not-migratable", {"guest": {"blocked_reasons": ("VFIO device x",)}}, "VFIO device x"),
    ("machine-newer", {"guest": {"machine": "q35"}, "destination": OLD | OLD_MACHINES}, "pc-q35-11.1, which is newer"),
    ("machine-newer", {"guest": {"machine": "q35"}, "destination": OLD | OLD_MACHINES}, "QEMU 11.1 or newer"),
    ("machine-newer", {"guest": {"machine": "q35"}, "destination": OLD | OLD_MACHINES}, "machine type pc-q35-7.2"),
    ("machine-unknown", {"guest": {"machine": "pc-q35-2.4"}}, "does not know web1's machine type"),
    ("machine-unknown", {"guest": {"machine": "isapc"}}, "machine type one that both know"),
    ("cpu-unknown", {"guest": {"cpu_model": "Turin"}}, "does not know the CPU model Turin"),
    ("cpu-features", {"destination": {"cpu_models": {"qemu64": ("avx", "aes")}}}, "avx, aes"),
    ("cpu-features-unknown", {"destination": {"cpu_models": {"qemu64": None}}}, "all features of the model"),
    ("cpu-host-differs", {"guest": {"cpu_model": "host"}, "destination": {"host_cpu": "Xeon"}}, "CPUs differ"),
    ("cpu-host-unknown", {"guest": {"cpu_model": "host"}, "destination": {"host_cpu": None}}, "is not known"),
    ("cpu-max-emulated", {"guest": {"cpu_model": "max"}, "destination": {"qemu_version": (11, 2, 0)}}, "max"),
    ("device-unknown", {"guest": {"devices": frozenset({"warp"})}}, "does not have the device warp"),
    ("accelerator-missing", {"destination": {"accelerators": frozenset({"kvm"})}}, "runs under tcg"),
    ("tcg-loses-writes", {"source": {"qemu_version": (7, 2, 22)}}, "loses writes of a TCG guest"),
    ("tcg-auto-converge", {"wish": replace(WISH, settings={"auto-converge": True})}, "while auto-converge slows it"),
    ("memory-short", {"destination": {"memory_available_bytes": GIB}}, "needs 1.1 GiB"),
    ("disk-unreported", {"destination": {"disks": {}}}, "did not say whether it has the image /d"),
    ("disk-missing", {"destination": disk(exists=False)}, "does not have the image /d"),
    ("disk-read-only", {"destination": disk(writable=False)}, "cannot write the image /d"),
    ("disk-size", {"destination": disk(size_bytes=5)}, "1073741824 bytes on host-a and 5 on host-b"),
    ("disk-format", {"destination": disk(format="qcow2")}, "is raw on host-a and qcow2 on host-b"),
    ("disk-not-shared", {"destination": disk(identity="ext4:9")}, "would lose its writes"),
    ("disk-writable-unknown", {"destination": disk(writable=None)}, "may write the image /d"),
    ("disk-identity-unknown", {"destination": disk(identity=None)}, "same image on both"),
    ("disk-identity-unknown", {"source": {"disks": {}}}, "same image on both"),
    ("port-taken", {"destination": {"ports_free": {4000: False}}}, "port 4000 on host-b is in use"),
    ("port-unknown", {"destination": {"ports_free": {}}}, "whether port 4000 is free"),
    ("userfaultfd-missing", {"destination": {"userfaultfd": False}, "wish": POST}, "needs userfaultfd"),
    ("postcopy-vfio", {"guest": {"has_vfio": True}, "wish": POST}, "passed-through"),
    ("postcopy-giant-pages", {"guest": {"page_bytes": GIB}, "wish": POST}, "pages of 1.0 GiB"),
    ("postcopy-huge-pages", {"guest": {"page_bytes": 2 << 20}, "wish": POST}, "pages of 2.0 MiB"),
    ("multifd-postcopy", {"source": {"qemu_version": (10, 0, 9)}, "wish": replace(POST, multifd_channels=2)}, "10.1"),
    ("clear-text", {"wish": replace(WISH, tls=None)}, "web1's memory goes over the network in clear text"),
    ("clear-text-forbidden", {"wish": replace(WISH, tls=None), "source": {"tls_only": True}}, "the agent of host-a"),
    ("clear-text-forbidden", {"wish": replace(WISH, tls=None), "destination": {"tls_only": True}}, "agent of host-b"),
    ("rdma", {"wish": replace(WISH, rdma=True)}, "RDMA is refused"),
    ("option", {"wish": replace(WISH, settings={"x-colo": True})}, "x-colo is refused"),
    ("option", {"wish": replace(WISH, settings={"background-snapshot": True})}, "it makes a snapshot"),
    ("option", {"wish": replace(WISH, settings={"mode": "cpr-reboot"})}, "cpr modes are not supported"),
    ("older-qemu", {"destination": OLD}, "7.2.22 is older than host-a's 11.1.2"),
    ("agent-versions", {"destination": {"agent_version": "0.2.0"}}, "0.1.0 on host-a, 0.2.0 on host-b"),
    ("clock-skew", {"destination": {"clock_offset_ms": -1500.0}}, "1.5 s apart"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "how", "words"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_each_rule_finds_its_case_and_nothing_else(code: str, how: dict[str, Any], words: str) -> None:
    found = [o for o in ask(**how) if not o.code.startswith("unknown-")]
    together = {"older-qemu", "disk-size"} if code in {"machine-newer", "cpu-max-emulated"} else set()
    if code == "clear-text-forbidden":
        together = {"clear-text"}
    assert {o.code for o in found} - together == {code}
    objection = next(o for o in found if o.code == code)
    assert words in f"{objection.message}; {objection.fix}"
    assert objection.fix
    assert objection.weight is next(rule.weight for rule in RULES if rule.code == code)
    assert "{" not in objection.message + objection.fix


def test_every_rule_has_a_case_and_a_code_of_its_own() -> None:
    codes = [rule.code for rule in RULES]
    assert len(set(codes)) == len(codes)
    assert set(codes) == {code for code, _, _ in CASES}


@pytest.mark.parametrize("state", RUN_STATES)
def test_run_states_weigh_as_the_table_says(state: str) -> None:
    weights = {objection.weight for objection in ask(guest={"run_state": state})}
    expected = RUN_STATES[state][0]
    assert weights == (set() if expected is None else {expected})


@pytest.mark.proves("S90")
def test_vfio_and_postcopy_are_refused_before_the_start() -> None:
    assert [o.code for o in blockers(ask(guest={"has_vfio": True}, wish=POST))] == ["postcopy-vfio"]
    assert ask(guest={"has_vfio": True}) == ()


def test_clear_text_that_was_asked_for_by_name_is_told_and_is_no_blocker_unless_an_agent_forbids_it() -> None:
    clear = replace(WISH, tls=None)
    assert [(o.code, o.weight) for o in ask(wish=clear)] == [("clear-text", Weight.NOTE)]
    assert ask(source={"tls_only": True}, destination={"tls_only": True}) == ()
    both = ask(wish=clear, source={"tls_only": True}, destination={"tls_only": True})
    assert [o.code for o in blockers(both)] == ["clear-text-forbidden"] * 2


def test_rdma_is_refused_unless_configured() -> None:
    assert ask(wish=replace(WISH, rdma=True, rdma_configured=True)) == ()
    assert [o.code for o in blockers(ask(wish=replace(WISH, rdma=True)))] == ["rdma"]


def test_an_older_qemu_with_an_old_machine_type_is_a_warning_only() -> None:
    found = ask(destination=OLD | OLD_MACHINES)
    assert [o.code for o in found] == ["older-qemu"]
    assert not blockers(found)


def test_the_newest_common_machine_type_is_proposed() -> None:
    machines = {"pc-q35-9.0": "pc-q35-9.0", "pc-q35-10.0": "pc-q35-10.0", "pc-q35-x": "pc-q35-x"}
    (objection,) = blockers(
        ask(
            source={"machines": machines | {"pc-q35-11.1": "pc-q35-11.1"}},
            destination={"machines": machines, "qemu_version": (10, 0, 0)},
            guest={"machine": "pc-q35-11.1"},
        )
    )
    assert "machine type pc-q35-10.0" in objection.fix


def test_a_read_only_image_may_be_a_copy() -> None:
    found = ask(guest={"disks": (DiskUse("/d", read_only=True),)}, destination=disk(writable=False, identity="other"))
    assert found == ()
    assert ask(guest={"disks": (DiskUse("/d", read_only=True),)}, destination=disk(writable=None)) == ()


@pytest.mark.parametrize("name", ["size_bytes", "format"])
def test_an_unknown_disk_value_is_not_compared(name: str) -> None:
    assert ask(destination=disk(**{name: None})) == ()


def test_max_under_kvm_copies_the_host() -> None:
    kvm = {"cpu_model": "max", "accelerator": "kvm"}
    assert ask(guest=kvm) == ()
    assert [o.code for o in blockers(ask(guest=kvm, destination={"host_cpu": "Xeon"}))] == ["cpu-host-differs"]
    assert ask(guest={"cpu_model": "max"}) == ()


def test_all_blockers_come_at_once_and_first() -> None:
    found = ask(
        destination={"qemu_version": (7, 2, 22), "machines": {}, "accelerators": frozenset(),
                     "vms": frozenset({"web1"}),
                     "memory_available_bytes": 0, "disks": {}, "ports_free": {}, "clock_offset_ms": 9e9},
        guest={"blocked_reasons": ("one", "two"), "run_state": "paused"},
    )  # fmt: skip
    assert {o.code for o in blockers(found)} == {
        "vm-there", "not-migratable", "machine-unknown", "accelerator-missing", "memory-short", "disk-unreported",
        "port-unknown",
    }  # fmt: skip
    weights = [list(Weight).index(o.weight) for o in found]
    assert weights == sorted(weights)
    assert len([o for o in found if o.code == "not-migratable"]) == 2


def optional(report: type) -> list[str]:
    return [f.name for f in fields(report) if "None" in str(f.type) and f.name != "job"]


# What may stay unknown without a word: it is used only together with something else that is reported.
QUIET = {
    "source": {"host_id", "cpu_models", "devices", "accelerators", "memory_available_bytes", "userfaultfd", "vms",
               "qemu_found", "host_cpu"},
    "destination": {"host_id", "host_cpu", "devices"},
    "guest": set[str](),
}  # fmt: skip


@pytest.mark.parametrize(
    ("who", "name"),
    [(who, name) for who in ("source", "destination") for name in optional(HostReport)]
    + [("guest", name) for name in optional(GuestReport)],
)
def test_what_is_not_known_is_said(who: str, name: str) -> None:
    args: dict[str, Any] = {who: {name: None}}
    found = [o for o in ask(**args, wish=POST) if o.code == f"unknown-{who}-{name.replace('_', '-')}"]
    assert len(found) == (0 if name in QUIET[who] else 1)
    assert all("did not tell" in o.message for o in found)


def test_nothing_known_blocks() -> None:
    found = check(HostReport(name="a"), HostReport(name="b"), GuestReport(name="v"), POST)
    codes = {o.code for o in blockers(found)}
    assert all(code.startswith("unknown-") for code in codes - {"port-unknown"})
    assert {"unknown-destination-machines", "unknown-guest-machine", "unknown-destination-userfaultfd"} <= codes
    unknown = check(HostReport(name="a"), replace(DESTINATION, machines={}, qemu_version=None), GUEST, WISH)
    assert any("QEMU of unknown version does not know" in o.message for o in unknown)


def changed(make: Callable[[], Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = [f.name for f in fields(make()) if "None" in str(f.type)]
    return st.fixed_dictionaries({}, optional={name: st.none() for name in names})


@given(changed(lambda: SOURCE), changed(lambda: DESTINATION), changed(lambda: GUEST), st.sampled_from([WISH, POST]))
def test_taking_knowledge_away_never_removes_the_last_blocker(
    source: dict[str, Any], destination: dict[str, Any], guest: dict[str, Any], wish: Wish
) -> None:
    bad = {"blocked_reasons": ("a reason",), "job": "j1"}
    found = ask(source=source, destination=destination, guest=guest | bad, wish=wish)
    assert {"not-migratable", "job-exists"} <= {o.code for o in blockers(found)}
    assert found == ask(source=source, destination=destination, guest=guest | bad, wish=wish)


@given(st.integers(0, 1 << 42), st.integers(0, 1 << 42))
def test_memory_fits_exactly_when_guest_and_qemu_fit(needed: int, there: int) -> None:
    found = ask(guest={"memory_bytes": needed}, destination={"memory_available_bytes": there})
    assert (not found) == (there >= needed + QEMU_OVERHEAD_BYTES)


def test_the_module_names_its_sides() -> None:
    assert {rule.side for rule in preflight.RULES} <= {"source", "destination", "both"}


def test_a_person_may_accept_a_named_blocker_and_no_other() -> None:
    found = ask(source={"qemu_version": (7, 2, 22)})
    assert [o.code for o in preflight.blockers(found)] == ["tcg-loses-writes"]
    accepted = preflight.accept(found, frozenset({"tcg-loses-writes"}))
    assert preflight.blockers(accepted) == ()
    assert len(accepted) == len(found)
    with pytest.raises(UsageError, match="same-host cannot be accepted"):
        preflight.accept(found, frozenset({"same-host"}))
