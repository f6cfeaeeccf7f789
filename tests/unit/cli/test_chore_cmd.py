"""`vmferry verify`, `prune`, `export`, `import` against a real agent: what a person is asked, what a script says."""

from __future__ import annotations

import asyncio
import builtins
import json
import sys
from collections.abc import Callable

import pytest

from tests.save_sites import names, repository, save
from tests.unit.agent.conftest import make_site  # noqa: F401 - the fixture
from tests.unit.agent.test_chores_with_fakes import at_once  # noqa: F401 - the fixture
from tests.unit.cli.test_job_cmd import run
from vmferry.cli import chore_cmd
from vmferry.cli.main import main
from vmferry.testing.fake_site import MakeSite, Site

NEEDLESS = f"packs/aa/{'a' * 32}"


def is_there(site: Site) -> bool:
    return NEEDLESS in {entry.name for entry in repository(site).backend.list("packs/")}


async def with_needless(make: MakeSite) -> Site:
    """A repository with a snapshot, and one object that nobody needs."""
    site = await make()
    await save(site)
    repository(site).backend.put(NEEDLESS, b"nobody's")
    return site


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], str]) -> list[str]:
    """A person sits there; what they were asked."""
    asked: list[str] = []

    def reads(question: str) -> str:
        asked.append(question)
        return answer()

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", reads)
    return asked


def interrupts() -> str:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("answer", ["y", "YES", "n", "", "interrupt"])
async def test_a_person_sees_the_plan_and_is_asked(
    make_site: MakeSite,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
) -> None:
    site = await with_needless(make_site)
    asked = at_a_terminal(monkeypatch, interrupts if answer == "interrupt" else lambda: answer)
    said_yes = answer in ("y", "YES")
    text = await run(site, capsys, "prune", code=0 if said_yes else 12)
    assert len(asked) == 1
    assert "plan: remove 1 packs" in text
    assert ("done: 1 objects removed" in text) is said_yes
    assert ("cancelled" in text) is not said_yes
    assert is_there(site) is not said_yes
    assert json.loads(await run(site, capsys, "jobs", "--json"))["jobs"] == []


@pytest.mark.usefixtures("at_once")
async def test_a_script_that_nobody_can_answer_says_what_it_means(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await with_needless(make_site)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    error = json.loads(await run(site, capsys, "prune", "--json", code=2))["error"]
    assert "--yes" in error["hint"]
    await run(site, capsys, "prune", code=2)
    looked = json.loads(await run(site, capsys, "prune", "--dry-run", "--json"))
    assert (looked["plan"]["remove_packs"], looked["done"]) == (1, None)
    assert is_there(site)
    done = json.loads(await run(site, capsys, "prune", "--yes", "--json"))
    assert done["plan"] == looked["plan"]
    assert done["done"]["removed"] == 1
    assert not is_there(site)
    assert "about" in await run(site, capsys, "prune", "--yes")


@pytest.mark.usefixtures("at_once")
async def test_a_plan_is_given_back_by_its_job(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await with_needless(make_site)
    shown = json.loads(await run(site, capsys, "prune", "--no-auto-finalize", "--no-auto-dismiss", "--json"))
    assert (shown["status"], shown["plan"]["remove_packs"], shown["done"]) == ("planned", 1, None)
    text = await run(site, capsys, "jobs")
    assert shown["job"][:12] in text
    assert "its plan waits for leave" in text
    await run(site, capsys, "job", "finalize", shown["job"][:8])
    found = site.agents["a"].chores.by_id(shown["job"])
    if found is not None:
        await found.ended.wait()
    assert not is_there(site)
    (job,) = json.loads(await run(site, capsys, "jobs", "--json"))["jobs"]
    assert (job["status"], job["result"]["done"]["removed"]) == ("concluded", 1)
    await run(site, capsys, "job", "dismiss", shown["job"])


@pytest.mark.usefixtures("at_once")
async def test_what_is_shown_without_a_question_says_how_it_goes_on(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await with_needless(make_site)
    text = await run(site, capsys, "prune", "--no-auto-finalize")
    assert "nothing was done yet" in text
    assert "vmferry job finalize" in text
    assert is_there(site)


async def test_files_go_out_and_come_in(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await make_site()
    await save(site)
    file = site.directory / "one.stream"
    assert "pc-q35-7.2" in await run(site, capsys, "export", "one", str(file))
    error = json.loads(await run(site, capsys, "export", "one", str(file), "--json", code=2))["error"]
    assert "cannot be written" in error["message"]
    assert f"{file} is kept as two" in await run(site, capsys, "import", str(file), "two")
    assert names(site) == ["one", "two"]
    assert "2 snapshots" in await run(site, capsys, "verify")
    begun = json.loads(await run(site, capsys, "verify", "--detach", "--json"))
    assert begun["job"]
    found = site.agents["a"].chores.by_id(begun["job"])
    if found is not None:
        await found.ended.wait()
    for pack in (site.directory / "sa/repository/packs").rglob("*"):
        if pack.is_file():
            pack.chmod(0o600)
            pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    wire = json.loads(await run(site, capsys, "verify", "--json", code=25))
    assert wire["outcome"] == "done", "the search is done, and what it found is an error"
    assert all(problem["object"].startswith("packs/") for problem in wire["problems"])


async def test_indexes_that_are_lost_are_made_again_and_a_person_is_told_how(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await make_site()
    await save(site)
    backend = repository(site).backend
    (name,) = [entry.name for entry in backend.list("index/")]
    data = backend.get(name)
    backend.delete(name)
    error = json.loads(await run(site, capsys, "verify", "--json", code=25))
    assert error["rebuilt_indexes"] == []
    assert [problem["object"] for problem in error["problems"]] == [name]
    assert await asyncio.to_thread(main, ["verify", "--socket", str(site.agents["a"].config.control_socket)]) == 25
    assert "vmferry verify --rebuild-indexes" in capsys.readouterr().err
    assert f"{name}: made again" in await run(site, capsys, "verify", "--rebuild-indexes")
    assert backend.get(name) == data
    assert json.loads(await run(site, capsys, "verify", "--json"))["whole"]
    backend.delete(name)
    for entry in backend.list("packs/"):
        pack = site.directory / "sa/repository" / entry.name
        pack.chmod(0o600)
        pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    text = await run(site, capsys, "verify", "--rebuild-indexes", code=25)
    assert "its index cannot be made again" in text
    assert [entry.name for entry in backend.list("index/")] == [], "and nothing half is there"


@pytest.mark.proves("S122")
async def test_an_interrupt_leaves_the_job_at_work(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await with_needless(make_site)

    def follow(*question: object, **more: object) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(chore_cmd, "_follow", follow)
    await run(site, capsys, "verify", "--no-auto-dismiss", code=130)
    jobs = json.loads(await run(site, capsys, "jobs", "--json"))["jobs"]
    (job,) = jobs
    found = site.agents["a"].chores.by_id(job["id"])
    if found is not None:
        await found.ended.wait()
    assert (await site.command("a", "job-status", job=job["id"]))["whole"]


def test_an_interrupt_says_that_what_was_begun_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(*question: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(chore_cmd, "verify", verify)
    assert main(["verify"]) == 130
    assert "goes on in the agents" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("flags", [["--json"], []])
async def test_whoever_does_not_wait_for_a_plan_is_told_that_it_waits_for_them(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str], flags: list[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await with_needless(make_site)
    text = await run(site, capsys, "prune", "--detach", *flags)
    (job,) = json.loads(await run(site, capsys, "jobs", "--json"))["jobs"]
    said = json.loads(text)["next"] if flags else text
    assert f"'vmferry job finalize {job['id']}' gives it" in said
    assert f"'vmferry job cancel {job['id']}'" in said
    found = site.agents["a"].chores.by_id(job["id"])
    assert found is not None
    await site.until(lambda: found.wire()["status"] == "planned")
    await run(site, capsys, "job", "finalize", job["id"])
    await found.ended.wait()
    assert not is_there(site)


@pytest.mark.usefixtures("at_once")
async def test_a_prune_that_has_leave_and_is_not_waited_for_says_nothing_of_it(
    make_site: MakeSite, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    site = await with_needless(make_site)
    text = await run(site, capsys, "prune", "--detach", "--yes")
    assert "finalize" not in text
    await site.until(lambda: not is_there(site))
