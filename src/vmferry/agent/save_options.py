"""The migration options of a guest's QEMU while it is saved, and those that it had before.

Rule 1: what is changed is remembered durably before it is changed, and read back before anything is sent.
Rule 2: whether a background save is possible is QEMU's to say: it looks at its kernel and at the guest's memory when it
        is told the capability, and refuses in words.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from vmferry.agent.machine import Machine
from vmferry.agent.wants import SaveWanted
from vmferry.core import hazards
from vmferry.errors import PlanRefused, QemuError
from vmferry.qmp.errors import QmpCommandError

log = logging.getLogger("vmferry.agent")

Remember = Callable[[dict[str, Any]], Awaitable[None]]

BACKGROUND: Final = "background-snapshot"
_DOWNTIME_MS: Final = 300
"""QEMU's own default, whatever a migration before has left."""
_PARAMETERS: Final[dict[str, Any]] = {
    "max-bandwidth": 1 << 40, "downtime-limit": _DOWNTIME_MS, "tls-creds": "", "tls-hostname": "", "mode": "normal",
}  # fmt: skip
"""The stream goes through a socket of this host, as fast as it is taken."""


class SaveOptions:
    """One save's options. `before`: what the journal has, for a save that an earlier agent began."""

    def __init__(self, wanted: SaveWanted, before: Mapping[str, Any]) -> None:
        self._wanted = wanted
        self._before = dict(before)
        self.way = ""
        """`precopy` or `background`, once it is decided."""

    async def apply(self, machine: Machine, remember: Remember) -> None:
        """QEMU is ready for `migrate` when this returns. Raises PlanRefused for a way that it does not offer, and
        QemuError when it keeps another option; `put_back` undoes what was done."""
        capabilities = await _capabilities(machine)
        parameters = await machine.execute("query-migrate-parameters")
        names = [name for name in capabilities if name != "events"]
        wanted = {name: value for name, value in _PARAMETERS.items() if name in parameters}
        self._before = {name: capabilities[name] for name in names} | {name: parameters[name] for name in wanted}
        await remember(self._before)
        await _switch(machine, {name: False for name in names if capabilities[name]})
        on = {"events"} if capabilities.get("events") else set()
        if await self._is_background(machine, capabilities):
            self.way = "background"
            on |= {BACKGROUND}
        else:
            self.way = "precopy"
            waits = {"pause-before-switchover"} if self._wanted.keeps_disks or not self._wanted.auto_finalize else set()
            await _switch(machine, dict.fromkeys({"return-path", *waits}, True))
            on |= {"return-path", *waits}
        await machine.execute("migrate-set-parameters", wanted)
        found = {name for name, state in (await _capabilities(machine)).items() if state}
        if found != on:
            different = ", ".join(sorted(found ^ on))
            raise QemuError(f"{machine.vm}: QEMU does not take the options of a save: {different}", retry="no")

    async def _is_background(self, machine: Machine, capabilities: Mapping[str, bool]) -> bool:
        """Raises PlanRefused if it has to be one and cannot."""
        wanted = self._wanted
        if wanted.way == "precopy" or wanted.pause or wanted.keeps_disks or not wanted.auto_finalize:
            return False
        if not wanted.running_before:
            return False  # QEMU 7.2 starts its guest after the first moment, also one that was paused
        reason = f"QEMU {machine.version_text} has no {BACKGROUND}"
        if hazards.hangs_after_broken_background(machine.version):
            reason = f"under QEMU {machine.version_text} a guest may hang for ever when that breaks off"
        elif BACKGROUND in capabilities:
            try:
                await _switch(machine, {BACKGROUND: True})
            except QmpCommandError as error:
                reason = error.desc
            else:
                return True
        if wanted.way == "background":
            raise PlanRefused(
                f"{machine.vm} cannot be saved in the background: {reason}", side="source", hint="say --way precopy"
            )
        log.info("vm=%s save way=precopy because=%r", machine.vm, reason)
        return False

    async def put_back(self, machine: Machine | None, fd_name: str) -> None:
        """What QEMU had before. Trouble here is a line in the log: the next migration sets its own options."""
        if machine is None or machine.is_gone:
            return
        try:
            with contextlib.suppress(QmpCommandError):  # a descriptor that QEMU never used would stay open
                await machine.execute("closefd", {"fdname": fd_name})
            if not self._before:
                return
            now = await _capabilities(machine)
            changed = {name: self._before[name] for name in now if self._before.get(name, now[name]) != now[name]}
            await _switch(machine, {name: state for name, state in changed.items() if not state})
            await _switch(machine, {name: state for name, state in changed.items() if state})
            values = {name: value for name, value in self._before.items() if name in _PARAMETERS}
            await machine.execute("migrate-set-parameters", values)
        except QemuError as error:
            log.warning("vm=%s save effect=put-options-back result=%s", machine.vm, error)


async def _capabilities(machine: Machine) -> dict[str, bool]:
    return {str(c["capability"]): bool(c["state"]) for c in await machine.execute("query-migrate-capabilities")}


async def _switch(machine: Machine, states: Mapping[str, bool]) -> None:
    if states:
        listed = [{"capability": name, "state": state} for name, state in states.items()]
        await machine.execute("migrate-set-capabilities", {"capabilities": listed})
