"""Stream files that exports write and imports read: what a person named wrongly, and what the host cannot do."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.save_sites import chore, repository, save
from vmferry.agent import snapshot_files
from vmferry.agent.chores import Chore, Watch
from vmferry.agent.wants import ChoreWanted
from vmferry.errors import UsageError, VmferryError
from vmferry.testing.fake_site import MakeSite


async def test_a_file_that_is_there_is_refused_before_anything_is_done(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once by the command, and by the job if it came to be meanwhile; it stays as it is."""
    site = await make_site()
    await save(site)
    for name, what in (("taken", "File exists"), ("dangling", "File exists"), ("no/one", "No such"), ("taken/x", "")):
        file = site.directory / name
        if name == "taken":
            file.write_bytes(b"somebody's")
        elif name == "dangling":
            file.symlink_to("nowhere")
        with pytest.raises(UsageError, match=f"cannot be written: {what}"):
            await site.command("a", "snapshot-export", name="one", file=str(file))
    assert await site.command("a", "query-jobs") == []
    told: list[tuple[int, int]] = []
    late, tell = site.directory / "late", Watch.tell

    def telling(self: Watch, done: int, whole: int) -> None:
        tell(self, done, whole)
        if whole and not told:
            told.append((done, whole))
            late.write_bytes(b"somebody's")

    monkeypatch.setattr(Watch, "tell", telling)
    wanted = ChoreWanted("c" * 32, "export", name="one", file=str(site.directory / "taken"))
    watch = Watch(Chore(site.agents["a"], wanted), asyncio.get_running_loop())
    with pytest.raises(UsageError, match="File exists"):
        snapshot_files.export(repository(site), wanted, watch)
    assert told == [], "nothing was read"
    with pytest.raises(UsageError, match="File exists"):
        await chore(site, "snapshot-export", name="one", file=str(late))
    assert {each.read_bytes() for each in (late, site.directory / "taken")} == {b"somebody's"}
    assert not list(site.directory.glob(".*.part"))


async def test_a_file_system_without_hard_links_takes_an_export(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    await save(site)
    first, second = site.directory / "first", site.directory / "second"
    await chore(site, "snapshot-export", name="one", file=str(first))

    def refuses(*names: Any, **more: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuses)
    await chore(site, "snapshot-export", name="one", file=str(second))
    assert first.read_bytes() == second.read_bytes()
    assert not list(site.directory.glob(".*.part"))


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, "file"), (errno.EDQUOT, "file"), (errno.EIO, "file"), (errno.EACCES, "file"),
     (errno.EEXIST, "usage"), (errno.ENOENT, "usage")],
)  # fmt: skip
async def test_a_full_disk_is_no_wrong_word_of_a_person(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    site = await make_site()
    await save(site)

    def fails(part: Path, path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(snapshot_files, "link_or_rename", fails)
    with pytest.raises(VmferryError, match=os.strerror(code)) as caught:
        await chore(site, "snapshot-export", name="one", file=str(site.directory / "new"))
    assert (caught.value.code, caught.value.exit_code) == (kind, {"file": 26, "usage": 2}[kind])
    assert not list(site.directory.glob("*new*"))
