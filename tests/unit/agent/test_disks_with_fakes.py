"""Local disks go with the guest, all of them or none: two real agents, fake QEMUs, images in a folder."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmferry.agent import images
from vmferry.agent.source import SourceAttempt
from vmferry.agent.source_disks import DRAIN_S, are_copies_of_use
from vmferry.core.facts import Fact
from vmferry.errors import HostUnreachable, PlanRefused, UsageError
from vmferry.testing.fake_site import JumpClock, MakeSite, Site
from vmferry.vm.image_locks import ImageLocks

PAIRS = [("7.2", "7.2"), ("11.1", "11.1"), ("7.2", "11.1"), ("11.1", "7.2")]
DISK = '[[disk]]\npath = "{path}"\nshared = false\n'


class Moved:
    """A site whose guest `d` has two local disks, and where the copies of them would be."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.here = [site.directory / f"d{n}.img" for n in range(2)]
        self.folder = site.disks("b")
        self.there = [self.folder / path.name for path in self.here]

    async def migrate(self, **more: Any) -> SourceAttempt:
        return await self.site.migrate(vm="d", disks="copy", **more)

    async def back_unharmed(self, attempt: SourceAttempt, *words: str) -> None:
        """The guest runs on, nothing is left of the copies but for a second try, and the error names what these words
        name."""
        await self.site.settle()
        wire = attempt.wire()
        assert wire["outcome"] == "source", wire
        assert all(word in str(wire["error"]) for word in words), wire["error"]
        is_whole = are_copies_of_use(attempt)
        kept = sorted(self.folder.iterdir())
        assert kept == (self.there if is_whole else []), "the images that the job made are gone, or whole"
        assert all(path.exists() for path in self.here)
        await self.site.check("a", "d")


async def moved(make_site: MakeSite, *versions: str, **more: object) -> Moved:
    site = await make_site(*versions, **more)
    ready = Moved(site)
    for path in ready.here:
        path.write_bytes(bytes(3 << 20))
    await site.run_vm("d", more="".join(DISK.format(path=path) for path in ready.here))
    return ready


def in_order(site: Site, *steps: tuple[str, Fact]) -> None:
    at = [site.noted.index(step) for step in steps]
    assert at == sorted(at), list(zip(steps, at, strict=True))


@pytest.mark.parametrize(("source", "destination"), PAIRS)
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.proves("S96", "S114")
async def test_two_disks_go_with_the_guest(make_site: MakeSite, source: str, destination: str, mode: str) -> None:
    ready = await moved(make_site, source, destination)
    attempt = await ready.migrate(mode=mode)
    await ready.site.settle()
    wire = attempt.wire()
    assert (wire["status"], wire["outcome"]) == ("completed", "destination"), wire
    in_order(
        ready.site,
        ("b", Fact.DISKS_SERVED), ("a", Fact.DISKS_STARTED), ("a", Fact.DISKS_READY), ("a", Fact.STARTED),
        ("a", Fact.SWITCHOVER), ("a", Fact.DISKS_DRAINED), ("b", Fact.DISKS_CLOSED), ("b", Fact.START_SENT),
    )  # fmt: skip
    in_order(ready.site, ("a", Fact.DISKS_DRAINED), ("a", Fact.CONTINUE))
    assert [(row["id"], row["status"]) for row in wire["disks"]] == [
        (f"{attempt.job}-disk-{n}", "concluded") for n in range(2)
    ]
    assert [path.stat().st_size for path in ready.there] == [3 << 20] * 2
    assert len(list(ready.folder.iterdir())) == 2, "no temporary name is left"
    assert all(path.exists() for path in ready.here), "the source's images are kept"
    definition = ready.site.agents["b"].vms["d"].definition
    assert [disk.path for disk in definition.disks] == [str(path) for path in ready.there]
    await ready.site.check("b", "d")


async def test_the_plan_says_what_is_copied_and_what_is_in_the_way(make_site: MakeSite) -> None:
    ready = await moved(make_site)
    site = ready.site
    plan = await site.command("a", "vm-plan", vm="d", destination="b", mode="precopy", disks="copy")
    assert plan["possible"], plan
    assert [disk["there"] for disk in plan["disks"]] == [str(path) for path in ready.there]
    assert any(str(ready.there[0]) in o["message"] for o in plan["objections"] if o["weight"] == "note")
    refused = await site.command("a", "vm-plan", vm="d", destination="b", mode="precopy")
    assert not refused["possible"]
    assert any("--disks copy" in o["fix"] for o in refused["objections"])
    ready.there[1].write_text("somebody's")
    attempt = await ready.migrate()
    await site.settle()
    error = attempt.wire()["error"]
    assert error["code"] == PlanRefused("").to_wire()["code"]
    assert str(ready.there[1]) in error["message"]
    assert ready.there[1].read_text() == "somebody's"
    await site.check("a", "d")


async def test_a_file_that_comes_between_the_plan_and_the_place_is_not_touched(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = await moved(make_site)
    real = images.make

    async def slow(path: str, **more: object) -> images.Identity:
        made = await real(path, **more)  # type: ignore[arg-type]
        if path == str(ready.there[1]):
            ready.there[1].write_text("somebody's")
        return made

    monkeypatch.setattr(images, "make", slow)
    attempt = await ready.migrate()
    await ready.site.settle()
    assert attempt.wire()["outcome"] == "source"
    assert "cannot get its name" in str(attempt.wire()["error"])
    assert [path.name for path in ready.folder.iterdir()] == [ready.there[1].name]
    assert ready.there[1].read_text() == "somebody's"
    await ready.site.check("a", "d")


async def test_what_is_said_of_disks_is_checked(make_site: MakeSite) -> None:
    ready = await moved(make_site)
    for disk, word in (("disk7=copy", "disk7"), ("disk0=move", "move")):
        with pytest.raises(UsageError, match=word):
            await ready.site.migrate(vm="d", disk=[disk])
    await ready.site.check("a", "d")


async def test_one_disk_by_its_name(make_site: MakeSite) -> None:
    ready = await moved(make_site)
    attempt = await ready.site.migrate(vm="d", disk=["disk0=copy"])
    await ready.site.settle()
    assert "d1.img" in str(attempt.wire()["error"]), "the other one is local, too"
    attempt = await ready.site.migrate(vm="d", disk=["disk0=copy", "disk1=copy"])
    await ready.site.settle()
    assert attempt.wire()["outcome"] == "destination"
    await ready.site.check("b", "d")


@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.parametrize(("step", "stops"), [("mirror", False), ("drain", True)])
@pytest.mark.proves("S96")
async def test_one_that_fails_leads_all_back(make_site: MakeSite, version: str, step: str, stops: bool) -> None:
    ready = await moved(make_site, version, version)
    ready.site.director.script("a", {step: "fail"})
    attempt = await ready.migrate()
    await ready.back_unharmed(attempt, "disk0", f"scripted failure at {step}")
    assert (Fact.SWITCHOVER in attempt.facts) is stops
    assert Fact.CONTINUE not in attempt.facts
    assert Fact.DISKS_DROPPED in attempt.facts
    left = await attempt.machine.execute("query-jobs")
    assert left == []


async def test_a_cancel_while_the_disks_are_on_their_way(make_site: MakeSite) -> None:
    ready = await moved(make_site)
    ready.site.director.script("a", {"mirror": "hold"})
    attempt = await ready.migrate()
    await ready.site.director.reached("a", "mirror")
    await ready.site.until_row(attempt, "P-copying")
    await ready.site.command("a", "vm-cancel", vm="d")
    await ready.back_unharmed(attempt)
    assert attempt.wire()["status"] == "cancelled"
    assert Fact.SWITCHOVER not in attempt.facts


@pytest.mark.proves("S97")
async def test_mirrors_go_on_until_a_person_has_given_the_leave(make_site: MakeSite) -> None:
    ready = await moved(make_site)
    attempt = await ready.migrate(auto_finalize=False)
    await ready.site.until_row(attempt, "M-hold")
    jobs = await attempt.machine.execute("query-jobs")
    assert [job["status"] for job in jobs] == ["ready", "ready"], "whoever says no has lost nothing"
    await ready.site.command("a", "job-finalize", id=attempt.job)
    await ready.site.settle()
    assert attempt.wire()["outcome"] == "destination"
    in_order(ready.site, ("a", Fact.FINALIZE), ("a", Fact.DISKS_DRAINED), ("a", Fact.CONTINUE))
    await ready.site.check("b", "d")


async def test_disks_count_in_the_job_and_its_bandwidth_is_theirs_until_the_memory_goes(make_site: MakeSite) -> None:
    ready = await moved(make_site)
    ready.site.director.script("a", {"mirror": "hold"})
    attempt = await ready.migrate()
    await ready.site.director.reached("a", "mirror")
    await ready.site.until_row(attempt, "P-copying")
    await ready.site.until(lambda: attempt.tracking.disks[1] == 2 * (3 << 20))
    job, *mirrors = await ready.site.command("a", "query-jobs")
    assert [each["current-progress"] for each in mirrors] == [0, 0]
    memory = attempt.kept.definition.memory_bytes
    assert (job["current-progress"], job["total-progress"]) == (0, 2 * (3 << 20) + memory)
    await ready.site.command("a", "job-change", id=attempt.job, max_bandwidth=8 << 20)
    assert (await attempt.machine.execute("query-migrate-parameters"))["max-bandwidth"] == 8 << 20
    ready.site.director.go("a", "mirror")
    await ready.site.settle()
    wire = attempt.wire()
    assert wire["outcome"] == "destination"
    assert (wire["progress"]["percent"], wire["progress"]["current_bytes"]) == (100, wire["progress"]["whole_bytes"])
    assert wire["progress"]["whole_bytes"] >= 2 * (3 << 20)


async def test_a_cancel_in_the_middle_of_the_drain(make_site: MakeSite) -> None:
    ready = await moved(make_site)
    ready.site.director.script("a", {"drain": "hold"})
    attempt = await ready.migrate()
    await ready.site.director.reached("a", "drain")
    await ready.site.command("a", "vm-cancel", vm="d")
    await ready.back_unharmed(attempt)
    assert attempt.wire()["status"] == "cancelled"
    assert Fact.DISKS_DRAINED not in attempt.facts


async def test_a_destination_that_does_not_take_the_rest_holds_the_guest_up_for_seconds_only(
    make_site: MakeSite,
) -> None:
    clock = JumpClock()
    ready = await moved(make_site, clock=clock)
    ready.site.director.script("a", {"drain": "hold"})
    attempt = await ready.migrate()
    await ready.site.director.reached("a", "drain", times=2)
    clock.leap(DRAIN_S + 3)
    await ready.back_unharmed(attempt, "M-drain")
    assert Fact.CONTINUE not in attempt.facts


@pytest.mark.parametrize("host", ["a", "b"])
@pytest.mark.parametrize("tls", [False, True])
async def test_an_agent_that_begins_anew_goes_on_with_the_disks(make_site: MakeSite, host: str, tls: bool) -> None:
    ready = await moved(make_site, tls=tls)
    ready.site.director.script("a", {"mirror": "hold"})
    attempt = await ready.migrate()
    await ready.site.until_row(attempt, "P-copying")
    await ready.site.restart(host)
    ready.site.director.script("a")
    for _ in range(2):
        await ready.site.director.reached("a", "mirror")
        ready.site.director.go("a", "mirror")
    await ready.site.settle()
    assert ready.site.attempt(vm="d").wire()["outcome"] == "destination", ready.site.attempt(vm="d").wire()
    await ready.site.check("b", "d")


async def test_a_link_that_is_down_when_the_disks_are_ready_is_waited_for(make_site: MakeSite) -> None:
    """Hours of copying are not thrown away for it: the mirrors need no agent."""
    ready = await moved(make_site)
    ready.site.director.script("a", {"mirror": "hold"})
    attempt = await ready.migrate()
    await ready.site.until_row(attempt, "P-copying")
    ready.site.part()
    ready.site.director.script("a")
    ready.site.director.go("a", "mirror")
    await ready.site.noted_by("a", Fact.DISKS_READY)
    await ready.site.until(lambda: ready.site.did.count(("a", "start")) > 1)
    assert Fact.ERROR not in attempt.facts
    ready.site.join()
    await ready.site.settle()
    wire = attempt.wire()
    assert wire["outcome"] == "destination", wire
    assert wire["images_left"] == [str(path) for path in ready.here]
    await ready.site.check("b", "d")


SOURCE_FACTS = [Fact.DISKS_WANTED, Fact.DISKS_STARTED, Fact.DISKS_READY, Fact.STARTED, Fact.SWITCHOVER,
                Fact.DISKS_DRAINED, Fact.CONTINUE, Fact.COMMITTED]  # fmt: skip
PLACE_FACTS = [Fact.DISKS_SERVED, Fact.LISTENING, Fact.LOADED, Fact.DISKS_CLOSED, Fact.COMMITTED]


@pytest.mark.parametrize(
    ("host", "fact"), [*(("a", fact) for fact in SOURCE_FACTS), *(("b", fact) for fact in PLACE_FACTS)]
)
@pytest.mark.parametrize("version", ["7.2", "11.1"])
async def test_an_agent_that_dies_at_any_step(make_site: MakeSite, host: str, fact: Fact, version: str) -> None:
    """Wherever it dies, the guest is whole on one side, with its disks, and nothing is left on the other."""
    ready = await moved(make_site, version, version)
    ready.site.crash_at(host, fact)
    await ready.migrate()
    await ready.site.noted_by(host, fact)
    await ready.site.restart(host)
    await ready.site.settle()
    outcome = ready.site.agents["a"].results[ready.site.attempt(vm="d").job]["outcome"]
    await ready.site.check("a" if outcome == "source" else "b", "d")
    names = sorted(path.name for path in ready.folder.iterdir())
    are_whole = outcome == "destination" or (host, fact) == ("a", Fact.STARTED)  # of use for a second try
    assert names == (["d0.img", "d1.img"] if are_whole else []), (outcome, names)
    assert all(path.exists() for path in ready.here)


@pytest.mark.parametrize("step", ["mirror", "drain"])
async def test_the_destinations_qemu_dies(make_site: MakeSite, step: str) -> None:
    ready = await moved(make_site)
    ready.site.director.script("a", {step: "hold"})
    attempt = await ready.migrate()
    await ready.site.director.reached("a", step)
    await ready.site.director.kill(ready.site.director.newest("b"))
    await ready.back_unharmed(attempt)


async def test_the_sources_qemu_dies_while_its_disks_are_on_their_way(make_site: MakeSite) -> None:
    ready = await moved(make_site)
    ready.site.director.script("a", {"mirror": "hold"})
    attempt = await ready.migrate()
    await ready.site.director.reached("a", "mirror")
    await ready.site.director.kill(ready.site.director.newest("a"))
    await ready.site.settle()
    assert attempt.wire()["outcome"] == "lost"
    assert not list(ready.folder.iterdir())
    assert all(path.exists() for path in ready.here)


async def test_both_sides_are_read_and_compared_while_the_guest_is_paused(make_site: MakeSite) -> None:
    """The fakes move no bytes: both images are empty, and so equal, until somebody writes to one."""
    ready = await moved(make_site)
    ready.site.director.script("a", {"drain": "hold"})
    attempt = await ready.migrate(verify_disks=True)
    await ready.site.director.reached("a", "drain")
    with ready.there[1].open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"x")
    ready.site.director.script("a")
    ready.site.director.go("a", "drain")
    await ready.back_unharmed(attempt, "disk1", "the copy differs")
    attempt = await ready.migrate(verify_disks=True)
    await ready.site.settle()
    assert attempt.wire()["outcome"] == "destination", attempt.wire()
    assert any("read and compared" in row["what"] for row in attempt.wire()["timeline"])
    await ready.site.check("b", "d")


def test_a_digest_is_of_the_bytes_and_not_of_the_holes(tmp_path: Path) -> None:
    holes, zeroes, other, longer = (tmp_path / name for name in ("holes", "zeroes", "other", "longer"))
    for path in (holes, zeroes, other, longer):
        path.write_bytes(b"a" * 10)
        os.truncate(path, 5 << 20)
    with zeroes.open("r+b") as file:
        file.seek(1 << 20)
        file.write(bytes(3 << 20))
    with other.open("r+b") as file:
        file.seek(4 << 20)
        file.write(b"b")
    os.truncate(longer, (5 << 20) + 1)
    found = [images.digest(str(path)) for path in (holes, zeroes, other, longer)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_a_file_of_another_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_text("somebody's")
    assert not images.remove(str(path), (1, 2), job="j")
    assert not images.remove(str(path), None, job="j")
    assert path.read_text() == "somebody's"
    found = path.stat()
    assert images.remove(str(path), (found.st_dev, found.st_ino), job="j")
    assert images.remove(str(path), (found.st_dev, found.st_ino), job="j"), "twice is once"


BACK: dict[str, Any] = {"disk": ["disk0=copy", "disk1=copy"], "only-changes": True}


async def gone(make_site: MakeSite, *versions: str) -> Moved:
    """The guest is on b, and has written 5 MiB to each of its disks."""
    ready = await moved(make_site, *versions)
    attempt = await ready.migrate()
    await ready.site.settle()
    assert attempt.wire()["outcome"] == "destination"
    ready.site.director.change("b", wrote=5 << 20)
    return ready


@pytest.mark.parametrize(("source", "destination"), [("7.2", "7.2"), ("11.1", "11.1")])
@pytest.mark.proves("S96", "S114")
async def test_a_guest_goes_back_in_rounds(make_site: MakeSite, source: str, destination: str) -> None:
    """What it wrote over there, and no whole disk, into what it left."""
    ready = await gone(make_site, source, destination)
    origin = await ready.site.command("b", "vm-origin", vm="d")
    assert (origin["host"], [disk["changed_bytes"] for disk in origin["disks"]]) == ("a", [5 << 20] * 2)
    looks = [images.stamp(str(path)) for path in ready.here]
    back = await ready.site.migrate("a", vm="d", **BACK)
    await ready.site.settle()
    wire = back.wire()
    assert (wire["status"], wire["outcome"]) == ("completed", "destination"), wire
    assert [row["current-progress"] for row in wire["disks"]] == [5 << 20] * 2
    assert {row["type"] for row in wire["disks"]} == {"backup"}
    assert [images.stamp(str(path)) for path in ready.here] == looks, "they are those that were left"
    disks = ready.site.agents["a"].vms["d"].definition.disks
    assert {disk.path for disk in disks} == {str(path) for path in ready.here}


@pytest.mark.parametrize("fact", [Fact.DISKS_STARTED, Fact.DISKS_READY, Fact.STARTED, Fact.SWITCHOVER])
@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.proves("S96", "S114", "S123")
async def test_an_agent_that_dies_on_the_way_back_goes_on_with_the_rounds(
    make_site: MakeSite, version: str, fact: Fact
) -> None:
    ready = await gone(make_site, version, version)
    ready.site.crash_at("b", fact)
    job = (await ready.site.migrate("a", vm="d", **BACK)).job
    await ready.site.noted_by("b", fact)
    await ready.site.restart("b")
    await ready.site.settle()
    outcome = ready.site.agents["b"].results[job]["outcome"]
    await ready.site.check("b" if outcome == "source" else "a", "d")
    assert all(path.exists() for path in ready.here), "what was left there is kept, whatever became of the try"
    if outcome == "source":
        again = await ready.site.migrate("a", vm="d", **BACK)
        await ready.site.settle()
        assert again.wire()["outcome"] == "destination", again.wire()


@pytest.mark.parametrize("version", ["7.2", "11.1"])
@pytest.mark.proves("S96", "S114")
async def test_a_round_that_fails_leads_back_and_the_image_is_still_of_use(make_site: MakeSite, version: str) -> None:
    ready = await gone(make_site, version, version)
    ready.site.director.script("b", {"round": "fail"}, wrote=5 << 20)
    failed = await ready.site.migrate("a", vm="d", **BACK)
    await ready.site.settle()
    assert failed.wire()["outcome"] == "source"
    assert all(path.exists() for path in ready.here)
    ready.site.director.script("b", wrote=5 << 20)
    again = await ready.site.migrate("a", vm="d", **BACK)
    await ready.site.settle()
    assert again.wire()["outcome"] == "destination", again.wire()


@pytest.mark.proves("S96", "S114")
async def test_what_somebody_has_touched_is_not_written_to(make_site: MakeSite) -> None:
    ready = await gone(make_site, "11.1", "11.1")
    ready.here[0].write_bytes(b"somebody's")
    refused = await ready.site.migrate("a", vm="d", **BACK)
    await ready.site.settle()
    assert "touched" in str(refused.wire()["error"])
    assert ready.here[0].read_bytes() == b"somebody's"
    await ready.site.check("b", "d")


@pytest.mark.proves("S96", "S114")
async def test_a_second_try_goes_in_rounds(make_site: MakeSite) -> None:
    ready = await moved(make_site, "11.1", "11.1")
    ready.site.director.script("a", {"drain": "fail"})
    failed = await ready.migrate()
    await ready.back_unharmed(failed)
    ready.site.director.script("a", wrote=1 << 20)
    again = await ready.migrate()
    await ready.site.settle()
    wire = again.wire()
    assert wire["outcome"] == "destination", wire
    assert [row["current-progress"] for row in wire["disks"]] == [1 << 20] * 2
    assert len(list(ready.folder.iterdir())) == 2


async def let_go(make_site: MakeSite, *, keep_ms: int = 0) -> Moved:
    """The guest went, and what it left need not be kept longer than that."""
    ready = await moved(make_site, "11.1", "11.1")
    await ready.migrate(**{"keep-images-ms": keep_ms})
    return ready


@pytest.mark.proves("S114")
async def test_what_a_guest_left_is_removed_when_it_runs_elsewhere(make_site: MakeSite) -> None:
    ready = await let_go(make_site)
    await ready.site.settle()
    tending = ready.site.agents["a"].left_images._tending
    assert tending is not None
    await asyncio.wait_for(tending, 20)  # it ends when nothing is left to be let go
    assert not any(path.exists() for path in ready.here)
    assert all(path.exists() for path in ready.there)
    plan = await ready.site.command("b", "vm-plan", vm="d", destination="a", **BACK)
    assert [each["code"] for each in plan["objections"] if each["weight"] == "blocker"] == ["disk-not-left"] * 2


@pytest.mark.parametrize("why", ["open", "changed", "another agent is away", "the guest stands"])
@pytest.mark.proves("S114")
async def test_what_a_guest_left_is_not_removed_on_ignorance(
    make_site: MakeSite, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = await let_go(make_site, keep_ms=3_600_000)
    await ready.site.settle()
    agent = ready.site.agents["a"]
    kept = agent.left_images
    lefts = [replace(left, let_go_s=0.0) for left in kept._left.values()]
    assert len(lefts) == 2
    kept._left = {left.path: left for left in lefts}
    match why:
        case "open":
            monkeypatch.setattr(images, "image_locks", lambda path: ImageLocks(frozenset({"write"}), frozenset(), ()))
        case "changed":
            for path in ready.here:
                path.write_bytes(b"somebody's")
        case "another agent is away":

            def away(host: str) -> None:
                raise HostUnreachable(f"{host} does not answer")

            monkeypatch.setattr(agent.peers, "link", away)
        case _:
            await ready.site.agents["b"].vms["d"].require_machine().execute("stop")
    for left in lefts:
        await kept._try_let_go(left)
    assert all(path.exists() for path in ready.here)
    assert list(kept._left) == ([] if why == "changed" else [left.path for left in lefts])


@pytest.mark.proves("S114", "S123")
async def test_an_agent_that_begins_anew_knows_what_was_left(make_site: MakeSite) -> None:
    ready = await let_go(make_site, keep_ms=3_600_000)
    await ready.site.settle()
    before = dict(ready.site.agents["a"].left_images._left)
    assert len(before) == 2
    ready.here[1].unlink()
    await ready.site.restart("a")
    assert ready.site.agents["a"].left_images._left == {
        path: left for path, left in before.items() if path == str(ready.here[0])
    }
    await ready.site.restart("a")
    assert len(ready.site.agents["a"].left_images._left) == 1


@pytest.mark.proves("S114")
async def test_what_a_second_try_has_filled_is_the_guests_disk_and_no_copy_any_more(make_site: MakeSite) -> None:
    """Else: 1. the guest writes nothing to it  2. it is stopped  3. the copy's time is over: its disk is deleted."""
    ready = await moved(make_site, "11.1", "11.1")
    ready.site.director.script("a", {"drain": "fail"})
    await ready.back_unharmed(await ready.migrate())
    there = ready.site.agents["b"].left_images
    assert sorted(there._left) == [str(path) for path in ready.there]
    ready.site.director.script("a")
    again = await ready.migrate()
    await ready.site.settle()
    assert again.wire()["outcome"] == "destination"
    assert there._left == {}
    await ready.site.restart("b")
    assert ready.site.agents["b"].left_images._left == {}


@pytest.mark.proves("S96", "S114")
async def test_a_base_that_was_read_and_differs_is_none_any_more(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = await gone(make_site, "11.1", "11.1")
    monkeypatch.setattr(images, "digest", lambda path: path)
    failed = await ready.site.migrate("a", vm="d", **{**BACK, "verify-disks": True})
    await ready.site.settle()
    assert "the copy differs" in str(failed.wire()["error"])
    await ready.site.check("b", "d")
    with pytest.raises(PlanRefused, match="did not come here with its disks"):
        await ready.site.command("b", "vm-origin", vm="d")
