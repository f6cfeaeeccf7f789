"""Copies of failed tries, and images that guests left: who is in the way of whom, and when one is let go."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmferry import limits
from vmferry.testing.fake_site import JumpClock, MakeSite, Site

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


async def gone(make_site: MakeSite, clock: JumpClock) -> tuple[Site, list[Path]]:
    """A guest that went with its disks, whose images here may be taken away at once; nobody tends them but the test."""
    site = await make_site("11.1", "11.1", clock=clock)
    paths = [site.directory / f"d{n}.img" for n in range(2)]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    await site.run_vm("d", more="".join(DISK.format(path=path) for path in paths))
    more: dict[str, Any] = {"keep-images-ms": 3_600_000}
    await site.migrate(vm="d", disks="copy", **more)
    await site.settle()
    kept = site.agents["a"].left_images
    kept._left = {path: replace(left, let_go_s=0.0) for path, left in kept._left.items()}
    return site, paths


def questions(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each VM that `b` is asked about from now on."""
    asked: list[str] = []
    link = site.agents["a"].peers.link("b")
    call = link.call

    async def counted(name: str, arguments: dict[str, Any], **more: Any) -> Any:
        if name == "peer-runs":
            asked.append(arguments["vm"])
        return await call(name, arguments, **more)

    monkeypatch.setattr(link, "call", counted)
    return asked


@pytest.mark.proves("S114")
async def test_a_guest_that_stands_elsewhere_is_asked_about_less_and_less(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = JumpClock()
    site, paths = await gone(make_site, clock)
    kept, machine = site.agents["a"].left_images, site.agents["b"].vms["d"].require_machine()
    await machine.execute("stop")
    asked = questions(site, monkeypatch)
    caplog.set_level(logging.INFO, "vmferry.agent")
    for _ in range(7200):  # two hours, second by second
        assert await kept.look(), "they are kept as long as it stands"
        clock.leap(1.0)
    hours = 2 * 3600 / limits.LEFT_IMAGE_ASK_S
    assert len(asked) <= 2 * (hours + math.log2(limits.LEFT_IMAGE_ASK_S) + 1)
    assert len([line for line in caplog.messages if "result=waits" in line]) == 2, "one line for each image"
    status = await site.command("a", "agent-status")
    assert [(each["path"], each["vm"]) for each in status["left_images"]] == [(str(path), "d") for path in paths]
    assert all("does not run on b" in each["waits"] for each in status["left_images"])
    await machine.execute("cont")
    clock.leap(limits.LEFT_IMAGE_ASK_S)
    assert not await kept.look()
    assert not any(path.exists() for path in paths)


@pytest.mark.proves("S114")
async def test_what_a_guest_left_that_nobody_knows_any_more_is_kept_and_said(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has moved on to a third host, say, or was stopped there: here nobody can find out."""
    clock = JumpClock()
    site, paths = await gone(make_site, clock)
    await site.command("b", "vm-stop", vm="d", force=True)
    asked, kept = questions(site, monkeypatch), site.agents["a"].left_images
    assert not await kept.look(), "there is an end of asking"
    clock.leap(2 * limits.LEFT_IMAGE_ASK_S)
    assert not await kept.look()
    assert asked == ["d", "d"]
    assert all(path.exists() for path in paths)
    told = (await site.command("a", "agent-status"))["left_images"]
    assert ["b does not have d any more" in each["waits"] for each in told] == [True, True]
    checks = (await site.command("a", "doctor"))["checks"]
    assert [c["ok"] for c in checks if str(paths[0]) in c["name"]] == [None]
