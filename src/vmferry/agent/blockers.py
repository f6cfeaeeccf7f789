"""The blockers of the VMs of one host: those of people are kept here and in the journal, all others are computed.

Rule 1: a blocker is durable before it counts, and is removed durably before it does not.
Rule 2: one that a person holds goes along when the VM moves; one against migration never has to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.core import blockers as core
from vmferry.core.blockers import Blocker, Operation
from vmferry.errors import Blocked, Busy, UsageError
from vmferry.jobs.journal import Entry
from vmferry.vm import spec as vm_spec

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent


@dataclass(frozen=True, slots=True, kw_only=True)
class AddArguments:
    """`blocker-add`. The same name again replaces its operation and reason."""

    vm: str
    name: str
    operation: Operation
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveArguments:
    """`blocker-remove`."""

    vm: str
    name: str


class Blockers:
    """Owned by the agent."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._held: dict[str, dict[str, Blocker]] = {}

    def held(self, vm: str) -> tuple[Blocker, ...]:
        """Those that people hold."""
        return tuple(self._held.get(vm, {}).values())

    def all_of(self, vm: str, qemu_reasons: Iterable[str] = ()) -> tuple[Blocker, ...]:
        """Everything that speaks against an operation on the VM now."""
        found = [*self.held(vm), *core.of_qemu(qemu_reasons)]
        attempt, place = self.agent.attempts.get(vm), self.agent.place_of(vm)
        if attempt is not None and not attempt.ended.is_set():
            found += core.of_migration(attempt.wanted.destination, attempt.job, attempt.measured.started_s)
        if place is not None and not place.ended.is_set():
            found += core.of_arrival(place.place.source, place.job, place.facts.entries[0].at_s)
        back = self.agent.restores.active(vm)
        if back is not None:
            found += core.of_restore(back.wanted.name, back.job, back.wanted.wanted_s)
        save = self.agent.saves.active(vm)
        if save is not None:
            found += core.of_save(save.wanted.name, save.job, save.started_s)
        return tuple(found)

    def require(self, vm: str, operation: Operation) -> None:
        """Raises Blocked, citing it, while a person holds a blocker against the operation; nothing was done."""
        blocker = core.first(self.held(vm), operation)
        if blocker is not None:
            raise Blocked(
                f"{vm}: {operation.value} is blocked by {blocker.name}: {blocker.reason}",
                hint=f"'vmferry status {vm}' lists blockers; remove it: vmferry unblock {vm} {blocker.name}",
            )

    def require_free(self, vm: str, operation: Operation, *, people: bool = True) -> None:
        """Busy, citing it, while a migration holds one; with `people` also Blocked, as `require`."""
        if people:
            self.require(vm, operation)
        blocker = core.first((one for one in self.all_of(vm) if not one.by_people), operation)
        if blocker is not None:
            raise Busy(f"{vm} {blocker.reason.removeprefix('it ')}")

    async def add(self, arguments: AddArguments) -> Blocker:
        """Raises UsageError, and Busy for a VM that is on its way: whoever keeps it in the end can be told then."""
        if not vm_spec.is_name(arguments.name):
            raise UsageError(f"{arguments.name!r} is no name: 1 to 64 letters, digits, dots, dashes or underscores")
        if not arguments.reason.strip():
            raise UsageError("a blocker needs a reason that a person can read")
        self._require_settled(arguments.vm)
        mine = self._held.get(arguments.vm, {})
        if arguments.name not in mine and len(mine) >= limits.BLOCKERS_MAX:
            raise Busy(f"{arguments.vm} has {len(mine)} blockers already", side="client", hint="remove some")
        blocker = core.held(
            arguments.operation, arguments.name, arguments.reason.strip(), self.agent.clock.wall_s()
        )  # fmt: skip
        await self._keep(arguments.vm, blocker)
        return blocker

    async def remove(self, arguments: RemoveArguments) -> None:
        """Raises UsageError for a name that nobody holds one under."""
        mine = self._held.get(arguments.vm, {})
        if arguments.name not in mine:
            raise UsageError(f"{arguments.vm} has no blocker {arguments.name!r} (it has: {', '.join(mine) or 'none'})")
        await self.agent.journal.append(Entry.UNBLOCKED, arguments.vm, {"name": arguments.name})
        mine.pop(arguments.name, None)

    async def take_along(self, vm: str, wires: Iterable[dict[str, Any]]) -> None:
        """The VM has arrived with these."""
        for wire in wires:
            await self._keep(vm, _from_journal(wire))

    def restore(self, vm: str, bodies: Iterable[dict[str, Any]]) -> None:
        """What the journal has."""
        self._held[vm] = {str(body["name"]): _from_journal(body) for body in bodies}

    def forget(self, vm: str) -> None:
        """This host does not keep the VM any more."""
        self._held.pop(vm, None)

    def wire(self, vm: str) -> list[dict[str, Any]]:
        """Those that people hold, as they go along."""
        return [_to_journal(blocker) for blocker in self.held(vm)]

    async def _keep(self, vm: str, blocker: Blocker) -> None:
        await self.agent.journal.append(Entry.BLOCKED, vm, _to_journal(blocker))
        self._held.setdefault(vm, {})[blocker.name] = blocker

    def _require_settled(self, vm: str) -> None:
        blocker = core.first(self.all_of(vm), Operation.SNAPSHOT)
        if blocker is not None and not blocker.by_people:
            raise Busy(f"{vm}: {blocker.reason}; a blocker can be held when {blocker.until}")


def _to_journal(blocker: Blocker) -> dict[str, Any]:
    return {
        "name": blocker.name,
        "operation": blocker.operation.value,
        "reason": blocker.reason,
        "since_s": blocker.since_s,
    }


def _from_journal(body: dict[str, Any]) -> Blocker:
    return core.held(Operation(body["operation"]), str(body["name"]), str(body["reason"]), float(body["since_s"]))


async def add(agent: Agent, arguments: AddArguments) -> dict[str, Any]:
    """The command: a person or a tool holds a blocker."""
    return {"vm": arguments.vm, **(await agent.blockers.add(arguments)).to_wire()}


async def remove(agent: Agent, arguments: RemoveArguments) -> dict[str, Any]:
    """The command: they do not any more."""
    await agent.blockers.remove(arguments)
    return {"vm": arguments.vm, "name": arguments.name, "removed": True}
