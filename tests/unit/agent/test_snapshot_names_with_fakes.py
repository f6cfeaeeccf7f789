"""Of two saves or imports under one name the second is refused at once, not at its commit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.save_sites import HELD, begin, begin_h, chore, chore_ended, ended, names, save, until_fact, with_disk
from vmferry.agent import snapshot_works
from vmferry.core.saving import SaveFact
from vmferry.errors import Busy
from vmferry.testing.fake_site import SETTLE_S, MakeSite


async def test_a_second_save_under_a_name_is_refused_before_its_guest_stands(make_site: MakeSite) -> None:
    """Its disk would be given a new file for nothing."""
    site, image = await with_disk(make_site)
    first = await begin(site, "one", way="precopy", **HELD)
    before = site.agents["a"].vms["h"].definition
    with pytest.raises(Busy, match=f"job {first.job} is about to keep a snapshot under the name one"):
        await begin_h(site)
    assert site.agents["a"].saves.active("h") is None
    assert site.agents["a"].vms["h"].definition == before
    assert sorted(each.name for each in image.parent.glob("h*.qcow2")) == []
    await until_fact(site, first, SaveFact.WANTED)
    await site.command("a", "job-cancel", id=first.job)
    await ended(first)
    await ended(await begin_h(site))
    assert names(site) == ["one"]


async def test_of_two_that_are_asked_for_at_the_same_moment_one_is_refused(make_site: MakeSite) -> None:
    site, _ = await with_disk(make_site)
    await save(site, "zero")
    file = site.directory / "zero.stream"
    await chore(site, "snapshot-export", name="zero", file=str(file))

    async def load() -> str:
        return str((await site.command("a", "snapshot-import", name="one", file=str(file)))["job"])

    async def keep() -> str:
        return str((await site.command("a", "vm-save", vm="g", name="one"))["job"])

    for first, second in ((load, keep), (keep, load), (load, load)):
        answers = await asyncio.gather(first(), second(), return_exceptions=True)
        (job,) = [each for each in answers if isinstance(each, str)]
        (refused,) = [each for each in answers if isinstance(each, Busy)]
        assert f"job {job} is about" in refused.message
        held = site.agents["a"].saves.by_id(job)
        await (ended(held) if held is not None else chore_ended(site, job))
        assert sorted(names(site)) == ["one", "zero"]
        await site.command("a", "snapshot-forget", name="one")


async def test_an_import_at_work_has_its_name_and_an_export_has_none(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    await save(site, "zero")
    file = site.directory / "zero.stream"
    await chore(site, "snapshot-export", name="zero", file=str(file))
    goes_on, work = asyncio.Event(), snapshot_works.work
    loop = asyncio.get_running_loop()

    def waiting(*given: Any) -> dict[str, Any]:
        asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result(SETTLE_S)
        return work(*given)

    monkeypatch.setattr(snapshot_works, "work", waiting)
    job = (await site.command("a", "snapshot-import", name="one", file=str(file)))["job"]
    other = (await site.command("a", "snapshot-export", name="zero", file=str(site.directory / "again")))["job"]
    assert site.agents["a"].snapshot_names.user("zero") == ""
    with pytest.raises(Busy, match=f"job {job} is about"):
        await begin(site, "one")
    with pytest.raises(Busy, match=f"job {job} is about"):
        await site.command("a", "snapshot-import", name="one", file=str(file))
    goes_on.set()
    for each in (job, other):
        await chore_ended(site, each)
    assert site.agents["a"].snapshot_names.user("one") == ""
    assert sorted(names(site)) == ["one", "zero"]
