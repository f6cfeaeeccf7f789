"""The commands of QEMU that vmferry uses, typed; nothing generic.

All take the client first and `deadline_s` last, and raise what `QmpClient.execute` raises. `yank`,
`migrate_pause` and `migrate_recover` are always sent out-of-band: they must get through when the main loop of
QEMU hangs, which is when they are needed.

Rule 1: a function here sends one command and reads one answer; it decides nothing and retries nothing.
Rule 2: optional arguments that are None are not sent, so that older QEMUs are not asked for what they lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vmferry import limits
from vmferry.qmp import info
from vmferry.qmp.info import BlockNode, CpuDefinition, Kvm, Machine, MigrateInfo, RunState, Version

_DEADLINE_S = limits.QMP_DEADLINE_S

# What `yank` cuts: the migration's channel, whichever it is.
YANK_MIGRATION: Mapping[str, Any] = {"type": "migration"}


class Qmp(Protocol):
    """What these functions need of a client: `QmpClient`, or the simulator's."""

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        deadline_s: float = _DEADLINE_S,
        fds: Sequence[int] = (),
    ) -> Any: ...


# --- what is ---


async def query_version(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> Version:
    """QEMU's version."""
    return info.version(await qmp.execute("query-version", deadline_s=deadline_s))


async def query_status(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> RunState:
    """Whether the guest's CPUs run, and the state's name."""
    return info.run_state(await qmp.execute("query-status", deadline_s=deadline_s))


async def query_migrate(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> MigrateInfo:
    """The migration as this side sees it."""
    return info.migrate_info(await qmp.execute("query-migrate", deadline_s=deadline_s))


async def query_migrate_capabilities(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> dict[str, bool]:
    """Every capability that this QEMU knows, on or off."""
    return info.capabilities(await qmp.execute("query-migrate-capabilities", deadline_s=deadline_s))


async def query_migrate_parameters(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> dict[str, Any]:
    """Every parameter that this QEMU knows, by its QMP name."""
    return dict(await qmp.execute("query-migrate-parameters", deadline_s=deadline_s))


async def query_machines(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> tuple[Machine, ...]:
    """The machine types."""
    return info.machines(await qmp.execute("query-machines", deadline_s=deadline_s))


async def query_cpu_definitions(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> tuple[CpuDefinition, ...]:
    """The CPU models; which can run depends on the accelerator in use."""
    return info.cpu_definitions(await qmp.execute("query-cpu-definitions", deadline_s=deadline_s))


async def query_kvm(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> Kvm:
    """Whether KVM is in use."""
    return info.kvm(await qmp.execute("query-kvm", deadline_s=deadline_s))


async def query_block(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> list[dict[str, Any]]:
    """The guest's drives, as QEMU says it."""
    return list(await qmp.execute("query-block", deadline_s=deadline_s))


async def query_named_block_nodes(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> tuple[BlockNode, ...]:
    """The open images, without the details of each image's backing chain."""
    raw = await qmp.execute("query-named-block-nodes", {"flat": True}, deadline_s=deadline_s)
    return info.block_nodes(raw)


async def query_qmp_schema(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> list[dict[str, Any]]:
    """Everything that this QEMU's QMP can say; 0.25 MB."""
    return list(await qmp.execute("query-qmp-schema", deadline_s=deadline_s))


async def query_yank(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> list[dict[str, Any]]:
    """What `yank` could cut now. Out-of-band."""
    return list(await qmp.execute("query-yank", oob=True, deadline_s=deadline_s))


# --- the guest ---


async def cont(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> None:
    """Run the guest's CPUs."""
    await qmp.execute("cont", deadline_s=deadline_s)


async def stop(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> None:
    """Stop the guest's CPUs. Never for a destination in postcopy: there it may hang until pages come."""
    await qmp.execute("stop", deadline_s=deadline_s)


async def quit(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> None:
    """End QEMU. It answers first and then goes; wait for its process to know that it is gone."""
    await qmp.execute("quit", deadline_s=deadline_s)


# --- migration: options ---


async def migrate_set_capabilities(
    qmp: Qmp, capabilities: Mapping[str, bool], *, deadline_s: float = _DEADLINE_S
) -> None:
    """Set all of these or, when one is refused, none."""
    wanted = [{"capability": name, "state": state} for name, state in capabilities.items()]
    await qmp.execute("migrate-set-capabilities", {"capabilities": wanted}, deadline_s=deadline_s)


async def migrate_set_parameters(qmp: Qmp, parameters: Mapping[str, Any], *, deadline_s: float = _DEADLINE_S) -> None:
    """Set all of these or, when one is refused, none. Values are in QMP's units."""
    await qmp.execute("migrate-set-parameters", parameters, deadline_s=deadline_s)


# --- migration: course ---


async def migrate(
    qmp: Qmp,
    uri: str | None = None,
    *,
    channels: Sequence[Mapping[str, Any]] | None = None,
    resume: bool | None = None,
    deadline_s: float = _DEADLINE_S,
) -> None:
    """Begin to send the guest, or with `resume` take a broken postcopy up again. `channels`: QEMU 8.2."""
    arguments = _given(uri=uri, channels=channels, resume=resume)
    await qmp.execute("migrate", arguments, deadline_s=deadline_s)


async def migrate_incoming(
    qmp: Qmp,
    uri: str | None = None,
    *,
    channels: Sequence[Mapping[str, Any]] | None = None,
    exit_on_error: bool | None = None,
    deadline_s: float = _DEADLINE_S,
) -> None:
    """Begin to receive (after `-incoming defer`). `exit_on_error` False keeps a failed one: QEMU 9.1."""
    arguments = _given(uri=uri, channels=channels)
    if exit_on_error is not None:
        arguments["exit-on-error"] = exit_on_error
    await qmp.execute("migrate-incoming", arguments, deadline_s=deadline_s)


async def migrate_cancel(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> None:
    """Ask to cancel; that it was accepted does not mean that it is done."""
    await qmp.execute("migrate_cancel", deadline_s=deadline_s)


async def migrate_continue(qmp: Qmp, state: str, *, deadline_s: float = _DEADLINE_S) -> None:
    """Go on from the pause before switchover; `state` is the status that the caller believes is current."""
    await qmp.execute("migrate-continue", {"state": state}, deadline_s=deadline_s)


async def migrate_start_postcopy(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> None:
    """Ask for the switch to postcopy."""
    await qmp.execute("migrate-start-postcopy", deadline_s=deadline_s)


async def migrate_pause(qmp: Qmp, *, deadline_s: float = _DEADLINE_S) -> None:
    """Break an active postcopy on purpose, so that it can be recovered. Out-of-band."""
    await qmp.execute("migrate-pause", oob=True, deadline_s=deadline_s)


async def migrate_recover(qmp: Qmp, uri: str, *, deadline_s: float = _DEADLINE_S) -> None:
    """Listen at `uri` for the source of a broken postcopy. Out-of-band."""
    await qmp.execute("migrate-recover", {"uri": uri}, oob=True, deadline_s=deadline_s)


async def yank(
    qmp: Qmp,
    instances: Sequence[Mapping[str, Any]] = (YANK_MIGRATION,),
    *,
    deadline_s: float = _DEADLINE_S,
) -> None:
    """Cut these channels at once, whoever hangs in them. Refused when one does not exist. Out-of-band."""
    arguments = {"instances": [dict(instance) for instance in instances]}
    await qmp.execute("yank", arguments, oob=True, deadline_s=deadline_s)


# --- descriptors, objects, images ---


async def getfd(qmp: Qmp, fdname: str, fd: int, *, deadline_s: float = _DEADLINE_S) -> None:
    """Give QEMU a copy of `fd` under a name, for `fd:NAME`; the caller's own stays open."""
    await qmp.execute("getfd", {"fdname": fdname}, fds=(fd,), deadline_s=deadline_s)


async def closefd(qmp: Qmp, fdname: str, *, deadline_s: float = _DEADLINE_S) -> None:
    """Close a named descriptor that nothing has taken."""
    await qmp.execute("closefd", {"fdname": fdname}, deadline_s=deadline_s)


async def object_add(
    qmp: Qmp,
    qom_type: str,
    object_id: str,
    properties: Mapping[str, Any] | None = None,
    *,
    deadline_s: float = _DEADLINE_S,
) -> None:
    """Make a QOM object, such as TLS credentials."""
    arguments = {**(properties or {}), "qom-type": qom_type, "id": object_id}
    await qmp.execute("object-add", arguments, deadline_s=deadline_s)


async def object_del(qmp: Qmp, object_id: str, *, deadline_s: float = _DEADLINE_S) -> None:
    """Remove a QOM object. Refused while it is in use."""
    await qmp.execute("object-del", {"id": object_id}, deadline_s=deadline_s)


async def blockdev_set_active(
    qmp: Qmp, active: bool, *, node_name: str | None = None, deadline_s: float = _DEADLINE_S
) -> None:
    """Take or give up the images (and their locks): one node, or all. QEMU 10.0."""
    arguments: dict[str, Any] = {"active": active}
    if node_name is not None:
        arguments["node-name"] = node_name
    await qmp.execute("blockdev-set-active", arguments, deadline_s=deadline_s)


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
