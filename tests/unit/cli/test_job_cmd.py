"""`vmferry jobs`, `job`, `block` and `unblock` against real agents with fake QEMUs."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.unit.agent.conftest import make_site  # noqa: F401 - the fixture
from vmferry.cli.job_cmd import find, short
from vmferry.cli.main import main
from vmferry.cli.render import time_left
from vmferry.errors import UsageError
from vmferry.testing.fake_site import MakeSite, Site


async def run(site: Site, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    socket = str(site.agents["a"].config.control_socket)
    assert await asyncio.to_thread(main, [*words, "--socket", socket]) == code
    return capsys.readouterr().out


async def test_a_person_finalizes_reads_and_dismisses(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await make_site()
    assert await run(site, capsys, "jobs") == "no jobs\n"
    begun = await run(
        site, capsys, "migrate", "g", "b", "--no-auto-finalize", "--no-auto-dismiss", "--detach", "--json"
    )  # fmt: skip
    job = json.loads(begun)["job"]
    await site.until_row(site.attempt(), "M-hold")
    text = await run(site, capsys, "jobs")
    assert job[:12] in text
    assert "waits for leave" in text
    assert "status" in json.loads(await run(site, capsys, "jobs", "--json"))["jobs"][0]
    error = json.loads(await run(site, capsys, "job", "dismiss", "g", "--json", code=22))["error"]
    assert "not there yet" in error["message"]
    await run(site, capsys, "job", "finalize", "g")
    await site.settle()
    (shown,) = json.loads(await run(site, capsys, "jobs", "--json"))["jobs"]
    assert (shown["status"], shown["percent"]) == ("concluded", 100)
    assert "null" in await run(site, capsys, "job", "dismiss", job[:6])
    await run(site, capsys, "job", "dismiss", job, code=23)
    assert await run(site, capsys, "jobs") == "no jobs\n"


async def test_a_person_holds_and_removes_a_blocker(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await make_site()
    assert "blocked by backup" in await run(site, capsys, "block", "g", "migrate", "backup", "it is copied")
    assert "migrate is blocked by backup: it is copied" in await run(site, capsys, "status", "g")
    error = json.loads(await run(site, capsys, "migrate", "g", "b", "--json", code=24))["error"]
    assert error["code"] == "blocked"
    assert "unblock g backup" in error["hint"]
    await run(site, capsys, "unblock", "g", "backup")
    assert "blocked" not in await run(site, capsys, "status", "g")


def test_a_job_is_meant_by_its_id_the_beginning_of_it_or_its_vm() -> None:
    listed = [{"id": "abcd1", "vm": "web1"}, {"id": "abcd2", "vm": "web2"}, {"id": "ffff", "vm": "abcd2"}]
    assert find(listed, "abcd2") == "abcd2"
    assert find(listed, "web1") == "abcd1"
    assert find(listed, "none") == "none"
    with pytest.raises(UsageError, match="any of 2"):
        find(listed, "abcd")


def test_a_disks_job_is_meant_by_the_end_of_its_id_only() -> None:
    listed = [{"id": f"abcd1234abcd1234{disk}", "vm": "web1"} for disk in ("", "-disk-0", "-disk-1")]
    assert find(listed, "web1") == find(listed, "abcd1") == "abcd1234abcd1234"
    assert find(listed, "abcd1-disk-1") == find(listed, short(listed[2]["id"])) == "abcd1234abcd1234-disk-1"
    assert find(listed, "abcd1-disk-2") == "abcd1-disk-2", "the agent refuses it"
    assert [short(each["id"]) for each in listed] == ["abcd1234abcd", "abcd1234abcd-disk-0", "abcd1234abcd-disk-1"]


@pytest.mark.parametrize("words", [("job", "change", "web1"), ("job", "cancel", "web1", "a=b")])
def test_only_change_takes_settings(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--socket", "/nowhere"]) == 2


def test_time_left_is_told_between_its_bounds_or_not_at_all() -> None:
    assert time_left(None, None) == ""
    assert time_left(2000.0, None) == ", 2.00 s or more"
    assert time_left(2000.0, 5000.0) == ", 2.00 s to 5.00 s"
