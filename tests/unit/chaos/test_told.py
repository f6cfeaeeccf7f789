"""Facts out of an agent's log."""

from __future__ import annotations

from pathlib import Path

from vmferry.chaos.told import LogTail, facts_of, read_line, status_at
from vmferry.core.facts import Fact

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
