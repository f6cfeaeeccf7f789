"""Sites of two agents with fake QEMUs, for the tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from vmferry.agent.loop import AttemptLoop
from vmferry.clock import Clock
from vmferry.core.facts import Fact
from vmferry.testing.fake_site import MakeSite, Site
from vmferry.vm import probe_qemu
from vmferry.vm.probe_qemu import QemuFacts

_FACTS: dict[str, QemuFacts] = {}


@pytest.fixture
async def make_site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeSite]:
    """`await make_site("7.2", "11.1")` gives a site whose hosts a and b have these QEMUs, with the guest g on a."""
    sites: list[Site] = []
    note, ask = AttemptLoop.note, probe_qemu.qemu_facts

    def noting(self: AttemptLoop[Any], fact: Fact, **more: Any) -> None:
        before = self.facts
        note(self, fact, **more)
        if self.facts is not before:
            for site in sites:
                site.on_note(self, fact)

    async def asking(binary: str, **more: Any) -> QemuFacts:
        """One probe per version is enough: the programs are the same."""
        version = binary.rpartition("-")[2]
        if version not in _FACTS:
            _FACTS[version] = await ask(binary)
        return _FACTS[version]

    monkeypatch.setattr(AttemptLoop, "note", noting)
    monkeypatch.setattr(probe_qemu, "qemu_facts", asking)
    with tempfile.TemporaryDirectory(prefix="vf") as directory:

        async def make(
            source: str = "11.1", destination: str = "11.1", *, clock: Clock | None = None, **more: Any
        ) -> Site:
            site = Site(Path(directory), {"a": source, "b": destination}, clock=clock, **more)
            sites.append(site)
            await site.start()
            await site.run_vm()
            return site

        yield make
        for site in sites:
            await site.close()
