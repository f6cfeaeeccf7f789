"""The rescue tools of a simulated host: `fake_rescue` over the simulation's own connections."""

from __future__ import annotations

from vmferry.agent.machine import Machine
from vmferry.testing.fake_link import Link
from vmferry.testing.fake_rescue import FD_NAME, FakeRescue
from vmferry.testing.sim.kernel import Kernel, SimProcess
from vmferry.testing.sim.qemu import SimLink


class SimRescue(FakeRescue):
    """The tools of one agent process."""

    def __init__(self, kernel: Kernel, agent: SimProcess) -> None:
        self._kernel, self._agent = kernel, agent

    async def give(self, machine: Machine) -> Link:
        ours, qemus = self._kernel.pair("local", self._agent, self._agent, "rescue")
        descriptor = self._kernel.give(self._agent, qemus)
        await machine.execute("getfd", {"fdname": FD_NAME}, fds=(descriptor,))
        self._kernel.close(descriptor)
        return SimLink(self._agent, ours)
