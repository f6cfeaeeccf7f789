"""Saves on a site of real agents with fake QEMUs: to begin one, to wait for it, and what must hold afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from vmferry.agent.save import SaveJob
from vmferry.agent.snapshot_sink import find
from vmferry.core.saving import SaveFact
from vmferry.engine.frozen import SnapshotWords, thaw
from vmferry.errors import from_wire
from vmferry.store.reader import SnapshotReader
from vmferry.store.repository import Repository
from vmferry.testing import fake_stream
from vmferry.testing.fake_site import SETTLE_S, MakeSite, Site

KEPT: dict[str, Any] = {"auto-dismiss": False}
HELD: dict[str, Any] = {"auto-finalize": False}
PRECOPY: dict[str, Any] = {"way": "precopy"}
DISK = '[[disk]]\npath = "{path}"\n'


async def begin(site: Site, name: str = "one", **more: Any) -> SaveJob:
    await site.command("a", "vm-save", vm="g", name=name, **more)
    job = site.agents["a"].saves.active("g")
    assert job is not None
    return job


async def ended(job: SaveJob) -> dict[str, Any]:
    async with asyncio.timeout(SETTLE_S):
        await job.ended.wait()
    return job.wire()


async def save(site: Site, name: str = "one", **more: Any) -> dict[str, Any]:
    return await ended(await begin(site, name, **more))


async def chore(site: Site, command: str, **arguments: Any) -> dict[str, Any]:
    """A job about the repository, to its end. Raises what it ended with."""
    wire = await chore_ended(site, (await site.command("a", command, **arguments))["job"])
    if wire["error"] is not None:
        raise from_wire(wire["error"])
    return wire


async def chore_ended(site: Site, job: str) -> dict[str, Any]:
    """How it ended."""
    found = site.agents["a"].chores.by_id(job)
    if found is not None:
        async with asyncio.timeout(SETTLE_S):
            await found.ended.wait()
            await asyncio.sleep(0)
    return dict(await site.command("a", "job-status", job=job))


async def until_fact(site: Site, job: SaveJob, fact: SaveFact) -> None:
    async with asyncio.timeout(SETTLE_S):
        while fact not in job.facts and not job.ended.is_set():
            await site._changes["a"].wait()
    assert fact in job.facts, job.wire()


def repository(site: Site) -> Repository:
    return site.agents["a"].snapshot_store.open_repository()


def names(site: Site) -> list[str]:
    return [info.head.name for info in repository(site).snapshots() if info.head is not None]


async def check_guest_runs(site: Site) -> None:
    """It runs, once, in the process in which it always was, and nothing of the save is left in its QEMU."""
    await site.check("a")
    machine = site.agents["a"].vms["g"].require_machine()
    on = {c["capability"] for c in await machine.execute("query-migrate-capabilities") if c["state"]}
    assert on <= {"events"}, on
    assert (await machine.execute("query-migrate-parameters"))["max-bandwidth"] != 1 << 40
    assert site.agents["a"].saves.active("g") is None


def check_snapshot(site: Site, name: str, *, way: str, run_state: str = "running") -> SnapshotWords:
    """The repository has it, with the last version of every page."""
    found = repository(site)
    info = find(found, name)
    assert info.snapshot == find(found, info.snapshot).snapshot
    with SnapshotReader(found, info.snapshot) as reader:
        pages = reader.read("pc.ram", 0, 64)
        assert [page.tobytes() for page in pages] == [fake_stream.page(number) for number in range(64)]
        assert not np.any(reader.read("pc.bios", 0, 4))
        state = thaw(reader.device_state)
        assert {each.idstr: each.body for each in state.devices} == fake_stream.devices(run_state)
        words = SnapshotWords.from_wire(reader.head.metadata)
    assert (words.vm, words.host, words.way) == ("g", "a", way)
    assert words.machine == "pc-q35-7.2"
    assert words.definition is not None
    assert words.definition["name"] == "g"
    return words


async def with_disk(make_site: MakeSite, version: str = "11.1") -> tuple[Site, Path]:
    site = await make_site(version)
    image = site.directory / "h.img"
    image.write_bytes(bytes(1 << 16))
    await site.run_vm("h", more=DISK.format(path=image))
    return site, image


async def begin_h(site: Site, name: str = "one") -> SaveJob:
    await site.command("a", "vm-save", vm="h", name=name, disks="external-snapshot")
    job = site.agents["a"].saves.active("h")
    assert job is not None
    return job
