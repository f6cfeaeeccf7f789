"""Disks that restores and saves made on this host: which there are, who needs each, and taking one away when a person
says so.

Theory of operation
-------------------
What a restored guest writes goes into files of its own (`overlays`). They outlive the guest: one that was powered off
may be wanted again, and nobody but a person knows. So do copies of disks that saves made (`save_mirrors`): they outlive
their snapshots, since restored guests may lie on them. So both are listed for as long as they are there, and the
journal keeps the jobs that made them. They go when a person names one, or stops a guest and says that its disks go with
it.

    who needs one (`why_kept`)    the job that makes it; another file on top of it, of a restore of any host that
                                  answers or beside it; a VM of any such host; a process that has it open; a snapshot
                                  that has it, or has it underneath

Rule 1: nothing is taken away that somebody is seen to need, whatever a person says; `force` is for what could not be
        seen: a host or a repository that does not answer.
Rule 2: only the file that the job made is taken away: by its device and inode.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vmferry.agent import disk_bases, image_chain, images
from vmferry.agent.images import Identity
from vmferry.agent.restore_definition import GuestIdentity
from vmferry.agent.restoring import RestoreWanted
from vmferry.agent.wants import SaveWanted
from vmferry.core.job import SAVE
from vmferry.errors import Busy, RepositoryError, UsageError, VmferryError
from vmferry.jobs.journal import Entry, JobState
from vmferry.vm import image_locks

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent
    from vmferry.agent.vms import VmDefinition
    from vmferry.store.repository import Repository

log = logging.getLogger("vmferry.agent")

IN_USE: Final = "a process has it open"
OVERLAY: Final = "overlay"
COPY: Final = "copy"
Ask = Callable[["Agent"], Awaitable[tuple[list[GuestIdentity], tuple[str, ...]]]]
"""What all hosts' VMs have, and a sentence for each host that did not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveArguments:
    """`restored-disk-remove`."""

    path: str
    force: bool = False
    """Also if a host or the repository does not answer: nobody there needs it, says a person."""


@dataclass(frozen=True, slots=True)
class RestoredDisk:
    """A file that a restore or a save made."""

    path: str
    backing: str
    vm: str
    job: str
    name: str
    """The snapshot's."""
    identity: Identity
    kind: str = OVERLAY
    """What it is: a restored guest writes to an `overlay`, a snapshot has a `copy`."""
    repository: str = ""
    """Of a copy: where its snapshot is, or was."""
    snapshot: str = ""
    """The id of that; empty: none, or not known."""

    @property
    def is_copy(self) -> bool:
        """Whether a save made it."""
        return self.kind == COPY

    def is_there(self) -> bool:
        """Whether the file of that name is the one that was made. Asks the file system."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self.identity

    def is_gone(self) -> bool:
        """Whether it is known not to be there any more. A folder that is not mounted says nothing of it."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                return os.stat(os.path.dirname(self.path)).st_dev == self.identity[0]
            return False
        except OSError:
            return False
        return (found.st_dev, found.st_ino) != self.identity


@dataclass(frozen=True, slots=True)
class Needs:
    """Who needs which file, as far as it could be seen."""

    here: tuple[RestoredDisk, ...]
    files: Mapping[str, set[str]]
    """By VM that this host keeps."""
    elsewhere: tuple[GuestIdentity, ...]
    under: Mapping[str, str]
    """Files of snapshots, and the name of one that has each."""
    unasked: tuple[str, ...]
    """Who could not be asked, a sentence each."""

    def why(self, path: str, *, force: bool) -> str:
        """Who needs this one; '' if nobody is seen to."""
        whys = [
            *(f"{other.path} lies on it" for other in self.here if other.backing == path),
            *(f"{vm} needs it" for vm, files in self.files.items() if path in files),
            *(f"{vm.vm} on {vm.host} needs it" for vm in self.elsewhere if path in vm.writable),
            *(f"a disk of {vm.vm} on {vm.host} lies on it" for vm in self.elsewhere if path in vm.bases),
            *([f"the snapshot {self.under[path]} needs it"] if path in self.under else []),
            *(() if force else self.unasked),
        ]
        return whys[0] if whys else ""


def of_job(wanted: RestoreWanted, made: Mapping[str, Identity]) -> list[RestoredDisk]:
    """The files of one restore."""
    return [
        RestoredDisk(each.path, each.backing, wanted.vm, wanted.job, wanted.name, made[each.path])
        for each in wanted.overlays
        if each.path in made
    ]


def copies_of_save(
    wanted: SaveWanted, made: Mapping[str, Identity], *, snapshot: str | None = None
) -> list[RestoredDisk]:
    """The copies that one save made. `snapshot`: the id of the one that has them."""
    return [
        RestoredDisk(
            each.stored, "", wanted.vm, wanted.job, wanted.name, made[each.stored], COPY, wanted.repository,
            snapshot or "",
        )
        for each in wanted.copies
        if each.stored in made
    ]  # fmt: skip


class RestoredDisks:
    """Owned by the agent's restores."""

    def __init__(self, agent: Agent, *, ask: Ask) -> None:
        self._agent, self._ask = agent, ask
        self._ended: dict[str, RestoredDisk] = {}
        """Of jobs that are over, by path."""

    async def take_up(self, state: JobState) -> None:
        """What the journal says of a restore or a save that has ended. If nothing of it is left, the journal may forget
        it."""
        if not state.images:
            return
        try:
            made = msgspec.convert(state.images, dict[str, tuple[int, int]])
            if state.role == SAVE.name:
                snapshot = (state.ended or {}).get("snapshot")
                found = copies_of_save(msgspec.convert(state.body, SaveWanted), made, snapshot=snapshot)
            else:
                found = of_job(msgspec.convert(state.body, RestoreWanted), made)
        except msgspec.ValidationError as error:  # another version's: no reason not to start
            log.warning("job=%s effect=look-for-disks result=%s", state.job, error)
            return
        self.remember(found)
        await self._forget_gone(state.job)

    def remember(self, disks: Iterable[RestoredDisk]) -> None:
        """Those of a job that is over."""
        self._ended |= {each.path: each for each in disks}

    def known(self) -> list[RestoredDisk]:
        """Those that were made and are not known to be gone, also by jobs at work."""
        known = dict(self._ended)
        for attempt in self._agent.restores.at_work():
            known |= {each.path: each for each in of_job(attempt.wanted, attempt.images)}
        for save in self._agent.saves.at_work():
            known |= {each.path: each for each in copies_of_save(save.wanted, save.images)}
        return list(known.values())

    async def here(self) -> list[RestoredDisk]:
        """Those that are there, also of jobs at work."""
        known = self.known()
        return await asyncio.to_thread(lambda: [each for each in known if each.is_there()])

    async def bases(self) -> list[GuestIdentity]:
        """Which images lie under disks that are here, for hosts that want to take one away."""
        host = self._agent.config.name
        return [GuestIdentity(each.vm, host, bases=(each.backing,)) for each in await self.here() if each.backing]

    async def look(self) -> Needs:
        """Who needs which file."""
        agent = self._agent
        files: dict[str, set[str]] = {}
        unasked: list[str] = []
        for kept in list(agent.vms.values()):
            files[kept.name] = await _files_of(kept.definition, qemu=agent.config.qemu, unasked=unasked)
        elsewhere, silent = await self._ask(agent)
        unasked += silent
        under: dict[str, str] = {}
        try:
            under = await agent.snapshot_store.with_repository(_under_snapshots)
        except RepositoryError as error:
            unasked.append(f"whether a snapshot needs it is not known: {error}")
        return Needs(tuple(await self.here()), files, tuple(elsewhere), under, tuple(unasked))

    async def why_kept(self, disk: RestoredDisk, needs: Needs, *, force: bool = False) -> str:
        """Who needs it; '' if nobody does, as far as can be seen."""
        if self._agent.restores.by_id(disk.job) is not None:
            return "its restore is at work"
        if self._agent.saves.by_id(disk.job) is not None:
            return "its save is at work"
        is_open = await asyncio.to_thread(_is_open, disk.path)
        if is_open:
            return IN_USE
        why = needs.why(disk.path, force=force)
        if not why and disk.is_copy:
            why = await self._why_copy(disk, force=force)
        return why or ("" if is_open is not None or force else "nobody can say whether a process has it open")

    async def _why_copy(self, disk: RestoredDisk, *, force: bool) -> str:
        """What is asked of copies only: overlays have no snapshot of their own, and folders of their own."""
        beside = await asyncio.to_thread(lambda: next(disk_bases.beside(disk.path), None))
        if beside is not None:
            return f"{beside.path} lies on it"
        place = self._agent.snapshot_store.place
        if disk.repository == place or force:
            return ""
        return f"its snapshot is or was in {disk.repository}, and this agent has {place}: nobody can say"

    async def remove(self, disk: RestoredDisk, *, force: bool = False) -> str:
        """Takes it away. Why it was not, or ''."""
        why = await self.why_kept(disk, await self.look(), force=force)
        if why:
            return why
        try:
            why = await asyncio.to_thread(_unlink, disk, force=force)
        except OSError as error:
            why = str(error.strerror)
        if why:
            return why
        log.info("image=%s vm=%s job=%s result=removed", disk.path, disk.vm, disk.job)
        await self._forget_gone(disk.job)
        return ""

    async def remove_all(self, vm: str, paths: Iterable[str]) -> dict[str, list[str]]:
        """Those that were a VM's, which is gone from this host: what was removed, and what is kept and why."""
        told: dict[str, list[str]] = {"removed": [], "left": []}
        mine = {disk.path: disk for disk in await self.here() if disk.vm == vm}
        for path in paths:
            why = f"no restore of {self._agent.config.name} made it for {vm}"
            if path in mine:
                why = await self.remove(mine[path])
            told["left" if why else "removed"].append(f"{path}: {why}" if why else path)
        return told

    async def _forget_gone(self, job: str) -> None:
        """Nothing of a job is left: the journal need not keep it for that."""
        mine = [each for each in self._ended.values() if each.job == job]
        if not await asyncio.to_thread(lambda: all(each.is_gone() for each in mine)):
            return
        for each in mine:
            del self._ended[each.path]
        try:
            await self._agent.journal.append(Entry.IMAGES_GONE, job)
        except VmferryError as error:  # the next agent looks again
            log.warning("job=%s entry=images-gone result=%s", job, error)


async def _files_of(definition: VmDefinition, *, qemu: str, unasked: list[str]) -> set[str]:
    """The images of a VM and what they lie on. Where that cannot be read, `unasked` gets a sentence."""
    found = set()
    for disk in definition.disks:
        found.add(disk.path)
        under, why = None, "there is no qemu-img"
        try:
            under = await image_chain.under(disk.path, disk.format, qemu=qemu)
        except (VmferryError, OSError) as error:
            why = str(error)
        if under is None:
            unasked.append(f"what {disk.path} of {definition.name} lies on is not known: {why}")
        found |= {each.path for each in under or ()}
    return found


def _is_open(path: str) -> bool | None:
    """Whether a process has the image, on any host that shares its locks; None: nobody can say."""
    try:
        used = image_locks.in_use(path)
    except OSError:
        return None
    return None if used is None else bool(used)


def _unlink(disk: RestoredDisk, *, force: bool) -> str:
    """In a thread. Why it was not taken away, or ''. No QEMU can begin to write to it meanwhile. Raises OSError."""
    lock = None
    try:
        lock = image_locks.WriteLock.take(disk.path)
        if lock is None:
            return IN_USE
    except OSError:
        if not force:
            raise
    try:
        return "" if images.remove(disk.path, disk.identity, job=disk.job) else "it is another file by now"
    finally:
        if lock is not None:
            lock.release()


def _under_snapshots(repository: Repository) -> dict[str, str]:
    """Files that snapshots have among their disks or under one: path to a snapshot's name. In a thread of the store.

    Raises RepositoryError, also when one is damaged: nobody knows what that one needs."""
    found = {}
    for info in repository.snapshots():
        if info.head is None:
            raise RepositoryError(f"the snapshot {info.snapshot} is damaged")
        for disk in info.head.disks:
            for path in (disk.get("path"), *(each.get("path") for each in disk.get("chain") or ())):
                found[str(path)] = info.head.name
    return found


async def listed(agent: Agent, arguments: Any) -> list[dict[str, Any]]:
    """Every disk that a restore or a save made on this host and that is there, and who needs it."""
    disks = agent.restores.disks
    found, needs = [], await disks.look()
    for disk in needs.here:
        try:
            size = await asyncio.to_thread(os.lstat, disk.path)
        except FileNotFoundError:  # it went meanwhile
            continue
        wire = {key: value for key, value in dataclasses.asdict(disk).items() if key != "identity"}
        found.append({**wire, "allocated_bytes": size.st_blocks * 512, "needed": await disks.why_kept(disk, needs)})
    return found


async def remove(agent: Agent, arguments: RemoveArguments) -> dict[str, Any]:
    """Takes one away. Raises UsageError for a file that no restore and no save of this host made, Busy for one that is
    needed."""
    disks = agent.restores.disks
    disk = next((each for each in await disks.here() if each.path == arguments.path), None)
    if disk is None:
        raise UsageError(
            f"no restore and no save of this host made {arguments.path}", hint="'vmferry disks' lists what is there"
        )
    why = await disks.remove(disk, force=arguments.force)
    if why:
        hint = "'vmferry disks' shows who needs which"
        raise Busy(f"{disk.path} stays: {why}", side="client", retry="after-fix", hint=hint)
    return {"path": disk.path, "removed": True}
