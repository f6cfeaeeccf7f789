"""What a QEMU binary can do: machines, CPU models, migration capabilities and parameters.

Theory of operation
-------------------
A QEMU with `-machine none` answers all of this over QMP on its standard streams in one go. The answer only
changes with the binary, so it is kept in the agent's state directory under the binary's real path, size,
modification time and version. CPU models also depend on the accelerator and are asked for each.

Rule 1: a broken cache file is the same as none; it is written anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from vmferry.errors import QemuError
from vmferry.limits import VM_PROBE_S

Accel = Literal["tcg", "kvm"]
_CACHE_FORMAT = 3
_VERSION = re.compile(r"version (\d+)\.(\d+)\.(\d+)(?: \((.*)\))?")
_QUERIES: tuple[str | tuple[str, dict[str, Any]], ...] = (
    "query-version",
    "query-machines",
    "query-migrate-capabilities",
    "query-migrate-parameters",
)


class CpuModel(msgspec.Struct, frozen=True):
    """One CPU model on this host. `unavailable` names the features it would lack here; None is unknown."""

    name: str
    unavailable: tuple[str, ...] | None
    migration_safe: bool | None
    alias_of: str | None = None


class QemuFacts(msgspec.Struct, frozen=True):
    """What one QEMU binary is and can do on this host.

    `machines` is every type name, `aliases` maps 'q35' to its versioned name, `cpus` has one table for each
    accelerator that works. `parameters` are names only; values belong to a running VM.
    """

    binary: str
    version: tuple[int, int, int]
    package: str
    machines: tuple[str, ...]
    deprecated_machines: tuple[str, ...]
    aliases: dict[str, str]
    default_machine: str
    capabilities: tuple[str, ...]
    parameters: tuple[str, ...]
    cpus: dict[str, tuple[CpuModel, ...]]
    postcopy: bool
    postcopy_refusal: str

    def concrete_machine(self, name: str) -> str | None:
        """'q35' -> 'pc-q35-7.2'; a versioned name stays; None when this QEMU has no such machine."""
        concrete = self.aliases.get(name, name)
        return concrete if concrete in self.machines else None

    def accelerators(self) -> tuple[str, ...]:
        """The accelerators that QEMU itself accepts here ('kvm' says nothing on how fast it is)."""
        return tuple(self.cpus)


class _Cached(msgspec.Struct):
    format: int
    key: str
    facts: QemuFacts


async def qemu_facts(binary: str, *, state_directory: Path | None = None, timeout_s: float = VM_PROBE_S) -> QemuFacts:
    """The facts about `binary`, from the cache when it is unchanged (about 20 ms), else asked (0.2 s).

    Raises QemuError when it is missing, is not a QEMU, or does not answer within `timeout_s` seconds.
    """
    stamp = _stamp(binary)
    version_text = (await _run((binary, "--version"), b"", timeout_s)).decode(errors="replace")
    found = _VERSION.search(version_text)
    if found is None:
        raise QemuError(f"{binary} is not a QEMU: it does not tell its version")
    key = f"{stamp} {found.group(0)}"
    cached = _read_cache(state_directory, key) if state_directory else None
    if cached is not None:
        return cached
    facts = await _ask(binary, found, timeout_s)
    if state_directory is not None:
        _write_cache(state_directory, key, facts)
    return facts


async def _ask(binary: str, version: re.Match[str], timeout_s: float) -> QemuFacts:
    answers = await _qmp(binary, ("-machine", "none"), _QUERIES, timeout_s)
    cpus: dict[str, tuple[CpuModel, ...]] = {}
    for accel in ("kvm", "tcg"):
        with contextlib.suppress(QemuError):  # an accelerator that QEMU refuses is not a fact but its absence
            machine = ("-machine", f"none,accel={accel}")
            definitions = (await _qmp(binary, machine, ("query-cpu-definitions",), timeout_s))[0]
            cpus[accel] = cpu_models(definitions)
    refusal = await postcopy_refusal(binary, timeout_s=timeout_s)
    machines = [machine for machine in answers[1] if machine["name"] != "none"]
    return QemuFacts(
        binary=binary,
        version=(int(version.group(1)), int(version.group(2)), int(version.group(3))),
        package=version.group(4) or "",
        machines=tuple(sorted(machine["name"] for machine in machines)),
        deprecated_machines=tuple(sorted(m["name"] for m in machines if m.get("deprecated"))),
        aliases={machine["alias"]: machine["name"] for machine in machines if "alias" in machine},
        default_machine=next((m["name"] for m in machines if m.get("is-default")), ""),
        capabilities=tuple(sorted(item["capability"] for item in answers[2])),
        parameters=tuple(sorted(answers[3])),
        cpus=cpus,
        postcopy=not refusal,
        postcopy_refusal=refusal,
    )


def cpu_models(definitions: Iterable[Mapping[str, Any]]) -> tuple[CpuModel, ...]:
    """The answer of query-cpu-definitions -> models by name."""
    return tuple(
        CpuModel(
            name=item["name"],
            unavailable=tuple(item["unavailable-features"]) if "unavailable-features" in item else None,
            migration_safe=item.get("migration-safe"),
            alias_of=item.get("alias-of"),
        )
        for item in sorted(definitions, key=lambda item: str(item["name"]))
    )


async def postcopy_refusal(binary: str, *, timeout_s: float = VM_PROBE_S) -> str:
    """Why this QEMU will not take part in a postcopy migration here, in its own words; '' when it will.

    The check is QEMU's: it tries the kernel's userfaultfd when an incoming side gets the capability.
    """
    capability = {"capability": "postcopy-ram", "state": True}
    command = ("migrate-set-capabilities", {"capabilities": [capability]})
    try:
        await _qmp(binary, ("-machine", "none", "-incoming", "defer"), (command,), timeout_s)
    except QemuError as error:
        return error.message
    return ""


async def _qmp(
    binary: str, args: tuple[str, ...], commands: Iterable[str | tuple[str, dict[str, Any]]], timeout_s: float
) -> list[Any]:
    """Run a throw-away QEMU and return the answers in order. Raises QemuError with QEMU's words."""
    requests: list[dict[str, Any]] = [{"execute": "qmp_capabilities"}]
    for command in commands:
        name, arguments = (command, {}) if isinstance(command, str) else command
        requests.append({"execute": name, "arguments": arguments})
    requests.append({"execute": "quit"})
    text = "\n".join(json.dumps(request) for request in requests).encode() + b"\n"
    base = (binary, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio")
    output = await _run((*base, *args), text, timeout_s)
    answers: list[Any] = []
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            message = json.loads(line)
            if "error" in message:
                raise QemuError(str(message["error"].get("desc", "no reason given")))
            if "return" in message:
                answers.append(message["return"])
    if len(answers) < len(requests) - 1:
        raise QemuError(f"{binary} ended before it had answered")
    return answers[1 : len(requests) - 1]


async def _run(argv: tuple[str, ...], text: bytes, timeout_s: float) -> bytes:
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise QemuError(f"{argv[0]} cannot be started: {error.strerror}", cause=error) from error
    try:
        async with asyncio.timeout(timeout_s):
            output, complaints = await process.communicate(text)
    except TimeoutError:
        raise QemuError(f"{argv[0]} did not answer within {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        words = " ".join(complaints.decode(errors="replace").split()) or f"exit status {process.returncode}"
        raise QemuError(f"{argv[0]} failed: {words[:500]}")
    return output


def _stamp(binary: str) -> str:
    """What the facts depend on: the file behind the name, and whether this process may use KVM."""
    path = shutil.which(binary)
    if path is None:
        raise QemuError(f"the QEMU {binary} is not there or cannot be executed")
    real = os.path.realpath(path)
    status = os.stat(real)
    return f"{real} {status.st_size} {status.st_mtime_ns} kvm={os.access('/dev/kvm', os.R_OK | os.W_OK)}"


def _cache_path(state_directory: Path, key: str) -> Path:
    return state_directory / f"qemu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read_cache(state_directory: Path, key: str) -> QemuFacts | None:
    try:
        cached = msgspec.json.decode(_cache_path(state_directory, key).read_bytes(), type=_Cached)
    except (OSError, msgspec.DecodeError):
        return None
    return cached.facts if (cached.format, cached.key) == (_CACHE_FORMAT, key) else None


def _write_cache(state_directory: Path, key: str, facts: QemuFacts) -> None:
    """Whole or not at all; a full disk costs the cache and nothing else."""
    path = _cache_path(state_directory, key)
    draft = path.with_suffix(f".{os.getpid()}.new")
    try:
        draft.write_bytes(msgspec.json.encode(_Cached(_CACHE_FORMAT, key, facts)))
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
