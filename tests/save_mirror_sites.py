"""Saves whose disks are copied, on a site of real agents with fake QEMUs: what must hold afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.save_sites import ended
from vmferry.agent.save import SaveJob
from vmferry.testing.fake_site import Site

MIRROR: dict[str, Any] = {"disks": "mirror"}
VERSIONS = ("7.2", "11.1")


async def begin(site: Site, name: str = "one", **more: Any) -> SaveJob:
    await site.command("a", "vm-save", vm="h", name=name, **{**MIRROR, **more})
    job = site.agents["a"].saves.active("h")
    assert job is not None
    return job


async def save(site: Site, name: str = "one", **more: Any) -> dict[str, Any]:
    return await ended(await begin(site, name, **more))


def stored(site: Site, name: str = "one") -> Path:
    return site.directory / f"h-disk0.{name}.stored.qcow2"


async def check_untouched(site: Site, image: Path) -> None:
    """The guest runs on its own disk, as ever, and QEMU has nothing of the save any more."""
    await site.check("a", "h")
    kept = site.agents["a"].vms["h"]
    assert kept.definition.writable_paths() == (str(image),)
    machine = kept.require_machine()
    assert await machine.execute("query-jobs") == []
    nodes = {node["node-name"] for node in await machine.execute("query-named-block-nodes", {"flat": True})}
    assert not {name for name in nodes if name.startswith("vmferry-")}
    (device,) = [each for each in await machine.execute("query-block") if each.get("inserted")]
    assert device["inserted"]["image"]["filename"] == str(image)
    assert await machine.run_state() == "running"


def left(site: Site) -> set[str]:
    """Everything beside the disk that a save may have made."""
    return {path.name for path in site.directory.glob("h-disk*")}


async def listed(site: Site) -> dict[str, str]:
    """Which copies are told, and who needs each."""
    return {Path(each["path"]).name: each["needed"] for each in await site.command("a", "restored-disks")}
