"""What QEMU's queries answer, as frozen values. Pure: `from_qmp` functions turn JSON values into them.

Rule 1: tolerant. A member that this QEMU does not have, or that is not what it should be, is None (or an
empty tuple); no answer of a query can raise.
Rule 2: status strings stay QEMU's strings; other rooms know what they mean.
Rule 3: the unit is the last part of a name. `_pages` are guest pages of `page_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RunState:
    """query-status."""

    status: str
    running: bool


@dataclass(frozen=True, slots=True)
class Version:
    """query-version, also in the greeting."""

    major: int
    minor: int
    micro: int
    package: str


@dataclass(frozen=True, slots=True)
class Kvm:
    """query-kvm: `present` means that this QEMU could use KVM."""

    enabled: bool
    present: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """One entry of query-machines."""

    name: str
    alias: str | None
    is_default: bool
    is_deprecated: bool
    cpu_max: int | None
    default_cpu_type: str | None


@dataclass(frozen=True, slots=True)
class CpuDefinition:
    """One entry of query-cpu-definitions; `unavailable_features` is None if this QEMU does not say."""

    name: str
    migration_safe: bool | None
    unavailable_features: tuple[str, ...] | None
    alias_of: str | None
    is_deprecated: bool


@dataclass(frozen=True, slots=True)
class BlockNode:
    """One entry of query-named-block-nodes. `active` is None before QEMU 10.0, which does not say."""

    node_name: str
    driver: str
    filename: str
    read_only: bool
    backing_file: str | None
    active: bool | None


@dataclass(frozen=True, slots=True)
class MigrateInfo:
    """query-migrate. All None when no migration was ever started; `error_desc` is the last error's text."""

    status: str | None
    error_desc: str | None
    blocked_reasons: tuple[str, ...]
    socket_addresses: tuple[Mapping[str, Any], ...]
    total_time_ms: int | None
    setup_time_ms: int | None
    expected_downtime_ms: int | None
    downtime_ms: int | None
    cpu_throttle_percent: int | None
    remaining_bytes: int | None  # RAM and devices; QEMU 11 and later
    vfio_transferred_bytes: int | None
    ram_transferred_bytes: int | None
    ram_remaining_bytes: int | None
    ram_total_bytes: int | None
    ram_duplicate_pages: int | None
    ram_normal_pages: int | None
    dirty_sync_count: int | None
    dirty_pages_per_s: int | None
    pages_per_s: int | None
    mbps: float | None
    page_bytes: int | None
    precopy_bytes: int | None
    downtime_bytes: int | None
    postcopy_bytes: int | None
    multifd_bytes: int | None
    postcopy_requests: int | None
    postcopy_blocktime_ms: int | None
    postcopy_vcpu_blocktimes_ms: tuple[int, ...]
    postcopy_latency_ns: int | None
    postcopy_vcpu_latencies_ns: tuple[int, ...]
    postcopy_non_vcpu_latency_ns: int | None
    postcopy_latency_counts: tuple[int, ...]  # element n counts faults of 2**n to 2**(n+1) microseconds


def run_state(raw: Any) -> RunState:
    """From query-status; a status that is missing is the empty string."""
    raw = _object(raw)
    return RunState(_text(raw, "status") or "", raw.get("running") is True)


def version(raw: Any) -> Version:
    """From query-version or a greeting's `version`; missing numbers are 0."""
    raw = _object(raw)
    numbers = _object(raw.get("qemu"))
    major, minor, micro = (_number(numbers, name) or 0 for name in ("major", "minor", "micro"))
    return Version(major, minor, micro, _text(raw, "package") or "")


def kvm(raw: Any) -> Kvm:
    """From query-kvm."""
    raw = _object(raw)
    return Kvm(enabled=raw.get("enabled") is True, present=raw.get("present") is True)


def machines(raw: Any) -> tuple[Machine, ...]:
    """From query-machines, in QEMU's order."""
    return tuple(
        Machine(
            name=_text(entry, "name") or "",
            alias=_text(entry, "alias"),
            is_default=entry.get("is-default") is True,
            is_deprecated=entry.get("deprecated") is True,
            cpu_max=_number(entry, "cpu-max"),
            default_cpu_type=_text(entry, "default-cpu-type"),
        )
        for entry in _objects(raw)
    )


def cpu_definitions(raw: Any) -> tuple[CpuDefinition, ...]:
    """From query-cpu-definitions, in QEMU's order."""
    return tuple(
        CpuDefinition(
            name=_text(entry, "name") or "",
            migration_safe=_flag(entry, "migration-safe"),
            unavailable_features=(_texts(entry, "unavailable-features") if "unavailable-features" in entry else None),
            alias_of=_text(entry, "alias-of"),
            is_deprecated=entry.get("deprecated") is True,
        )
        for entry in _objects(raw)
    )


def block_nodes(raw: Any) -> tuple[BlockNode, ...]:
    """From query-named-block-nodes, in QEMU's order."""
    return tuple(
        BlockNode(
            node_name=_text(entry, "node-name") or "",
            driver=_text(entry, "drv") or "",
            filename=_text(entry, "file") or "",
            read_only=entry.get("ro") is True,
            backing_file=_text(entry, "backing_file"),
            active=_flag(entry, "active"),
        )
        for entry in _objects(raw)
    )


def capabilities(raw: Any) -> dict[str, bool]:
    """From query-migrate-capabilities: name to on or off."""
    return {_text(entry, "capability") or "": entry.get("state") is True for entry in _objects(raw)}


def migrate_info(raw: Any) -> MigrateInfo:
    """From query-migrate."""
    raw = _object(raw)
    ram = _object(raw.get("ram"))
    mbps = ram.get("mbps")
    return MigrateInfo(
        status=_text(raw, "status"),
        error_desc=_text(raw, "error-desc"),
        blocked_reasons=_texts(raw, "blocked-reasons"),
        socket_addresses=_objects(raw.get("socket-address")),
        total_time_ms=_number(raw, "total-time"),
        setup_time_ms=_number(raw, "setup-time"),
        expected_downtime_ms=_number(raw, "expected-downtime"),
        downtime_ms=_number(raw, "downtime"),
        cpu_throttle_percent=_number(raw, "cpu-throttle-percentage"),
        remaining_bytes=_number(raw, "remaining"),
        vfio_transferred_bytes=_number(_object(raw.get("vfio")), "transferred"),
        ram_transferred_bytes=_number(ram, "transferred"),
        ram_remaining_bytes=_number(ram, "remaining"),
        ram_total_bytes=_number(ram, "total"),
        ram_duplicate_pages=_number(ram, "duplicate"),
        ram_normal_pages=_number(ram, "normal"),
        dirty_sync_count=_number(ram, "dirty-sync-count"),
        dirty_pages_per_s=_number(ram, "dirty-pages-rate"),
        pages_per_s=_number(ram, "pages-per-second"),
        mbps=float(mbps) if isinstance(mbps, int | float) and not isinstance(mbps, bool) else None,
        page_bytes=_number(ram, "page-size"),
        precopy_bytes=_number(ram, "precopy-bytes"),
        downtime_bytes=_number(ram, "downtime-bytes"),
        postcopy_bytes=_number(ram, "postcopy-bytes"),
        multifd_bytes=_number(ram, "multifd-bytes"),
        postcopy_requests=_number(ram, "postcopy-requests"),
        postcopy_blocktime_ms=_number(raw, "postcopy-blocktime"),
        postcopy_vcpu_blocktimes_ms=_numbers(raw, "postcopy-vcpu-blocktime"),
        postcopy_latency_ns=_number(raw, "postcopy-latency"),
        postcopy_vcpu_latencies_ns=_numbers(raw, "postcopy-vcpu-latency"),
        postcopy_non_vcpu_latency_ns=_number(raw, "postcopy-non-vcpu-latency"),
        postcopy_latency_counts=_numbers(raw, "postcopy-latency-dist"),
    )


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _array(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple(entry for entry in _array(value) if isinstance(entry, Mapping))


def _text(raw: Mapping[str, Any], name: str) -> str | None:
    value = raw.get(name)
    return value if isinstance(value, str) else None


def _texts(raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return tuple(entry for entry in _array(raw.get(name)) if isinstance(entry, str))


def _flag(raw: Mapping[str, Any], name: str) -> bool | None:
    value = raw.get(name)
    return value if isinstance(value, bool) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(raw: Mapping[str, Any], name: str) -> int | None:
    value = raw.get(name)
    return value if _is_number(value) else None


def _numbers(raw: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(entry for entry in _array(raw.get(name)) if _is_number(entry))
