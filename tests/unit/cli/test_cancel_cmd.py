"""`vmferry cancel`: 0 means that the migration is cancelled, and nothing else does."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest

from vmferry.cli import client, migrate_cmd
from vmferry.cli.main import main
from vmferry.errors import MigrationCancelled, MigrationFailed

CANCELLED, FAILED = MigrationCancelled("cancelled").to_wire(), MigrationFailed("the cable").to_wire()


def ended(status: str, outcome: str, error: Any = None, *, over: bool = True) -> dict[str, Any]:
    return {
        "vm": "web1", "job": "1" * 32, "status": status, "outcome": outcome, "over": over, "error": error,
        "sentence": f"web1 is {status}.",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wire", "code", "words"),
    [
        (ended("cancelled", "source", CANCELLED), 0, "cancelled"),
        (ended("failed", "source", FAILED), 11, "the cable"),
        (ended("completed", "destination"), 18, "nothing is left to cancel: web1 is completed."),
        (ended("cancelling", "pending", over=False), 9, "the cancel is not over yet"),
    ],
    ids=lambda each: each["status"] if isinstance(each, dict) else None,
)
@pytest.mark.proves("S14", "S34")
def test_its_exit_code(
    wire: dict[str, Any],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def execute(*question: Any, **more: Any) -> dict[str, Any]:
        return wire

    def follow(*question: Any, **more: Any) -> dict[str, Any]:
        return wire

    monkeypatch.setattr(client, "connect", nullcontext)
    monkeypatch.setattr(client, "execute", execute)
    monkeypatch.setattr(migrate_cmd, "follow", follow)
    assert main(["cancel", "web1", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert words in told["error"]["message"]
    assert told["status"] == wire["status"]
    assert main(["cancel", "web1"]) == code
    if code == 18:
        assert words.partition(":")[0] in capsys.readouterr().err
