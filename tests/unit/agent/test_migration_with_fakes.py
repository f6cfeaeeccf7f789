"""Two real agents move a guest between fake QEMUs: the ordinary ways, odd words, refusals, options, replay."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.agent import source as source_attempt
from vmferry.agent.machine import Machine
from vmferry.agent.vms import VmDefinition
from vmferry.core.facts import Fact, FactLog
from vmferry.core.source_rows import SILENT_MS
from vmferry.core.status import source_status
from vmferry.errors import Busy, CancelRefused, PlanRefused
from vmferry.jobs.journal import Entry
from vmferry.testing.fake_site import JumpClock, MakeSite, Site

PAIRS = [("7.2", "7.2"), ("11.1", "11.1"), ("7.2", "11.1"), ("11.1", "7.2")]
LOCK = 'Failed to get "write" lock'


def ended(site: Site) -> tuple[str, str]:
    wire = site.attempt().wire()
    return str(wire["status"]), str(wire["outcome"])


@pytest.mark.parametrize(("source", "destination"), PAIRS)
@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.proves("S2", "S19", "S46")
async def test_a_guest_moves(make_site: MakeSite, source: str, destination: str, mode: str) -> None:
    site = await make_site(source, destination)
    attempt = await site.migrate(mode=mode)
    await site.settle()
    assert ended(site) == ("completed", "destination")
    assert attempt.wire()["mode"] == mode
    await site.check("b")


@pytest.mark.proves("S84")
async def test_and_back_again_in_an_attempt_of_its_own(make_site: MakeSite) -> None:
    """A host that has taken the guest in sends it away in a fresh attempt, whatever its QEMU says of the arrival."""
    site = await make_site("11.1", "7.2")
    first = await site.migrate()
    await site.settle()
    second = await site.migrate("a", mode="postcopy")
    arrived = site.place("b")
    await site.settle()
    await site.check("a")
    assert (arrived.job, first.job) == (first.job, arrived.job) != (second.job, first.job)
    assert second.wanted.generation == first.wanted.generation + 1
    assert second.facts.entries[0].fact is Fact.MIGRATE, "nothing of the arrival is in it"
    assert arrived.facts.entries[0].fact is Fact.PREPARE
    assert second.wire()["outcome"] == "destination"


@pytest.mark.proves("S130")
async def test_wait_unplug_is_shown_and_survived(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"setup": {"show": "wait-unplug"}})
    attempt = await site.migrate()
    await site.noted_by("a", Fact.UNPLUG_WAIT)
    assert attempt.wire()["status"] == "wait-unplug"
    site.director.go("a", "setup")
    await site.settle()
    assert ended(site) == ("completed", "destination")
    await site.check("b")


@pytest.mark.proves("S90")
async def test_the_wait_for_devices_is_a_fact_and_shown(make_site: MakeSite) -> None:
    site = await make_site("11.1")
    site.director.script("b", {"in-ack": "hold"})
    attempt = await site.migrate(settings=["switchover-ack=on"])
    await site.director.reached("b", "in-ack")
    await site.noted_by("a", Fact.SETUP_DONE)
    waiting = attempt.wire()
    assert (waiting["status"], waiting["waits_for_devices"]) == ("active", True)
    assert waiting["sentence"] == "g moves from a to b: active; it waits until its devices on b are ready."
    assert Fact.DEVICES_READY not in attempt.facts
    site.director.go("b", "in-ack")
    await site.settle()
    facts = [entry.fact for entry in attempt.facts]
    assert facts.index(Fact.SWITCHOVER_ACK) < facts.index(Fact.DEVICES_READY) < facts.index(Fact.SWITCHOVER)
    assert (ended(site), attempt.wire()["waits_for_devices"]) == (("completed", "destination"), False)
    await site.check("b")


@pytest.mark.proves("S90")
async def test_a_restarted_agent_knows_that_devices_are_waited_for(make_site: MakeSite) -> None:
    site = await make_site("11.1")
    site.director.script("b", {"in-ack": "hold"})
    await site.migrate(settings=["switchover-ack=on"])
    await site.director.reached("b", "in-ack")
    await site.noted_by("a", Fact.SETUP_DONE)
    await site.restart("a")
    assert site.attempt().wire()["waits_for_devices"] is True
    site.director.go("b", "in-ack")
    await site.settle()
    assert ended(site) == ("completed", "destination")
    await site.check("b")


VFIO = 'extra_args = ["-device", "vfio-pci,id=hostdev0,host=0000:01:00.0"]'


@pytest.mark.proves("S90")
async def test_a_passed_through_device_is_waited_for_unasked_and_refused_for_postcopy(make_site: MakeSite) -> None:
    site = await make_site("11.1")
    await site.run_vm("v", more=VFIO)
    refused = await site.migrate(vm="v", mode="postcopy")
    await site.settle()
    assert refused.wire()["error"]["code"] == PlanRefused("").to_wire()["code"]
    assert "passed-through" in refused.wire()["error"]["message"]
    assert not site.agents["b"].places, "nothing was begun"
    attempt = await site.migrate(vm="v")
    await site.settle()
    assert {Fact.SWITCHOVER_ACK, Fact.DEVICES_READY} <= {entry.fact for entry in attempt.facts}
    assert attempt.wire()["outcome"] == "destination"
    await site.check("b", "v")


async def test_a_word_nobody_has_heard_of_is_a_fact_and_no_error(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"setup": {"show": "reticulating"}})
    attempt = await site.migrate()
    await site.noted_by("a", Fact.UNKNOWN_STATUS)
    assert attempt.facts.entry(Fact.UNKNOWN_STATUS, 1).text == "reticulating"  # type: ignore[union-attr]
    site.director.go("a", "setup")
    await site.settle()
    assert Fact.ERROR not in attempt.facts
    assert ended(site) == ("completed", "destination")
    await site.check("b")


@pytest.mark.proves("S129")
async def test_the_colo_word_is_a_fact_and_harms_nobody(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"setup": {"show": "colo"}})
    attempt = await site.migrate()
    await site.noted_by("a", Fact.COLO)
    await site.command("a", "vm-cancel", vm="g")
    await site.settle()
    assert Fact.ERROR not in attempt.facts
    assert ended(site) == ("cancelled", "source")
    await site.check("a")


@pytest.mark.parametrize("source", ["7.2", "11.1"])
@pytest.mark.proves("S66")
async def test_a_cancel_frees_a_qemu_that_is_silent_in_the_switchover(make_site: MakeSite, source: str) -> None:
    site = await make_site(source)
    site.director.script("a", {"device": "silent"})
    await site.migrate()
    await site.director.reached("a", "device")
    await site.command("a", "vm-cancel", vm="g")
    await site.settle()
    assert ended(site) == ("cancelled", "source")
    await site.check("a")


@pytest.mark.parametrize("source", ["7.2", "11.1"])
async def test_a_silent_switchover_is_given_up_after_its_time(
    make_site: MakeSite, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_attempt, "SILENT_S", 0.2)
    clock = JumpClock()
    site = await make_site(source, clock=clock)
    site.director.script("a", {"device": "silent"})
    attempt = await site.migrate()
    await site.until_row(attempt, "C-wait-load")
    clock.leap(2.0)  # the next look is due, and finds that QEMU does not answer
    attempt.wake()
    await site.until_row(attempt, "M-silent")
    clock.leap(SILENT_MS / 1000)
    attempt.wake()
    await site.settle()
    assert ended(site) == ("failed", "source")
    await site.check("a")


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.proves("S35", "S39", "S40", "S45")
async def test_a_refused_start_brings_the_guest_back_with_the_words(make_site: MakeSite, mode: str) -> None:
    site = await make_site()
    site.director.script("b", cont=LOCK)
    await site.migrate(mode=mode)
    await site.settle()
    assert ended(site) == ("failed", "source")
    assert LOCK in str(site.attempt().wire()["error"])
    await site.check("a")


@pytest.mark.proves("S36", "S53")
async def test_a_guest_that_only_looked_stuck_goes_on(make_site: MakeSite) -> None:
    """1. an old QEMU says that its migration failed, and is still in finish-migrate  2. that is read  3. it goes on to
    postmigrate, of which it has no event  4. what leads a stuck one out finds that it is none."""
    site = await make_site("7.2", "7.2")
    site.director.script("a", {"package": "fail", "postmigrate": "hold"})
    attempt = await site.migrate(mode="postcopy")
    await site.until_row(attempt, "B-stuck")
    site.director.go("a", "postmigrate")
    await site.settle()
    assert ended(site) == ("failed", "source")
    await site.check("a")


@pytest.mark.parametrize("host", ["a", "b"])
@pytest.mark.parametrize("how", ["refuse", "wrong"])
@pytest.mark.proves("S70")
async def test_an_option_that_is_not_taken_stops_everything(make_site: MakeSite, host: str, how: str) -> None:
    site = await make_site()
    name = "downtime-limit" if host == "a" else "announce-rounds"
    site.director.script(host, **{how: {name: 77 if how == "wrong" else "no such thing"}})
    attempt = await site.migrate(settings=["announce-rounds=4", "downtime-limit=250ms"])
    await site.settle()
    assert Fact.STARTED not in attempt.facts
    assert ended(site) == ("failed", "source")
    assert (name if how == "wrong" else "no such thing") in str(attempt.wire()["error"])
    site.director.script(host)
    await site.check("a")
    await site.migrate()
    await site.settle()
    await site.check("b")


async def test_a_second_migration_is_refused(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"active": "hold"})
    await site.migrate()
    await site.noted_by("a", Fact.SETUP_DONE)
    with pytest.raises(Busy):
        await site.migrate()
    site.director.go("a", "active")
    await site.settle()
    await site.check("b")


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.proves("S35", "S51")
async def test_the_commit_is_durable_before_its_effects(make_site: MakeSite, mode: str) -> None:
    site = await make_site()
    written: dict[str, list[Entry]] = {}

    def look(host: str) -> None:
        written[host] = [entry.kind for entry in site.agents[host].journal.read()]

    site.when("a", Fact.GRANT_SENT, lambda: look("a"))
    site.when("b", Fact.START_SENT, lambda: look("b"))
    await site.migrate(mode=mode)
    await site.settle()
    assert Entry.COMMITTED in written["a"]
    assert Entry.COMMITTED in written["b"]
    order = [
        ("a", Fact.TARGET_READY), ("a", Fact.CONTINUE), ("a", Fact.COMMITTED), ("a", Fact.GRANT_SENT),
        ("b", Fact.COMMITTED), ("b", Fact.START_SENT), ("b", Fact.TARGET_RAN), ("a", Fact.RUN_ACKED),
        ("a", Fact.SOURCE_RETIRED),
    ]  # fmt: skip
    places = [site.noted.index(step) for step in order]
    assert places == sorted(places)
    assert site.noted.index(("b", Fact.LOADED)) < site.noted.index(("b", Fact.START_SENT))


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.parametrize("source", ["7.2", "11.1"])
@pytest.mark.proves("S1", "S2", "S3", "S20", "S63")
async def test_the_log_replays_the_statuses(make_site: MakeSite, source: str, mode: str) -> None:
    site = await make_site(source)
    told: list[dict[str, Any]] = []
    publish = site.agents["a"].publish

    def listening(name: str, data: dict[str, Any]) -> None:
        if name == "MIGRATION":
            told.append(data)
        publish(name, data)

    site.agents["a"].publish = listening  # type: ignore[method-assign]
    attempt = await site.migrate(mode=mode)
    await site.settle()
    log, replayed, facts = FactLog(), [], []
    for entry in attempt.facts:
        before = source_status(log)
        log = log.with_fact(entry.fact, round_no=entry.round, text=entry.text, at_s=entry.at_s, by=entry.by)
        if source_status(log) is not before:
            replayed.append(source_status(log).value)
            facts.append(entry.fact)
    assert [data["status"] for data in told] == replayed
    assert all(data["because"] for data in told)
    middle = ["postcopy-device", "postcopy-active"] if mode == "postcopy" else []
    assert replayed == ["setup", "active", "pre-switchover", "device", *middle, "completed"]
    assert len(facts) == len(set(facts))


async def test_a_grant_is_counted_once_and_an_old_one_is_refused(make_site: MakeSite) -> None:
    site = await make_site()
    site.director.script("a", {"pages": "hold"})
    site.director.script("b", {"in-load": "hold"})
    attempt = await site.migrate(mode="postcopy")
    await site.director.reached("b", "in-load")
    link = site.agents["a"].peers.link("b")
    order = {"job": attempt.job, "generation": attempt.wanted.generation}
    with pytest.raises(Busy):
        await link.call("peer-grant", {**order, "generation": attempt.wanted.generation - 1})
    assert Fact.COMMITTED not in site.place().facts
    site.director.go("b", "in-load")
    await site.noted_by("a", Fact.RUN_ACKED)
    again = await link.call("peer-grant", order)
    assert again["ran"]
    assert site.director.newest("b").steps.count("cont") == 1
    with pytest.raises(CancelRefused):
        await site.command("a", "vm-cancel", vm="g")
    released = await link.call("peer-release", order)
    assert (released["ran"], released["gone"]) == (True, False)
    assert [p.host for p in site.director.running("g")] == ["b"]
    await site.pages_arrive()


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
@pytest.mark.proves("S71", "S81")
async def test_options_come_before_the_listener_and_none_after_it(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The destination starts without an address; what it is set to before it listens is what it loads with."""
    said: list[tuple[int, str]] = []
    execute = Machine.execute

    async def noted(machine: Machine, command: str, *arguments: Any, **more: Any) -> Any:
        said.append((machine.pid, command))
        return await execute(machine, command, *arguments, **more)

    monkeypatch.setattr(Machine, "execute", noted)
    site = await make_site("11.1", "11.1")
    await site.migrate(mode=mode)
    await site.settle()
    place = site.place()
    assert place.machine is not None
    commands = [command for pid, command in said if pid == place.machine.pid]
    listening, started = commands.index("migrate-incoming"), commands.index("cont")
    setters = {"migrate-set-capabilities", "migrate-set-parameters"}
    assert setters <= set(commands[:listening])
    assert not setters & set(commands[listening:started])
    argv = VmDefinition.from_wire(place.place.definition).incoming_argv(place.runtime, "qemu")
    assert argv[argv.index("-incoming") + 1] == "defer"
    assert "-S" in argv
