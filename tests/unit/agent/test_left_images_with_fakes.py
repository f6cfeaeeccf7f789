"""Copies of failed tries, and images that guests left: who is in the way of whom, and when one is let go."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.testing.fake_site import MakeSite, Site

DISK = '[[disk]]\npath = "{path}"\nshared = false\n'
SIZE = 3 << 20


async def after_a_failed_try(make_site: MakeSite) -> tuple[Site, list[Path]]:
    """A guest with two disks whose copies were whole when its move failed: they are kept. The site, and they."""
    site = await make_site("11.1", "11.1")
    paths = [site.directory / f"d{n}.img" for n in range(2)]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    await site.run_vm("d", more="".join(DISK.format(path=path) for path in paths))
    site.director.script("a", {"drain": "fail"})
    failed = await site.migrate(vm="d", disks="copy")
    await site.settle()
    assert failed.wire()["outcome"] == "source"
    site.director.script("a")
    copies = [site.disks("b") / path.name for path in paths]
    assert sorted(site.agents["b"].left_images._left) == [str(path) for path in copies]
    return site, copies


async def started_anew(site: Site) -> None:
    """Its QEMU is another one now: nobody counts any more what was written since the try."""
    await site.command("a", "vm-stop", vm="d", force=True)
    await site.command("a", "vm-run", path=str(site.directory / "d.toml"))


@pytest.mark.proves("S96", "S114")
async def test_a_copy_that_nobody_counts_for_is_not_in_the_way(make_site: MakeSite) -> None:
    site, copies = await after_a_failed_try(make_site)
    await started_anew(site)
    before = [path.stat().st_ino for path in copies]
    plan = await site.command("a", "vm-plan", vm="d", destination="b", mode="precopy", disks="copy")
    assert plan["possible"], plan
    assert [path.stat().st_ino for path in copies] == before, "a plan changes nothing"
    again = await site.migrate(vm="d", disks="copy")
    await site.settle()
    wire = again.wire()
    assert wire["outcome"] == "destination", wire
    assert [row["type"] for row in wire["disks"]] == ["mirror"] * 2, "all of them went"
    assert site.agents["b"].left_images._left == {}
    await site.check("b", "d")


@pytest.mark.parametrize("what", ["touched", "another guest's"])
async def test_a_copy_that_may_be_somebodys_is_not_taken_away(make_site: MakeSite, what: str) -> None:
    site, copies = await after_a_failed_try(make_site)
    await started_anew(site)
    vm = "d"
    if what == "touched":
        copies[1].write_text("somebody's")
    else:
        vm, twin = "e", site.directory / "twin" / "d1.img"
        twin.parent.mkdir()
        twin.write_bytes(bytes(SIZE))
        await site.run_vm("e", more=DISK.format(path=twin))
    plan = await site.command("a", "vm-plan", vm=vm, destination="b", mode="precopy", disks="copy")
    assert [o["code"] for o in plan["objections"] if o["weight"] == "blocker"] == ["disk-copy-exists"]
    attempt = await site.migrate(vm=vm, disks="copy")
    await site.settle()
    assert str(copies[1]) in str(attempt.wire()["error"])
    assert all(path.exists() for path in copies)
