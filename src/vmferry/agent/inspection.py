"""`vm-inspect`: how a guest stands on both hosts, said side by side, and the one action that follows. Changes nothing.

Theory of operation
-------------------
The agent that conducts the VM's migration asks its own QEMU and the other agent (`peer-inspect`), which asks its QEMU.
What cannot be asked is None, which reads 'not known'. The verdict is that of the row that holds: the same row that
decides what the agents do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmferry.agent.machine import Machine
from vmferry.agent.source import SourceAttempt
from vmferry.core.copies import WORDS, complete_copies
from vmferry.core.status import derive_destination, derive_source
from vmferry.core.view import source_view
from vmferry.errors import QemuError, UnknownVm, VmferryError
from vmferry.vm import image_locks

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

QEMU_S = 1.0
"""A QEMU whose main loop hangs is said to be silent."""
PEER_S = 4.0
LOCKS_S = 2.0


async def qemu_side(host: str, machine: Machine | None) -> dict[str, Any]:
    """What one host's QEMU says. Never raises for trouble of the world's."""
    side: dict[str, Any] = {"host": host, "process": "none", "pid": None, "status": None, "run_state": None}
    if machine is None:
        return side
    side |= {"pid": machine.pid, "process": "gone" if machine.is_gone else "alive"}
    if machine.is_gone:
        return side
    try:
        side["status"] = (await machine.migration(deadline_s=QEMU_S)).get("status", "none")
        side["run_state"] = await machine.run_state(deadline_s=QEMU_S)
    except QemuError as error:
        side |= {"process": "silent", "trouble": str(error)}
    return side


async def disks(host: str, paths: Iterable[str]) -> list[dict[str, Any]]:
    """Who has each image, as seen from this host."""

    def look() -> list[dict[str, Any]]:
        found = []
        for path in paths:
            line: dict[str, Any] = {"path": path, "seen_from": host, "writers": None}
            line |= {"forbidden_by": None, "elsewhere": None}
            try:
                locks = image_locks.image_locks(path)
                line["writers"] = [{"pid": w.pid, "command": w.command} for w in locks.writers]
                forbids = [holder for holder in locks.holders if "write" in holder.forbids and not holder.is_writer]
                line["forbidden_by"] = [{"pid": holder.pid, "command": holder.command} for holder in forbids]
                line["elsewhere"] = None if locks.foreign is None else "write" in locks.foreign
            except OSError as error:
                line["trouble"] = str(error)
            found.append(line)
        return found

    try:
        async with asyncio.timeout(LOCKS_S):
            return await asyncio.to_thread(look)
    except TimeoutError:
        return [{"path": path, "seen_from": host, "writers": None, "elsewhere": None, "trouble": "no answer"}
                for path in paths]  # fmt: skip


async def here(agent: Agent, vm: str, job: str) -> dict[str, Any]:
    """This host's side of a job, for the agent that conducts it: a place, or a guest that has arrived."""
    name = agent.config.name
    place, kept = agent.places.get(job), agent.vms.get(vm)
    if place is not None and not place.ended.is_set():
        side = await qemu_side(name, place.machine)
        row = place.row()
        side |= {"row": row.label, "derived": derive_destination(place.facts).status.value}
        side["frozen"] = place.freezer is not None
    else:
        side = await qemu_side(name, kept.machine if kept else None)
        side |= {"row": None, "derived": None}
    paths = kept.definition.writable_paths() if kept else ()
    if place is not None and place.machine is not None and not paths:
        paths = tuple(str(disk["path"]) for disk in place.place.definition.get("disks", ()) if not disk.get("readonly"))
    side["disks"] = await disks(name, paths)
    return side


async def _there(agent: Agent, attempt: SourceAttempt) -> dict[str, Any]:
    host = attempt.wanted.destination
    silent = {"host": host, "process": None, "pid": None, "status": None, "run_state": None, "row": None}
    try:
        question = {"vm": attempt.vm, "job": attempt.job}
        return dict(await agent.peers.link(host).call("peer-inspect", question, deadline_s=PEER_S))
    except VmferryError as error:
        return {**silent, "trouble": str(error)}


async def inspect(agent: Agent, vm: str) -> dict[str, Any]:
    """The pair, where the whole guest is, the row, and the action. Raises UnknownVm."""
    attempt, kept, name = agent.attempts.get(vm), agent.vms.get(vm), agent.config.name
    if attempt is None or attempt.ended.is_set():
        if kept is None:
            raise UnknownVm(f"{name} has no VM named {vm} and conducts no migration of it")
        side = await qemu_side(name, kept.machine)
        side["disks"] = await disks(name, kept.definition.writable_paths())
        return {
            "vm": vm,
            "job": None,
            "source": side,
            "destination": None,
            "complete": "source",
            "row": None,
            "outcome": None,
            "action": "none needed: it has no migration that is not settled",
            "sentence": f"{vm} is on {name} and has no migration that is not settled.",
        }
    mine, theirs = await asyncio.gather(qemu_side(name, attempt.machine), _there(agent, attempt))
    mine["disks"] = await disks(name, attempt.kept.definition.writable_paths())
    row, view = attempt.row(), source_view(attempt.facts, attempt.readings)
    mine |= {"row": row.label, "derived": derive_source(attempt.facts).status.value}
    copies = complete_copies(view)
    action = (attempt.fix or row.action or "none needed: it goes on by itself").replace("NAME", vm)
    return {
        "vm": vm,
        "job": attempt.job,
        "source": mine,
        "destination": theirs,
        "view": {name: getattr(view, name).value for name in view.__slots__},
        "complete": copies.value,
        "row": row.label,
        "outcome": row.outcome.value,
        "why": row.why,
        "action": action,
        "remedy": row.remedy.value if row.remedy else None,
        "trouble": attempt.trouble,
        "sentence": f"The whole guest is {WORDS[copies]}.",
    }
