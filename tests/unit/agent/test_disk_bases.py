"""No guest is started on an image on which others lie: how each of them is known, and the word that overrides."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import pytest

from tests.save_sites import DISK, begin_h, ended, repository, with_disk
from vmferry import limits
from vmferry.agent import disk_bases
from vmferry.agent.disk_bases import Known
from vmferry.agent.restored_disks import RestoredDisk
from vmferry.errors import Busy, PlanRefused, RepositoryError, UsageError
from vmferry.store.errors import StoreTransient
from vmferry.testing.fake_site import MakeSite, Site


def qcow2(path: Path, backing: str = "") -> Path:
    """As much of an image as says on what it lies."""
    name = backing.encode()
    path.write_bytes(struct.pack(">4sIQI", b"QFI\xfb", 3, 112 if name else 0, len(name)).ljust(112, b"\0") + name)
    return path


async def run_again(site: Site, vm: str = "h", **more: object) -> None:
    await site.command("a", "vm-run", path=str(site.directory / f"{vm}.toml"), **more)


async def saved_and_off(make_site: MakeSite, *, name: str = "one") -> tuple[Site, Path, Path]:
    """A guest that was saved with its disk, and is powered off."""
    site, image = await with_disk(make_site)
    assert (await ended(await begin_h(site, name)))["outcome"] == "saved"
    await site.command("a", "vm-stop", vm="h", force=True)
    return site, image, site.directory / f"h-disk0.{name}.qcow2"


# --- by a real agent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True], ids=["same-agent", "next-agent"])
async def test_a_saved_guest_is_not_started_on_its_old_image(make_site: MakeSite, restarts: bool) -> None:
    """1. a guest is saved with its disk  2. it is powered off  3. its old spec is run: its first write would change
    what its new file, and the snapshot, lie on."""
    site, image, over = await saved_and_off(make_site)
    before = image.read_bytes()
    if restarts:
        await site.restart("a")
    with pytest.raises(PlanRefused, match=f"would write to {image}.*{over}.*h went on.*saved as one") as caught:
        await run_again(site)
    assert f'path = "{over}"' in caught.value.hint
    assert 'format = "qcow2"' in caught.value.hint
    assert disk_bases.BASE_IMAGE in caught.value.hint
    assert "h" not in site.agents["a"].vms
    assert image.read_bytes() == before
    spec = site.directory / "h.toml"
    spec.write_text(spec.read_text().replace(f'"{image}"', f'"{over}"\nformat = "qcow2"'))
    await run_again(site)
    await site.check("a", "h")


async def test_who_says_so_may_write_to_it(make_site: MakeSite) -> None:
    site, _, _ = await saved_and_off(make_site)
    with pytest.raises(UsageError, match="base-image"):
        await run_again(site, accept=["anything"])
    await run_again(site, accept=[disk_bases.BASE_IMAGE])
    await site.check("a", "h")


async def test_the_end_of_a_save_says_what_belongs_into_the_spec(make_site: MakeSite) -> None:
    site, image = await with_disk(make_site)
    wire = await ended(await begin_h(site))
    assert wire["goes_on_in"] == {str(image): str(site.directory / "h-disk0.one.qcow2")}


async def test_a_guest_that_died_is_still_listed_after_it_was_refused(make_site: MakeSite) -> None:
    """What it was is all that anybody may look up then."""
    site, _ = await with_disk(make_site)
    await ended(await begin_h(site))
    kept = site.agents["a"].vms["h"]
    await kept.require_machine().kill()
    with pytest.raises(PlanRefused):
        await run_again(site)
    assert site.agents["a"].vms["h"] is kept


async def test_a_guest_that_runs_has_its_name(make_site: MakeSite) -> None:
    site, _ = await with_disk(make_site)
    await ended(await begin_h(site))
    with pytest.raises(Busy, match="named h already"):
        await run_again(site)


async def test_it_is_followed_to_the_file_that_is_written_now(make_site: MakeSite) -> None:
    site, _ = await with_disk(make_site)
    for name in ("one", "two"):
        assert (await ended(await begin_h(site, name)))["outcome"] == "saved"
    await site.command("a", "vm-stop", vm="h", force=True)
    with pytest.raises(PlanRefused, match=r"h-disk0\.one\.qcow2") as caught:
        await run_again(site)
    assert "h-disk0.two.qcow2" in caught.value.hint
    assert "h-disk0.one.qcow2" not in caught.value.hint


async def test_a_snapshot_counts_when_its_guest_s_new_file_is_gone(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is forgotten; a repository that cannot be asked counts as one that has it."""
    site, _, over = await saved_and_off(make_site)
    over.unlink()
    with pytest.raises(PlanRefused, match="the snapshot one"):
        await run_again(site)
    store = site.agents["a"].snapshot_store
    with monkeypatch.context() as patch:

        async def away(work: object) -> None:
            raise StoreTransient("it is away")

        patch.setattr(store, "with_repository", away)
        with pytest.raises(PlanRefused, match="it is away"):
            await run_again(site)
    repository(site).forget((await site.command("a", "snapshots"))["snapshots"][0]["snapshot"])
    await run_again(site)
    await site.check("a", "h")


async def test_a_disk_that_is_only_read_may_lie_under_others(make_site: MakeSite) -> None:
    site = await make_site("11.1")
    base = site.directory / "base.img"
    base.write_bytes(bytes(1 << 16))
    qcow2(site.directory / "other.qcow2", str(base))
    await site.run_vm("h", more=DISK.format(path=base) + "readonly = true\n")
    await site.check("a", "h")


async def test_a_restored_guest_s_disk_counts(make_site: MakeSite) -> None:
    site = await make_site("11.1")
    base, over = site.directory / "base.img", site.disks("a") / "w-0.qcow2"
    base.write_bytes(bytes(1 << 16))
    seen = qcow2(over, str(base)).stat()
    disk = RestoredDisk(str(over), str(base), "web2", "f" * 32, "monday", (seen.st_dev, seen.st_ino))
    site.agents["a"].restores.disks.remember([disk])
    with pytest.raises(PlanRefused, match=r"w-0\.qcow2.*web2.*restored from monday"):
        await site.run_vm("h", more=DISK.format(path=base))


async def test_storage_that_hangs_starts_nothing_unseen(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await make_site("11.1")
    base, answers = site.directory / "base.img", threading.Event()
    base.write_bytes(bytes(1 << 16))
    with monkeypatch.context() as patch:
        patch.setattr(limits, "IMAGES_BESIDE_S", 0.01)
        patch.setattr(disk_bases, "look", lambda paths, known: answers.wait())
        with pytest.raises(PlanRefused, match="does not answer"):
            await site.run_vm("h", more=DISK.format(path=base))
        answers.set()
    await run_again(site)
    await site.check("a", "h")


# --- what is seen in files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["{}", "base.img", "file:{}", 'json:{{"driver":"raw","file":{{"filename":"{}"}}}}'])
def test_a_file_beside_that_names_it(tmp_path: Path, name: str) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"x")
    over = qcow2(tmp_path / "over.qcow2", name.format(base))
    (found,) = disk_bases.look([str(base)], [])
    assert (found.base, found.path) == (str(base), str(over))


def test_a_link_to_a_base_is_the_base(tmp_path: Path) -> None:
    base, link = tmp_path / "base.img", tmp_path / "other" / "link.img"
    base.write_bytes(b"x")
    link.parent.mkdir()
    link.symlink_to(base)
    qcow2(tmp_path / "over.qcow2", "base.img")
    (found,) = disk_bases.look([str(link)], [])
    assert found.base == str(link)


def test_what_does_not_lie_on_it_is_passed_over(tmp_path: Path) -> None:
    """Also what only has the name of an image, cannot be opened at once, or was put on something else meanwhile."""

    base = tmp_path / "base.img"
    base.write_bytes(b"x")
    qcow2(tmp_path / "alone.qcow2")
    qcow2(tmp_path / "else.qcow2", str(tmp_path / "another.img"))
    (tmp_path / "short.qcow2").write_bytes(b"QFI\xfb")
    (tmp_path / "far.qcow2").write_bytes(struct.pack(">4sIQI", b"QFI\xfb", 3, 1 << 62, 12) + bytes(90))
    os.mkfifo(tmp_path / "pipe")
    rebased = Known(str(base), str(tmp_path / "alone.qcow2"), "in which h went on", vm="h")
    gone = Known(str(base), str(tmp_path / "gone.qcow2"), "in which h went on", vm="h")
    assert disk_bases.look([str(base), str(tmp_path / "none.img")], [rebased, gone]) == []


def test_what_cannot_be_read_counts_as_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"x")
    over = qcow2(tmp_path / "over.qcow2")
    known = Known(str(base), str(over), "in which h went on", vm="h")

    def refused(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(disk_bases, "backing_of", refused)
    assert [each.path for each in disk_bases.look([str(base)], [known])] == [str(over)]


def test_a_folder_of_many_files_is_looked_through_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"x")
    for number in range(5):
        qcow2(tmp_path / f"{number}.qcow2", str(base))
    monkeypatch.setattr(limits, "IMAGES_BESIDE_MAX", 3)
    assert len(disk_bases.look([str(base)], [])) <= 3
    assert issubclass(StoreTransient, RepositoryError)
