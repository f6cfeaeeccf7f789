"""Commands about the snapshots of this agent's repository: list, verify, forget, prune, export, import.

Rule 1: all of their work is done in the store's threads; the event loop only waits.
Rule 2: nothing is taken away that a plan did not show: `snapshot-prune` plans, and does only what it planned.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry.errors import UsageError

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.store.pins import Pin
    from vmferry.store.repository import Repository, SnapshotInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotName:
    """A snapshot, by its name or its id."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyArguments:
    """`snapshot-verify`."""

    name: str = ""
    """What is found is told of this snapshot only; everything is read in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneArguments:
    """`snapshot-prune`."""

    dry_run: bool = False
    """Only the plan."""
    empty_below: float = 0.5
    """Packs of which less than this share is needed are written anew; 1.0: all that hold anything useless."""
    drop_pins: str = ""
    """A host that is lost for good: its guests do not need the repository any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileArguments:
    """`snapshot-export` and `snapshot-import`."""

    name: str
    file: str
    """A path on the agent's host."""


async def snapshots(agent: Agent, arguments: Any) -> dict[str, Any]:
    """Every snapshot, the oldest first. Raises RepositoryError."""
    found, pins = await agent.snapshot_store.with_repository(_snapshots)
    return {
        "repository": agent.snapshot_store.place,
        "snapshots": [_info(info) for info in found],
        "pins": [msgspec.to_builtins(pin) for pin in pins],
    }


def _snapshots(repository: Repository) -> tuple[list[SnapshotInfo], list[Pin]]:
    from vmferry.store.pins import all_pins

    return repository.snapshots(), all_pins(repository)


def _info(info: SnapshotInfo) -> dict[str, Any]:
    head = info.head
    if head is None:
        return {"snapshot": info.snapshot, "name": None, "damage": info.damage}
    words = head.metadata
    return {
        "snapshot": info.snapshot,
        "name": head.name,
        "created_s": head.created_s,
        "vm": words.get("vm") or None,
        "host": words.get("host") or None,
        "machine": words.get("machine"),
        "qemu": words.get("qemu_version") or None,
        "way": words.get("way"),
        "was_running": words.get("was_running"),
        "memory_bytes": sum(block.size_bytes for block in head.blocks),
        "pages": head.counts.pages,
        "zero_pages": head.counts.zero,
        "known_pages": head.counts.known,
        "differences": head.counts.differences,
        "stored_bytes": head.counts.stored_bytes,
        "manifest_bytes": info.size_bytes,
        "disks": head.disks,
        "damage": None,
    }


async def verify(agent: Agent, arguments: VerifyArguments) -> dict[str, Any]:
    """Reads everything, and names what is damaged and whom that concerns. Changes nothing. Raises RepositoryError when
    the store cannot be reached, UnknownSnapshot."""
    return await agent.snapshot_store.with_repository(lambda repository: _verify(repository, arguments.name))


def _verify(repository: Repository, name: str) -> dict[str, Any]:
    from vmferry.agent.snapshot_sink import find
    from vmferry.store.verify import verify

    wanted = find(repository, name).snapshot if name else ""
    verdict = verify(repository)
    names = {info.snapshot: info.head.name for info in repository.snapshots() if info.head is not None}
    problems = [each for each in verdict.problems if not wanted or wanted in each.snapshots]
    damaged = sorted(verdict.damaged_snapshots & ({wanted} if wanted else verdict.damaged_snapshots))
    return {
        "whole": not problems,
        "problems": [
            {"object": each.name, "what": each.what, "snapshots": [names.get(s, s) for s in each.snapshots]}
            for each in problems
        ],
        "damaged_snapshots": [names.get(snapshot, snapshot) for snapshot in damaged],
        "snapshots": verdict.snapshots,
        "packs": verdict.packs,
        "pages": verdict.pages,
        "read_bytes": verdict.read_bytes,
        "orphans": verdict.orphans,
    }


async def forget(agent: Agent, arguments: SnapshotName) -> dict[str, Any]:
    """The snapshot is gone; its pages go with the next prune. Raises UnknownSnapshot, RepositoryBusy."""
    return await agent.snapshot_store.with_repository(lambda repository: _forget(repository, arguments.name))


def _forget(repository: Repository, name: str) -> dict[str, Any]:
    from vmferry.agent.snapshot_sink import find

    info = find(repository, name)
    repository.forget(info.snapshot)
    return {"snapshot": info.snapshot, "name": None if info.head is None else info.head.name, "forgotten": True}


async def prune(agent: Agent, arguments: PruneArguments) -> dict[str, Any]:
    """Plans, and unless it is a dry run does what was planned. Raises Damaged (no plan then), RepositoryBusy,
    PlanOutdated; what was done before an error stays done, and the next prune goes on."""
    if not 0.0 <= arguments.empty_below <= 1.0:
        raise UsageError(f"a share of {arguments.empty_below} is not possible; it is a number from 0 to 1")
    return await agent.snapshot_store.with_repository(lambda repository: _prune(repository, arguments))


def _prune(repository: Repository, arguments: PruneArguments) -> dict[str, Any]:
    from vmferry.store import pins
    from vmferry.store.prune import execute, plan_prune

    dropped = pins.drop(repository, arguments.drop_pins) if arguments.drop_pins and not arguments.dry_run else []
    plan = plan_prune(repository, empty_below=arguments.empty_below)
    wire: dict[str, Any] = {
        "dropped_pins": [msgspec.to_builtins(pin) for pin in dropped],
        "plan": {
            "remove_packs": len(plan.remove_packs),
            "rewrite_packs": len(plan.empty_packs),
            "remove_indexes": len(plan.remove_indexes),
            "remove_leftovers": len(plan.remove_leftovers),
            "kept_packs": plan.kept_packs,
            "too_young": plan.too_young,
            "freed_bytes": plan.freed_bytes,
        },
        "done": None,
    }
    if not arguments.dry_run and not plan.is_empty:
        done = execute(repository, plan)
        wire["done"] = {
            "removed": done.removed,
            "removed_bytes": done.removed_bytes,
            "written_bytes": done.written_bytes,
        }
    return wire


async def export(agent: Agent, arguments: FileArguments) -> dict[str, Any]:
    """Writes a snapshot into a new file on this host that a QEMU loads. Raises as `snapshot_files.export`."""
    path = _path(arguments.file)
    return await agent.snapshot_store.with_repository(lambda repository: _export(repository, arguments.name, path))


def _export(repository: Repository, name: str, path: Path) -> dict[str, Any]:
    from vmferry.agent import snapshot_files

    return snapshot_files.export(repository, name, path)


async def load(agent: Agent, arguments: FileArguments) -> dict[str, Any]:
    """Keeps a stream file of this host as a snapshot. Raises as `snapshot_files.load`."""
    path, host = _path(arguments.file), agent.config.name
    return await agent.snapshot_store.with_repository(lambda repository: _load(repository, path, arguments.name, host))


def _load(repository: Repository, path: Path, name: str, host: str) -> dict[str, Any]:
    from vmferry.agent import snapshot_files

    return snapshot_files.load(repository, path, name, host=host)


def _path(text: str) -> Path:
    if not os.path.isabs(text):
        raise UsageError(f"{text!r} is not a whole path: the agent has another folder than you")
    return Path(text)
