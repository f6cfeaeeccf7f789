"""Commands about the snapshots of this agent's repository: list, verify, forget, prune, export, import.

Verify, prune, export and import are jobs (`chores`): a command only checks what can be checked at once.

Rule 1: all work is done in threads; the event loop only waits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry.agent import job_ids
from vmferry.agent.wants import ChoreWanted
from vmferry.core.job import EXPORT, IMPORT, PRUNE, VERIFY
from vmferry.errors import UsageError

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.store.pins import Pin
    from vmferry.store.repository import Repository, SnapshotInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotName:
    """A snapshot, by its name, its id, or the beginning of its id."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWish:
    """What every command has that begins a job about the repository."""

    job: str = ""
    """Minted by the client, so that asking twice is asking once; made here if empty."""
    auto_dismiss: bool = True
    """False: the job stays in `query-jobs` with its result until `job-dismiss`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyArguments(JobWish):
    """`snapshot-verify`."""

    name: str = ""
    """What is found is told of this snapshot only; everything is read in any case."""
    rebuild_indexes: bool = False
    """First make the indexes again that are missing or damaged, from the packs that they described."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneArguments(JobWish):
    """`snapshot-prune`."""

    dry_run: bool = False
    """Only the plan."""
    empty_below: float = 0.5
    """Packs of which less than this share is needed are written anew; 1.0: all that hold anything useless."""
    drop_pins: str = ""
    """A host that is lost for good: its guests do not need the repository any more."""
    auto_finalize: bool = True
    """False: the plan waits for `job-finalize`, for an hour; nothing is done before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileArguments(JobWish):
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


async def init(agent: Agent, arguments: Any) -> dict[str, Any]:
    """A repository in the place that this agent is configured with. One that is there is left as it is.

    Raises RepositoryError: nothing was made."""
    store = agent.snapshot_store
    found, is_new = await store.run(store.make_repository)
    return {
        "repository": store.place,
        "id": found.config.repository,
        "created": is_new,
        "encrypted": found.config.encryption is not None,
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


async def forget(agent: Agent, arguments: SnapshotName) -> dict[str, Any]:
    """The snapshot is gone; its pages go with the next prune. Raises UnknownSnapshot, RepositoryBusy."""
    return await agent.snapshot_store.with_repository(lambda repository: _forget(repository, arguments.name))


def _forget(repository: Repository, name: str) -> dict[str, Any]:
    from vmferry.agent.snapshot_sink import find

    info = find(repository, name)
    repository.forget(info.snapshot)
    return {"snapshot": info.snapshot, "name": None if info.head is None else info.head.name, "forgotten": True}


async def verify(agent: Agent, arguments: VerifyArguments) -> dict[str, Any]:
    """Reads everything, and names what is damaged and whom that concerns; changes nothing but for indexes that it is
    asked to make again, for which nobody else may be at work. Returns the job at once.

    Raises RepositoryError when the store cannot be reached, UnknownSnapshot, Busy."""
    if (known := _known(agent, arguments)) is not None:
        return known
    wanted = ChoreWanted(job_ids.wanted(arguments.job), VERIFY.name, name=arguments.name,
                         arguments={"rebuild_indexes": arguments.rebuild_indexes},
                         auto_dismiss=arguments.auto_dismiss)  # fmt: skip
    agent.chores.check(wanted.job, auto_dismiss=wanted.auto_dismiss)
    if wanted.name:
        await agent.snapshot_store.with_repository(lambda repository: _require_snapshot(repository, wanted.name))
    return await agent.chores.begin(wanted)


async def prune(agent: Agent, arguments: PruneArguments) -> dict[str, Any]:
    """Plans, and unless it is a dry run does what was planned, and nothing else; without auto-finalize only after
    `job-finalize`. Returns the job at once; `plan` is among what `job-status` tells once it is known.

    Raises UsageError, Busy. The job fails with Damaged (no plan then), RepositoryBusy, PlanOutdated; what was done
    before an error stays done, and the next prune goes on."""
    if not 0.0 <= arguments.empty_below <= 1.0:
        raise UsageError(f"a share of {arguments.empty_below} is not possible; it is a number from 0 to 1")
    if (known := _known(agent, arguments)) is not None:
        return known
    plan = {"dry_run": arguments.dry_run, "empty_below": arguments.empty_below, "drop_pins": arguments.drop_pins}
    wanted = ChoreWanted(job_ids.wanted(arguments.job), PRUNE.name, arguments=plan,
                         auto_finalize=arguments.auto_finalize, auto_dismiss=arguments.auto_dismiss)  # fmt: skip
    agent.chores.check(wanted.job, auto_dismiss=wanted.auto_dismiss)
    return await agent.chores.begin(wanted)


async def export(agent: Agent, arguments: FileArguments) -> dict[str, Any]:
    """Writes a snapshot into a new file on this host that a QEMU loads. Returns the job at once. Raises UsageError,
    also when the file is there already, FileFailed, UnknownSnapshot, Busy; the job fails as `snapshot_files.export`
    does."""
    return await _begin_with_file(agent, EXPORT.name, arguments, _require_exportable)


async def load(agent: Agent, arguments: FileArguments) -> dict[str, Any]:
    """Keeps a stream file of this host as a snapshot. Returns the job at once. Raises UsageError, RepositoryError when
    the name is taken, Busy, also when another job is about to take it; the job fails as `snapshot_files.load` does."""
    return await _begin_with_file(agent, IMPORT.name, arguments, _require_importable)


async def _begin_with_file(
    agent: Agent, kind: str, arguments: FileArguments, require: Callable[[Repository, ChoreWanted], None]
) -> dict[str, Any]:
    _require_path(arguments.file)
    if (known := _known(agent, arguments)) is not None:
        return known
    wanted = _file_chore(kind, arguments)
    agent.chores.check(wanted.job, auto_dismiss=wanted.auto_dismiss)
    is_new = kind == IMPORT.name
    with agent.snapshot_names.hold(wanted.name, wanted.job) if is_new else contextlib.nullcontext():
        await agent.snapshot_store.with_repository(lambda repository: require(repository, wanted))
        return await agent.chores.begin(wanted)


def _known(agent: Agent, arguments: JobWish) -> dict[str, Any] | None:
    """The job, if it was asked for before."""
    return agent.chores.status(job=arguments.job) if arguments.job else None


def _file_chore(kind: str, arguments: FileArguments) -> ChoreWanted:
    return ChoreWanted(job_ids.wanted(arguments.job), kind, name=arguments.name, file=arguments.file,
                       auto_dismiss=arguments.auto_dismiss)  # fmt: skip


def _require_snapshot(repository: Repository, name: str) -> None:
    from vmferry.agent.snapshot_sink import find

    find(repository, name)


def _require_exportable(repository: Repository, wanted: ChoreWanted) -> None:
    from vmferry.agent.snapshot_files import require_new

    require_new(Path(wanted.file))
    _require_snapshot(repository, wanted.name)


def _require_importable(repository: Repository, wanted: ChoreWanted) -> None:
    from vmferry.agent.snapshot_sink import check_name, require_free

    check_name(wanted.name)
    require_free(repository, wanted.name)


def _require_path(text: str) -> None:
    if not os.path.isabs(text):
        raise UsageError(f"{text!r} is not a whole path: the agent has another folder than you")
