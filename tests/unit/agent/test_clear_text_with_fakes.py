"""Guests' memory goes in clear text when a person asked for it by name, and only where no agent forbids it."""

from __future__ import annotations

from typing import Any

import pytest

from vmferry.core.facts import Fact
from vmferry.errors import NotTrusted
from vmferry.testing.fake_site import MakeSite, Site

FORBIDS = {"tls_only": True}


def told(wire: dict[str, Any]) -> tuple[bool, bool]:
    """(the notes say that it was in clear text, the timeline does)."""
    started = next(row for row in wire["timeline"] if row["what"] == Fact.STARTED)
    return any("in clear text" in note for note in wire["notes"]), "in clear text" in started.get("text", "")


def credentials(site: Site) -> list[bool]:
    """Which of the two QEMUs were set to use any."""
    sides = (site.attempt().plan.options.source_parameters, site.place().place.expected)  # type: ignore[union-attr]
    return [bool(options["tls-creds"]) for options in sides]


@pytest.mark.parametrize("clear", [False, True])
async def test_between_agents_with_certificates_it_is_in_clear_text_only_when_somebody_says_so(
    make_site: MakeSite, clear: bool
) -> None:
    site = await make_site(tls=True)
    plan = await site.command("a", "vm-plan", vm="g", destination="b", clear_text=clear)
    assert plan["possible"]
    assert [o["code"] for o in plan["objections"] if o["code"].startswith("clear")] == (["clear-text"] if clear else [])
    attempt = await site.migrate(clear_text=clear)
    await site.settle()
    assert attempt.wire()["status"] == "completed"
    assert told(attempt.wire()) == (clear, clear)
    assert credentials(site) == [not clear, not clear]
    assert site.place().place.clear_text is clear
    await site.check("b")


async def test_agents_in_clear_text_say_so_too(make_site: MakeSite) -> None:
    site = await make_site()
    attempt = await site.migrate()
    await site.settle()
    assert told(attempt.wire()) == (True, True)
    await site.check("b")


@pytest.mark.parametrize("host", ["a", "b"])
async def test_an_agent_that_forbids_it_is_a_blocker_in_words_on_either_side(make_site: MakeSite, host: str) -> None:
    site = await make_site(tls=True, settings={host: FORBIDS})
    plan = await site.command("a", "vm-plan", vm="g", destination="b", clear_text=True)
    assert not plan["possible"]
    attempt = await site.migrate(clear_text=True)
    await site.settle()
    error = attempt.wire()["error"]
    assert error["code"] == "refused"
    assert f"the agent of {host} takes no part in a migration in clear text" in error["message"]
    assert Fact.PREPARE not in attempt.facts
    await site.check("a")
    await site.migrate()
    await site.settle()
    await site.check("b")


async def test_a_place_without_credentials_is_refused_unless_clear_text_was_named_and_is_not_forbidden(
    make_site: MakeSite,
) -> None:
    """By itself: the agent that asks may be an old one, which looked at nothing. It is `a` that forbids here."""
    site = await make_site(tls=True, settings={"a": FORBIDS})
    definition = site.agents["a"].vms["g"].definition.to_wire()
    order = {"vm": "g", "job": "j1", "source": "a", "generation": 2, "definition": definition, "commands": [],
             "expected": {}}  # fmt: skip
    with pytest.raises(NotTrusted, match="nobody asked for clear text"):
        await site.agents["a"].peers.link("b").call("peer-prepare", order)
    assert site.agents["b"].places == {}
    with pytest.raises(NotTrusted, match="a takes no guest's memory in clear text"):
        await site.agents["b"].peers.link("a").call("peer-prepare", {**order, "vm": "h", "clear_text": True})
    assert site.agents["a"].places == {}
