"""The fake QEMU keeps the contract that the real ones keep, and does what its script says beyond it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from vmferry.testing import contract, contract_pairs
from vmferry.testing.fake_director import Director
from vmferry.vm import probe_qemu

SAME = [("7.2", "7.2"), ("11.1", "11.1")]
MIXED = [("7.2", "11.1"), ("11.1", "7.2")]
CASES = [(*pair, check) for pair in SAME for check in contract.CHECKS]
CASES += [(*pair, check) for pair in MIXED for check in ("precopy", "postcopy", "cut_in_active")]


@pytest.fixture
async def director() -> AsyncIterator[Director]:
    with tempfile.TemporaryDirectory(prefix="vf") as directory:
        found = Director(Path(directory))
        await found.start()
        yield found
        await found.close()


def pair(
    director: Director, source: str = "11.1", destination: str = "11.1"
) -> Callable[[], AbstractAsyncContextManager[contract_pairs.Pair]]:
    programs = director.wrapper("a", source), director.wrapper("b", destination)
    return lambda: contract_pairs.pair_of(*programs, director.directory)


@pytest.mark.parametrize(("source", "destination", "check"), CASES)
async def test_the_fake_keeps_the_contract(director: Director, source: str, destination: str, check: str) -> None:
    async with pair(director, source, destination)() as both:
        await contract.CHECKS[check](both)
    director.never_two_ran()


async def test_a_script_holds_a_step_until_it_may_go_on(director: Director) -> None:
    async with pair(director)() as both:
        director.script("b", {"in-load": "hold"})
        await both.begin(postcopy=True, slow=True)
        await both.source.until("active")
        await both.source.execute("migrate-start-postcopy")
        await both.faster()
        await both.go_on()
        await director.reached("b", "in-load")
        assert await both.source.word() == "postcopy-device"
        assert await both.source.refused("migrate_cancel")
        director.go("b", "in-load")
        await both.source.until("completed")


async def test_a_link_cut_in_postcopy_is_recovered(director: Director) -> None:
    async with pair(director)() as both:
        director.script("a", {"pages": "hold"})
        await both.begin(postcopy=True, slow=True)
        await both.source.until("active")
        await both.source.execute("migrate-start-postcopy")
        await both.faster()
        await both.go_on()
        await director.reached("a", "pages")
        both.cut()
        director.script("a")
        await both.source.until("postcopy-paused")
        await both.destination.until("postcopy-paused")
        await both.again()
        await both.source.until("completed")
        await both.destination.until("completed")
    words = both.source.seen[both.source.seen.index("postcopy-paused") :]
    assert words == ["postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "postcopy-active", "completed"]


async def test_silence_in_the_switchover_ends_with_the_channel(director: Director) -> None:
    async with pair(director)() as both:
        director.script("a", {"device": "silent"})
        await both.begin()
        await both.go_on()
        await director.reached("a", "device")
        asked = asyncio.ensure_future(both.source.execute("query-status"))
        await both.source.execute("yank", {"instances": [{"type": "migration"}]}, oob=True)
        assert (await asked)["running"] in (True, False)
        await both.source.until("failed")
        assert both.source.seen[-3:] == ["failing", "RESUME", "failed"]


@pytest.mark.parametrize("profile", ["7.2", "11.1"])
async def test_the_probe_of_a_binary_takes_it_for_a_qemu(director: Director, profile: str) -> None:
    facts = await probe_qemu.qemu_facts(str(director.wrapper("a", profile)))
    assert ".".join(str(n) for n in facts.version[:2]) == profile
    assert facts.concrete_machine("q35") == f"pc-q35-{profile}"
    assert facts.postcopy
    assert facts.accelerators() == ("tcg",)


def test_a_script_may_come_from_a_file(tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"steps": {"start": "die"}}))
    environment = {**os.environ, "VMFERRY_FAKE_DIRECTOR": str(script)}
    command = [
        sys.executable,
        "-m",
        "vmferry.testing.fake_qemu",
        *contract_pairs.argv(Path("q"), tmp_path, incoming=False),
    ]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
