"""A snapshot that was imported is restored with a spec: what the spec says, what the stream does, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.save_sites import chore, repository, save
from vmferry.agent import restore_spec
from vmferry.agent.restore_definition import GuestIdentity
from vmferry.agent.restores import RestoreArguments, Restores, restore
from vmferry.agent.restoring import RestoreAttempt, RestoreWanted
from vmferry.agent.vms import VmDefinition
from vmferry.engine.frozen import FrozenDisk
from vmferry.errors import PlanRefused, SpecError, UsageError
from vmferry.jobs.journal import Entry
from vmferry.testing.fake_site import MakeSite, Site
from vmferry.vm import spec as vm_spec

SPEC = 'name = "h"\nmemory = "{memory}"\naccel = "tcg"\nmachine = "{machine}"\n'
DISKS = '[[disk]]\npath = "{folder}/own.img"\n[[disk]]\npath = "{folder}/cd.iso"\nreadonly = true\n'


async def imported(make_site: MakeSite) -> Site:
    """The guest g, saved as `one`, which came out of the repository and in again as `theirs`."""
    site = await make_site()
    await save(site)
    file = site.directory / "one.stream"
    await chore(site, "snapshot-export", name="one", file=str(file))
    await chore(site, "snapshot-import", name="theirs", file=str(file))
    return site


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[RestoreWanted]:
    """What restores would begin with: none does."""
    found: list[RestoreWanted] = []

    def begin(self: Restores, attempt: RestoreAttempt) -> None:
        found.append(attempt.wanted)

    monkeypatch.setattr(Restores, "begin", begin)
    return found


def spec(site: Site, more: str = "", *, memory: str = "64M", machine: str = "q35") -> str:
    path = site.directory / "h.toml"
    path.write_text(SPEC.format(memory=memory, machine=machine) + more)
    return str(path)


async def wish(site: Site, path: str = "", name: str = "theirs", **more: Any) -> dict[str, Any]:
    return await restore(site.agents["a"], RestoreArguments(name=name, spec_path=path, **more))


@pytest.mark.parametrize("rename", ["", "h2"])
@pytest.mark.parametrize("machine", ["q35", "pc-q35-7.2"])
async def test_the_spec_says_what_the_stream_does_not(
    make_site: MakeSite, begun: list[RestoreWanted], rename: str, machine: str
) -> None:
    """Arguments of QEMU in it are the person's own, so nobody has to vouch for them."""
    site = await imported(make_site)
    path = spec(site, 'extra_args = ["-device", "pvpanic"]\n[[network]]\n', machine=machine)
    await wish(site, path, rename=rename)
    (wanted,) = begun
    assert (wanted.vm, wanted.name, wanted.overlays) == (rename or "h", "theirs", ())
    definition = VmDefinition.from_wire(wanted.definition)
    assert (definition.name, definition.machine, definition.accel) == (rename or "h", "pc-q35-7.2", "tcg")
    assert 64 << 20 <= definition.memory_bytes < 65 << 20
    assert definition.spec is not None
    assert list(definition.spec["extra_args"]) == ["-device", "pvpanic"]
    assert definition.spec["uuid"]
    written = site.agents["a"].journal.read()
    (order,) = [each.body for each in written if each.kind is Entry.RESTORE_WANTED]
    kept = VmDefinition.from_wire(order["definition"])
    assert (kept.name, kept.machine, kept.memory_bytes) == (
        definition.name,
        definition.machine,
        definition.memory_bytes,
    )


async def test_an_address_that_the_spec_leaves_open_is_the_one_of_the_name_in_it(
    make_site: MakeSite, begun: list[RestoreWanted]
) -> None:
    site = await imported(make_site)
    path = spec(site, "[[network]]\n")
    for rename in ("", "h2"):
        await wish(site, path, rename=rename)
    first, second = ((wanted.definition["spec"] or {})["network"][0]["mac"] for wanted in begun)
    assert first == second


async def test_without_a_spec_it_is_refused_and_the_way_out_is_named(
    make_site: MakeSite, begun: list[RestoreWanted]
) -> None:
    site = await imported(make_site)
    with pytest.raises(PlanRefused, match="nobody knows what its machine is made of") as caught:
        await wish(site)
    assert "--spec FILE" in caught.value.hint
    with pytest.raises(PlanRefused, match="one says itself what its guest is made of, and takes no spec"):
        await wish(site, spec(site), name="one")
    assert begun == []


@pytest.mark.parametrize("machine", ["pc", "pc-q35-11.1", "pc-i440fx-7.2"])
async def test_another_machine_type_is_refused(make_site: MakeSite, begun: list[RestoreWanted], machine: str) -> None:
    site = await imported(make_site)
    with pytest.raises(PlanRefused, match=f"machine type is {machine}, and .* a guest of pc-q35-7.2") as caught:
        await wish(site, spec(site, machine=machine))
    assert 'machine = "pc-q35-7.2"' in caught.value.hint
    assert begun == []


def test_a_machine_that_no_spec_can_describe_is_refused() -> None:
    found = vm_spec.from_wire({"name": "h", "memory": "1M"})
    with pytest.raises(PlanRefused, match="no spec can describe a guest of the machine type microvm"):
        restore_spec._with_machine(found, "microvm")


async def test_what_is_no_spec_is_refused(make_site: MakeSite, begun: list[RestoreWanted]) -> None:
    site = await imported(make_site)
    with pytest.raises(SpecError, match=r"nowhere\.toml: cannot be read"):
        await wish(site, str(site.directory / "nowhere.toml"))
    with pytest.raises(UsageError, match="not as both"):
        await wish(site, spec(site), spec={"name": "h", "memory": "64M"})
    with pytest.raises(SpecError, match="the spec: unknown key"):
        await wish(site, spec={"name": "h", "memory": "64M", "memori": 1})
    with pytest.raises(UsageError, match="vm-restore: "):
        await site.command("a", "vm-restore", name="theirs", spec=7)
    assert begun == []


async def test_a_guest_with_less_memory_is_refused(
    make_site: MakeSite, begun: list[RestoreWanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await imported(make_site)
    monkeypatch.setattr("vmferry.agent.restore_definition.RESTORE_OTHER_MEMORY_BYTES_MAX", -(1 << 20))
    with pytest.raises(PlanRefused, match=r"theirs cannot be restored: it has .* of memory, and its definition says"):
        await wish(site, spec(site, memory="1M"))
    assert begun == []


async def test_disks_of_the_spec_need_a_persons_word(make_site: MakeSite, begun: list[RestoreWanted]) -> None:
    """One that the guest writes to gets an overlay; one that it only reads is used as it is."""
    site = await imported(make_site)
    own, cd = Path(site.directory / "own.img"), Path(site.directory / "cd.iso")
    for image in (own, cd):
        image.write_bytes(bytes(1 << 16))
    path = spec(site, DISKS.format(folder=site.directory))
    for accept in ([], ["same-address"]):
        with pytest.raises(PlanRefused) as caught:
            await wish(site, path, accept=accept)
        for image in (own, cd):
            said = f"{image} is the spec's, and as the snapshot was imported nobody can say whether"
            assert said in caught.value.message
        assert "--accept unchecked-disk" in caught.value.message
    assert begun == []
    wire = await wish(site, path, accept=["unchecked-disk"])
    (wanted,) = begun
    (overlay,) = wanted.overlays
    assert (overlay.backing, overlay.backing_format) == (str(own), "raw")
    disks = VmDefinition.from_wire(wanted.definition).disks
    assert [(disk.path, disk.readonly) for disk in disks] == [(overlay.path, False), (str(cd), True)]
    assert sum("that was accepted" in note for note in wire["notes"]) == 2
    os.unlink(cd)
    with pytest.raises(PlanRefused, match=r"the disk image .*/cd.iso of the snapshot is not there"):
        await wish(site, path, rename="h2", accept=["unchecked-disk"])


async def test_a_disk_that_a_guest_writes_to_is_refused(make_site: MakeSite, begun: list[RestoreWanted]) -> None:
    """An overlay on it would show what is written under it."""
    site = await imported(make_site)
    for name in ("own.img", "cd.iso"):
        (site.directory / name).write_bytes(bytes(1 << 16))
    disks = DISKS.format(folder=site.directory)
    await site.run_vm("w", more=f'[[disk]]\npath = "{site.directory}/own.img"\n')
    with pytest.raises(PlanRefused, match=r"w on a may write to .*/own.img, which the restored guest would read"):
        await wish(site, spec(site, disks), accept=["unchecked-disk"])
    assert begun == []


def test_only_what_is_written_to_is_named() -> None:
    disks = [FrozenDisk(path=path, format="raw", way="read-only", size_bytes=1, mtime_ns=1) for path in ("/a", "/b")]
    others = [GuestIdentity("w", "host-b", writable=("/b", "/c"))]
    assert restore_spec.written_by(disks, others) == (
        "w on host-b may write to /b, which the restored guest would read",
    )


async def test_another_host_gets_the_spec_along(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await imported(make_site)
    sent: list[dict[str, Any]] = []

    async def call(command: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
        sent.append(arguments["arguments"])
        return {}

    monkeypatch.setattr(site.agents["a"].peers.link("b"), "call", call)
    await wish(site, spec(site), host="b")
    await wish(site, name="one", host="b")
    with_spec, without = sent
    assert (with_spec["spec"]["name"], with_spec["name"]) == ("h", repository_id(site, "theirs"))
    assert {"spec", "spec_path"}.isdisjoint(without), "an earlier agent knows of none"
    with pytest.raises(PlanRefused, match="takes no spec"):
        await wish(site, spec(site), name="one", host="b")
    assert len(sent) == 2


def repository_id(site: Site, name: str) -> str:
    (found,) = [each.snapshot for each in repository(site).snapshots() if each.head and each.head.name == name]
    return found
