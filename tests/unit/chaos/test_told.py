"""Facts out of an agent's log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vmferry.chaos.told import LogTail, facts_of, read_line, status_at, views_of
from vmferry.core.facts import Fact
from vmferry.core.view import Cpus, Grant, Source, SourceView, Target
from vmferry.model.pairs import PAIRS

DAY = "2026-01-02"


def line(second: int, text: str) -> str:
    return f"{DAY} 10:00:{second:02},250 INFO vmferry.agent {text}"


def fact(second: int, name: str, round_no: int = 0, vm: str = "g1") -> str:
    return line(second, f"job=j vm={vm} fact={name} round={round_no} by=QEMU text=''")


LOG = [
    line(0, "result=ready name=host-a"),
    fact(1, "migrate"),
    line(1, "job=j vm=g1 row=P-plan outcome=pending"),
    fact(2, "setup-done"),
    fact(3, "pause-before-switchover"),
    fact(4, "switchover"),
    fact(4, "switchover", vm="g2"),
    fact(5, "continue"),
]


def test_lines() -> None:
    said = [read_line(text) for text in LOG]
    assert [entry.kind for entry in said if entry] == ["ready", "fact", "row", "fact", "fact", "fact", "fact", "fact"]
    assert read_line("Traceback (most recent call last):") is None
    assert read_line(line(1, "command=vm-run")) is None


def test_the_status_at_a_moment_is_that_of_the_facts_up_to_it() -> None:
    said = [entry for text in LOG if (entry := read_line(text))]
    at = {entry.what: entry.at_s for entry in said}
    assert status_at(said, "g1") == "device"
    assert status_at(said, "g1", before_s=at["switchover"]) == "pre-switchover"
    assert status_at(said, "g1", before_s=at["setup-done"]) == "active"
    assert status_at(said, "g1", before_s=at["migrate"] - 1) == "none"
    assert Fact.CONTINUE not in facts_of(said, "g2")


def test_a_restart_begins_a_new_log() -> None:
    said = [entry for text in [*LOG, line(6, "result=ready"), fact(7, "migrate")] if (entry := read_line(text))]
    assert status_at(said, "g1") == "setup"


def test_a_file_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    tail = LogTail(path)
    assert tail.read() == []
    path.write_text(LOG[1] + "\n" + LOG[3][:20])
    assert tail.has("g1", Fact.MIGRATE)
    assert not tail.has("g1", Fact.SETUP_DONE)
    with path.open("a") as file:
        file.write(LOG[3][20:] + "\nTraceback (most recent call last):\n")
    assert tail.has("g1", Fact.SETUP_DONE)
    assert tail.troubles
    tail.forget()
    assert not tail.has("g1", Fact.MIGRATE)
    assert tail.rows("g1") == []


def test_what_the_table_was_asked_about() -> None:
    lines = [
        line(1, "job=j vm=g1 view=go started switching unknown loaded none none again given settled"),
        line(1, "job=j vm=g2 view=go new idle unknown prepared none none again given settled"),
        fact(2, "cancel"),
        line(3, "job=j vm=g1 view=back started back as-before gone none none again given settled"),
    ]
    said = [entry for text in lines if (entry := read_line(text))]
    (first, cancelled_first), (second, cancelled_second) = views_of(said, "g1")
    assert (first.source, first.target, cancelled_first) == (Source.SWITCHING, Target.LOADED, False)
    assert (second.source, second.cpus, cancelled_second) == (Source.BACK, Cpus.AS_BEFORE, True)

    def pairs(view: SourceView, *, in_postcopy: bool, is_cancelled: bool) -> list[str]:
        return [p.name for p in PAIRS if p.holds(view, in_postcopy=in_postcopy, is_cancelled=is_cancelled)]

    assert pairs(first, in_postcopy=False, is_cancelled=False) == ["P5"]
    assert pairs(first, in_postcopy=True, is_cancelled=False) == ["P13"]
    assert pairs(second, in_postcopy=False, is_cancelled=True) == []  # no grant was under way: nothing of P27
    held = replace(second, grant=Grant.HELD)
    assert pairs(held, in_postcopy=False, is_cancelled=True) == ["P27"]
    assert pairs(second, in_postcopy=False, is_cancelled=False) == ["P23"]
    stuck = replace(held, cpus=Cpus.STUCK)
    assert pairs(stuck, in_postcopy=False, is_cancelled=False) == ["P24"]
