"""The simulator's QEMU keeps the contract that the real ones keep: the very same checks, in virtual time."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from vmferry.testing import contract, contract_pairs
from vmferry.testing.fake_profile import PROFILES
from vmferry.testing.sim.kernel import SimProcess, Socket
from vmferry.testing.sim.loop import pass_s
from vmferry.testing.sim.qemu import BOOT_S, SimQemu, connect_monitor
from vmferry.testing.sim.site import Script, Site

SAME = [("7.2", "7.2"), ("11.1", "11.1")]
MIXED = [("7.2", "11.1"), ("11.1", "7.2")]
CASES = [(*pair, check) for pair in (*SAME, *MIXED) for check in contract.CHECKS]


class SimEnd:
    """One end of a simulated connection, held by the tester."""

    def __init__(self, site: Site, tester: SimProcess, sock: Socket) -> None:
        self.sock = sock
        self._site, self._descriptor = site, site.kernel.give(tester, sock)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        self._site.kernel.close(self._descriptor)


class SimSide(contract_pairs.Side):
    """A simulated process."""

    def __init__(self, qemu: SimQemu) -> None:
        super().__init__()
        self.qemu = qemu

    async def kill(self) -> None:
        self.qemu.process.die()

    async def ended(self) -> int:
        async with asyncio.timeout(contract_pairs.DEADLINE_S):
            while not self.qemu.process.is_dead:  # noqa: ASYNC110 - the kernel tells agents, and a test may look
                await asyncio.sleep(0.01)
        assert self.qemu.process.status is not None
        return self.qemu.process.status


class SimPair(contract_pairs.Pair):
    """Over simulated connections."""

    def __init__(self, site: Site, testers: tuple[SimProcess, SimProcess], source: SimSide, other: SimSide) -> None:
        super().__init__(source, other)
        self._site, self._testers = site, testers

    def connected(self) -> tuple[SimEnd, SimEnd]:
        left, right = self._site.kernel.pair("stream", *self._testers, "contract")
        return SimEnd(self._site, self._testers[0], left), SimEnd(self._site, self._testers[1], right)

    def nbd_address(self) -> tuple[str, int]:
        return "b", 10809

    def held_back(self, far: contract_pairs.End) -> contract_pairs.End:
        path = self._site.net.path("stream", "b", "a")
        self._site.net.block(path)

        async def let_go() -> None:
            await self.may_answer.wait()
            self._site.net.unblock(path)

        self._testers[0].spawn(let_go(), "answers")
        return far

    def cut(self) -> None:
        assert isinstance(self.channel, SimEnd)
        self.channel.sock.shut("cut")


async def checked(site: Site, check: contract.Check) -> None:
    testers = site.kernel.start("a", "tester"), site.kernel.start("b", "tester")
    sides = []
    for host, tester, incoming in (("a", testers[0], False), ("b", testers[1], True)):
        directory = site.directory / host
        directory.mkdir()
        argv = contract_pairs.argv(Path("qemu"), directory, incoming=incoming)
        installed = site.hosts[host]
        qemu = SimQemu(
            site.kernel, host, argv, installed.profile, clock=installed.clock, script=Script(),
            told=lambda *_: None,
        )  # fmt: skip
        sides.append((SimSide(qemu), tester))
    await pass_s(2 * BOOT_S)
    for side, tester in sides:
        connecting = connect_monitor(
            site.kernel, tester, side.qemu, name="contract", on_event=side.on_event, deadline_s=10.0
        )
        side.use(await in_process(tester, connecting))
    pair = SimPair(site, testers, sides[0][0], sides[1][0])

    async def drive() -> None:
        await pair.source.execute("cont")
        await pair.source.until("RESUME")
        pair.source.forget()
        await check(pair)
        await pair.close()

    await in_process(testers[0], drive())


async def in_process(process: SimProcess, work: Coroutine[Any, Any, Any]) -> Any:
    return await process.spawn(work, "test")


@pytest.mark.parametrize(("source", "destination", "check"), CASES)
def test_the_simulators_qemu_keeps_the_contract(source: str, destination: str, check: str) -> None:
    assert {source, destination} <= PROFILES.keys()
    with tempfile.TemporaryDirectory(prefix="vf") as directory:
        site = Site.make(Path(directory), "contract", {"a": source, "b": destination}, 0.001)
        try:
            site.loop.run_until_complete(checked(site, contract.CHECKS[check]))
            assert site.loop.broken == []
        finally:
            site.kernel.end()
            site.loop.close()
