"""A guest whose disks are others than its definition names, or than its plan looked at: two real agents, fake QEMUs."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.core.facts import Fact
from vmferry.testing.fake_link import LinkLost, SocketLink
from vmferry.testing.fake_site import MakeSite

DISK = '[[disk]]\npath = "{path}"\nshared = false\n'


@pytest.mark.proves("S53", "S96")
@pytest.mark.parametrize("disks", ["copy", "shared"])
@pytest.mark.parametrize("restarts", [False, True])
async def test_a_guest_that_writes_to_another_image_by_then_stays(
    make_site: MakeSite, disks: str, *, restarts: bool
) -> None:
    """1. a snapshot by a second monitor: the guest writes to an overlay  2. the destination has opened the base."""
    site = await make_site()
    paths, overlay = [site.directory / f"d{n}.img" for n in range(2)], site.directory / "overlay.qcow2"
    for path in (*paths, overlay):
        path.write_bytes(bytes(1 << 20))
    spec = "".join(DISK.format(path=path) for path in paths)
    await site.run_vm("d", more=spec if disks == "copy" else spec.replace("shared = false", "shared = true"))
    attempt = await site.migrate(vm="d", disks=disks, auto_finalize=False)
    await site.until_row(attempt, "M-hold")
    data = {"node-name": "disk1", "snapshot-file": str(overlay), "snapshot-node-name": "over", "mode": "existing"}
    actions = [{"type": "blockdev-snapshot-sync", "data": data}]
    await attempt.machine.execute("transaction", {"actions": actions})
    if restarts:
        await site.restart("a")
        attempt = site.attempt(vm="d")
        await site.until_row(attempt, "M-hold")
    await site.command("a", "job-finalize", id=attempt.job)
    await site.settle()
    wire = attempt.wire()
    assert (wire["status"], wire["outcome"]) == ("failed", "source"), wire
    assert ("d1.img" if restarts else str(overlay)) in wire["error"]["message"]
    assert Fact.CONTINUE not in attempt.facts
    await site.check("a", "d")


@pytest.mark.proves("S53")
async def test_a_medium_that_was_exchanged_is_named_by_the_plan(make_site: MakeSite) -> None:
    """The destination would open the CD of the definition, and the guest has another one in its drive, or none."""
    site = await make_site()
    here, media = site.directory / "d0.img", [site.directory / f"{name}.iso" for name in ("one", "two")]
    for path in (here, *media):
        path.write_bytes(bytes(1 << 20))
    disk = f'[[disk]]\npath = "{here}"\n[[disk]]\npath = "{media[0]}"\ncdrom = true\ninterface = "ide"\n'
    await site.run_vm("d", more=disk)
    machine = site.agents["a"].vms["d"].require_machine()
    devices = {
        d["inserted"]["image"]["filename"]: d["qdev"].split("/")[3] for d in await machine.execute("query-block")
    }
    drive = {"id": devices[str(media[0])]}
    about = str(media[0])

    async def objections() -> list[str]:
        plan = await site.command("a", "vm-plan", vm="d", destination="b", mode="precopy")
        return [o["message"] for o in plan["objections"] if o["weight"] == "blocker" and ".iso" in o["message"]]

    assert await objections() == []
    await machine.execute("eject", drive)
    (gone,) = await objections()
    assert about in gone
    assert "insert it again (blockdev-change-medium)" in gone
    await machine.execute("blockdev-change-medium", {**drive, "filename": str(media[1])})
    missing, strange = await objections()
    assert about in missing
    assert str(media[1]) in strange
    assert "eject" in strange
    await machine.execute("blockdev-change-medium", {**drive, "filename": about})
    assert await objections() == []
    await site.migrate(vm="d")
    await site.settle()
    await site.check("b", "d")


@pytest.mark.proves("S96", "S114")
async def test_bitmaps_do_not_travel_with_disks_that_are_copied(make_site: MakeSite) -> None:
    site = await make_site()
    path = site.directory / "d0.img"
    path.write_bytes(bytes(1 << 20))
    await site.run_vm("d", more=DISK.format(path=path))
    plan = await site.command(
        "a", "vm-plan", vm="d", destination="b", mode="precopy", disks="copy", settings=["dirty-bitmaps=on"]
    )
    assert [o["code"] for o in plan["objections"] if o["weight"] == "blocker"] == ["disk-copy-bitmaps"]
    attempt = await site.migrate(vm="d", disks="copy", settings=["dirty-bitmaps=on"])
    await site.settle()
    assert "dirty-bitmaps" in attempt.wire()["error"]["message"]
    await site.check("a", "d")


@pytest.mark.proves("S114")
@pytest.mark.parametrize("tls", [False, True])
async def test_a_destination_takes_as_many_connections_as_there_are_disks(make_site: MakeSite, *, tls: bool) -> None:
    """In clear text whoever reaches the port may write to the copies: the source's mirrors shut the door behind them.
    With certificates a stranger gets no further than that, and must not be in the way."""
    site = await make_site(tls=tls)
    paths = [site.directory / f"d{n}.img" for n in range(2)]
    for path in paths:
        path.write_bytes(bytes(1 << 20))
    await site.run_vm("d", more="".join(DISK.format(path=path) for path in paths))
    site.director.script("a", {"mirror": "hold"})
    attempt = await site.migrate(vm="d", disks="copy")
    await site.until_row(attempt, "P-copying")
    served = attempt.offer["disks"]
    (first, *_), address = served["exports"].values(), (served["host"], int(served["port"]))
    stranger = SocketLink(*await asyncio.open_connection(*address))
    stranger.send("nbd", export=first)
    if tls:  # a fake has no certificates: what is seen is that it was taken
        assert await stranger.receive() == {"kind": "export"}
    else:
        with pytest.raises(LinkLost):
            await stranger.receive()
    stranger.close()
    site.director.script("a")
    for _ in paths:
        site.director.go("a", "mirror")
    await site.settle()
    assert attempt.wire()["outcome"] == "destination"
    await site.check("b", "d")
