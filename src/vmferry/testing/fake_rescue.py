"""The rescue tools for fake QEMUs: the stand-ins of `engine` speak QEMU's stream, these speak the fakes' own.

They ask `core.rescue` and demand the proof as the product's tools do, and lead the fake to its end by the same
commands: a descriptor, `migrate` or `migrate` with `resume`, and somebody who answers at the other end.
"""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod

from vmferry.agent import rescue
from vmferry.agent.machine import Machine
from vmferry.core.rescue import NeverRan, Tool, ended_well, has_settled
from vmferry.errors import QemuError, RescueRefused
from vmferry.testing.fake_link import Link, LinkLost, from_descriptor

FD_NAME = "vmferry-rescue"
SETTLE_S = 30.0


class FakeRescue(ABC):
    """The tools, whatever carries the connection."""

    @abstractmethod
    async def give(self, machine: Machine) -> Link:
        """Hands one end of a connection to the QEMU under FD_NAME; the other one is ours."""

    async def bring_back(
        self, machine: Machine, proof: NeverRan, *, then_run: bool, tell: rescue.OnProgress
    ) -> rescue.RescueReport:
        """As `agent.rescue.bring_back`."""
        answer = await rescue.ask(Tool.BRING_BACK, machine)
        _require(machine, proof)
        if answer.pause_first:
            await rescue.pause(machine, Tool.BRING_BACK)
        return await self._lead_out(machine, proof, Tool.BRING_BACK, {"resume": True}, then_run=then_run)

    async def throw_away(
        self, machine: Machine, proof: NeverRan, *, then_run: bool, tell: rescue.OnProgress
    ) -> rescue.RescueReport:
        """As `agent.rescue.throw_away`."""
        await rescue.ask(Tool.THROW_AWAY, machine)
        _require(machine, proof)
        on = [name for name, state in (await rescue.capabilities(machine)).items() if state and name != "events"]
        await _switch(machine, on, to=False)
        try:
            return await self._lead_out(machine, proof, Tool.THROW_AWAY, {}, then_run=then_run)
        finally:
            await _switch(machine, on, to=True)

    async def _lead_out(
        self, machine: Machine, proof: NeverRan, tool: Tool, more: dict[str, bool], *, then_run: bool
    ) -> rescue.RescueReport:
        begun_s = machine.clock.now_s()
        link = await self.give(machine)
        standing_in = asyncio.create_task(_answer_everything(link), name="stand-in")
        try:
            await machine.execute("migrate", {"uri": f"fd:{FD_NAME}", **more})
            word = await rescue.until_word(
                machine, lambda said: has_settled(said) and said != "postcopy-paused", deadline_s=SETTLE_S
            )
        finally:
            standing_in.cancel()
            await asyncio.gather(standing_in, return_exceptions=True)
            link.close()
        if not ended_well(word):
            raise QemuError(f"{machine.vm}: QEMU's migration ended as {word}", guest="paused")
        if then_run:
            _require(machine, proof)
            await machine.execute("cont")
        ms = (machine.clock.now_s() - begun_s) * 1000
        return rescue.RescueReport(tool.value, machine.vm, str(word), await machine.run_state(), ms, 0, 0)


class SocketRescue(FakeRescue):
    """For fakes that are processes."""

    async def give(self, machine: Machine) -> Link:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await machine.execute("getfd", {"fdname": FD_NAME}, fds=(theirs.fileno(),))
            return await from_descriptor(ours.detach())


async def _switch(machine: Machine, names: list[str], *, to: bool) -> None:
    states = [{"capability": name, "state": to} for name in names]
    await machine.execute("migrate-set-capabilities", {"capabilities": states})


def _require(machine: Machine, proof: NeverRan) -> None:
    objection = proof.objection()
    if objection:
        raise RescueRefused(f"{machine.vm} may not go back: {objection}", guest="unknown")


async def _answer_everything(link: Link) -> None:
    """Says yes to whatever a source needs to hear until it is completed."""
    try:
        while True:
            message = await link.receive()
            match message["kind"]:
                case "resume":
                    link.send("resumed", has_all=True)  # as the stand-in's bitmaps say
                case "device" | "pages":
                    link.send("result", ok=True)
                case _:
                    pass
    except LinkLost:
        return
