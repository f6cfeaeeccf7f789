"""Is this host fit? Every probe in one list of checks, for `vmferry doctor` and for plans.

Rule 1: a check says what it saw, and when it fails, what to do about it; it never raises for a bad host.
Rule 2: `ok` None is 'could not be found out', which is not the same as bad.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from vmferry import limits, units
from vmferry.clock import Clock
from vmferry.errors import QemuError, VmferryError
from vmferry.limits import VM_KVM_BOOT_S
from vmferry.pki import authority
from vmferry.vm import probe_host, probe_qemu
from vmferry.vm.spawn import host_boot_id

# The oldest QEMU whose migration is known to work with vmferry (its QMP has every command that is used).
QEMU_VERSION_MIN = (7, 2, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `ok` None is unknown; `fix` is what to do, '' when nothing is."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


async def doctor(
    *,
    qemu: str,
    clock: Clock,
    state_directory: Path | None = None,
    certificates: Path | None = None,
    ports: tuple[int, int] | None = None,
    disks: Sequence[str] = (),
    offsets: Sequence[probe_host.ClockOffset] = (),
    kvm_boot: bool = True,
    boot_timeout_s: float = VM_KVM_BOOT_S,
) -> tuple[Check, ...]:
    """Look at everything this host needs for a migration; takes under a second when all is well.

    Nothing is changed. What is not asked for (no `certificates`, no `ports`) is left out.
    """
    checks: list[Check] = [*await _qemu_checks(qemu, state_directory)]
    checks.append(await _kvm_check(qemu, boot_timeout_s if kvm_boot else None))
    fault = probe_host.userfaultfd()
    fix = "" if fault.works else "allow it (sysctl vm.unprivileged_userfaultfd=1), or migrate without postcopy"
    checks.append(Check("userfaultfd", fault.works, fault.detail, fix))
    checks.append(_memory_check(probe_host.memory()))
    if state_directory is not None:
        checks.append(_state_check(state_directory))
    if ports is not None:
        checks.append(_port_check(ports))
    if certificates is not None:
        checks.append(certificate_check(certificates, now=datetime.fromtimestamp(clock.wall_s(), UTC)))
    checks += [offset_check(offset) for offset in offsets]
    checks += [disk_check(facts) for facts in await asyncio.gather(*map(probe_host.disk, disks))]
    return tuple(checks)


async def best_accel(
    qemu: str, *, state_directory: Path | None = None, boot_timeout_s: float = VM_KVM_BOOT_S
) -> tuple[probe_qemu.Accel, str]:
    """The accelerator for accel = 'auto', and why: KVM when a guest really boots under it, else TCG.

    The answer is kept for one boot of the host, because the trial takes 0.2 s on a good host and
    `boot_timeout_s` on a bad one. Never raises.
    """
    key = f"{host_boot_id()} {shutil.which(qemu)} {boot_timeout_s:g}"
    path = state_directory / "accel.json" if state_directory is not None else None
    if path is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text())
            if kept["key"] == key:
                return ("kvm" if kept["kvm"] else "tcg"), str(kept["why"])
    found = await asyncio.to_thread(probe_host.kvm)
    if found.works:
        found = await probe_host.kvm_boot(qemu, timeout_s=boot_timeout_s)
    if path is not None and found.works is not None:
        with contextlib.suppress(OSError):
            path.write_text(json.dumps({"key": key, "kvm": found.works, "why": found.detail}))
    return ("kvm" if found.works else "tcg"), found.detail


async def _qemu_checks(qemu: str, state_directory: Path | None) -> list[Check]:
    try:
        facts = await probe_qemu.qemu_facts(qemu, state_directory=state_directory)
    except QemuError as error:
        return [Check("qemu", False, error.message, "install qemu-system-x86, or name another QEMU")]
    version = ".".join(map(str, facts.version))
    oldest = ".".join(map(str, QEMU_VERSION_MIN))
    new_enough = facts.version >= QEMU_VERSION_MIN
    detail = f"{qemu} is version {version} with {len(facts.machines)} machine types"
    checks = [Check("qemu", new_enough, detail, "" if new_enough else f"install QEMU {oldest} or newer")]
    words = "QEMU takes part in postcopy here" if facts.postcopy else f"QEMU says: {facts.postcopy_refusal}"
    fix = "" if facts.postcopy else "migrate without postcopy to this host, or see the check 'userfaultfd'"
    checks.append(Check("qemu-postcopy", facts.postcopy, words, fix))
    return checks


async def _kvm_check(qemu: str, boot_timeout_s: float | None) -> Check:
    found = await asyncio.to_thread(probe_host.kvm)
    if found.works and boot_timeout_s is not None:
        found = await probe_host.kvm_boot(qemu, timeout_s=boot_timeout_s)
    fix = "" if found.works else "enable virtualization for this host, or run guests with accel = 'tcg'"
    return Check("kvm", found.works, found.detail, fix)


def _memory_check(memory: probe_host.Memory) -> Check:
    available, total = units.format_size(memory.available_bytes), units.format_size(memory.total_bytes)
    enough = memory.available_bytes >= 64 * units.MIB
    fix = "" if enough else "free memory: not even a small guest fits"
    return Check("memory", enough, f"{available} of {total} are available", fix)


def _state_check(directory: Path) -> Check:
    """The state directory must take a file: the journal is written there before anything is done."""
    trial = directory / ".vmferry-trial"
    try:
        trial.write_bytes(b"trial")
        trial.unlink()
    except OSError as error:
        why = f"{directory} cannot be written: {error.strerror}"
        return Check("state-directory", False, why, "make the directory writable for the agent, or free space")
    return Check("state-directory", True, f"{directory} can be written")


def _port_check(ports: tuple[int, int]) -> Check:
    text = f"{ports[0]}-{ports[1]}"
    try:
        port = probe_host.free_port(*ports)
    except OSError as error:
        return Check("ports", None, f"ports {text} cannot be tried: {error.strerror}")
    if port is None:
        return Check("ports", False, f"every port in {text} is taken", "give the agent another port range")
    return Check("ports", True, f"port {port} of {text} is free")


def certificate_check(directory: Path, *, now: datetime) -> Check:
    """The agent's certificate files: complete, fitting together, and valid now."""
    try:
        facts = authority.describe(directory)
    except VmferryError as error:
        return Check("certificates", False, error.message, error.hint)
    problems = authority.problems(facts, now=now)
    if problems:
        return Check("certificates", False, "; ".join(problems), "make new ones with 'vmferry pki'")
    end = min(facts.not_after, facts.authority_not_after)
    return Check("certificates", True, f"agent {facts.name!r}, valid until {end:%Y-%m-%d}")


def offset_check(offset: probe_host.ClockOffset) -> Check:
    """A peer's clock against ours. Migrations do not depend on it; reports and certificates do."""
    name = f"clock of {offset.peer}"
    distance_ms = abs(offset.offset_ms)
    where = "ahead" if offset.offset_ms >= 0 else "behind"
    detail = f"{units.format_ms(distance_ms)} {where}, give or take {units.format_ms(offset.uncertainty_ms)}"
    if distance_ms <= limits.CLOCK_OFFSET_MS_MAX:
        return Check(name, True, detail)
    if distance_ms - offset.uncertainty_ms <= limits.CLOCK_OFFSET_MS_MAX:
        return Check(name, None, detail)
    return Check(name, False, detail, "let both hosts follow the same time servers (NTP)")


def disk_check(facts: probe_host.DiskFacts) -> Check:
    """Whether a guest can run from this disk here, and who uses it now."""
    name = f"disk {facts.path}"
    if not facts.exists or not facts.readable or facts.problem:
        fix = "mount the shared storage at the same path on this host"
        return Check(name, False, facts.problem or "cannot be read", "" if facts.exists else fix)
    words = [f"{facts.format}, {units.format_size(facts.virtual_size_bytes or 0)}"]
    if not facts.writable:
        words.append("read-only here")
    locks = facts.locks
    writers = locks.writers if locks is not None else ()
    words += [f"written by pid {holder.pid} ({holder.command})" for holder in writers]
    if locks is not None and locks.foreign and "write" in locks.foreign:
        words.append("written from another host")
    if len(writers) > 1:
        return Check(name, False, ", ".join(words), "two processes write to it: stop one at once")
    return Check(name, True, ", ".join(words))
