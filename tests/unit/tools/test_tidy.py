"""The house rules: each finds its breach, none finds one in clean code, and the ratchet turns one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tools import tidy
from tools.tidy import RULES, Finding, Source, dependencies, find, places, verdict
from tools.tidy_allowed import ALLOWED

AGENT = "src/vmferry/agent/plan.py"
CORE = "src/vmferry/core/facts.py"


def findings(path: str, text: str) -> set[tuple[str, str]]:
    source = Source(path, text, ast.parse(text))
    return {(finding.rule, finding.what) for rule in RULES for finding in rule(source)}


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        # Directions.
        (CORE, "from vmferry.agent.loop import x", ("direction", "vmferry.agent.loop")),
        ("src/vmferry/qmp/client.py", "from vmferry.vm.spec import x", ("direction", "vmferry.vm.spec")),
        ("src/vmferry/jobs/journal.py", "import vmferry.qmp", ("direction", "vmferry.qmp")),
        (AGENT, "from vmferry.cli import main", ("direction", "vmferry.cli")),
        (AGENT, "from vmferry.testing.relay import x", ("direction", "vmferry.testing.relay")),
        ("src/vmferry/cli/vm_cmd.py", "from vmferry.agent.agent import x", ("direction", "vmferry.agent.agent")),
        (CORE, "from . import view", ("relative-import", "from . import view")),
        (AGENT, "from vmferry.errors import *", ("star-import", "from vmferry.errors import *")),
        # Purity.
        (CORE, "import time", ("impure", "time")),
        (CORE, "from os import path", ("impure", "os")),
        (CORE, "import asyncio.events", ("impure", "asyncio.events")),
        ("src/vmferry/qmp/codec.py", "import socket", ("impure", "socket")),
        ("src/vmferry/errors.py", "print(1)", ("impure", "print")),
        # Sizes and imports.
        (AGENT, "def f():\n    import json", ("late-import", "json")),
        (AGENT, "\n" * 601, ("long-file", "file")),
        (AGENT, "def f():\n" + "    x = 1\n" * 70, ("long-function", "f")),
        # Decisions by status.
        (AGENT, "def f():\n    return a.status == 'x'", ("compares-status", "f")),
        (AGENT, "def f():\n    return source_status(log) is S.X", ("compares-status", "f")),
        (AGENT, "def f():\n    if word in ('active',): pass", ("compares-qemu-word", "f")),
        (AGENT, "def f():\n    match w:\n        case 'device': pass", ("compares-qemu-word", "f")),
        # One hand for effects, one funnel for facts.
        (AGENT, "def f():\n    match e:\n        case Effect.START: pass", ("matches-effect", "f")),
        (AGENT, "def f():\n    a.note(Fact.ERROR, text='x')", ("records-fact", "f")),
        (AGENT, "def f():\n    log.with_fact(x)", ("records-fact", "f")),
        # Sleeps.
        ("tests/unit/test_x.py", "def test_x():\n    time.sleep(1)", ("sleep", "test_x")),
        (AGENT, "async def f():\n    await asyncio.sleep(0.1)", ("sleep", "f")),
    ],
)
@pytest.mark.proves("S6")
def test_a_breach_is_found(path: str, text: str, expected: tuple[str, str]) -> None:
    assert findings(path, text) == {expected}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (CORE, "from vmferry.errors import x\nfrom vmferry.core.view import y\nimport re"),
        (AGENT, "from vmferry import __version__, limits\nfrom vmferry.core.facts import Fact"),
        (AGENT, "if TYPE_CHECKING:\n    from vmferry.agent.agent import Agent"),
        (AGENT, "def f():\n    if word == 'something else': pass"),
        ("src/vmferry/cli/agent_cmd.py", "from vmferry.agent.agent import Agent"),
        ("src/vmferry/agent/source_act.py", "match e:\n    case Effect.START:\n        a.note(Fact.STARTED)"),
        ("src/vmferry/core/status.py", "def f():\n    return derived.status is S.X"),
        ("src/vmferry/agent/observe.py", "def f():\n    match w:\n        case 'device': pass"),
        ("tests/unit/test_x.py", "def f():\n    while not done():\n        time.sleep(0.01)\n    import json"),
        (AGENT, "async def f():\n    await asyncio.sleep(0)"),
        (AGENT, "def f():\n" + "    x = 1\n" * 69),
        ("src/vmferry/__init__.py", "from vmferry.agent import x"),
    ],
)
def test_clean_code_is_clean(path: str, text: str) -> None:
    assert findings(path, text) == set()


def test_paths_of_a_machine_and_registries_are_found_in_any_text() -> None:
    machine = "/" + "work/" + "shared/x and /" + "root/y and /" + "home/somebody"
    assert [finding.rule for finding in places("README.md", machine)] == ["machine-path"] * 3
    registry = "py" + "pi.org"
    assert [finding.rule for finding in places("docs/x.md", f"see {registry}")] == ["registry-host"]
    assert not list(places("docs/x.md", "/var/lib/vmferry and $HOME/x and network/home/"))


def test_an_allowance_is_used_or_it_is_a_finding_itself() -> None:
    found = [Finding("a.py", 3, "sleep", "f"), Finding("a.py", 9, "sleep", "f"), Finding("b.py", 1, "sleep", "g")]
    assert verdict(found, {}) == ["a.py:3: sleep: f", "a.py:9: sleep: f", "b.py:1: sleep: g"]
    assert verdict(found[:2], {("sleep", "a.py", "f"): "because"}) == []
    (unused,) = verdict([], {("sleep", "a.py", "f"): "because"})
    assert "not needed any more" in unused
    (silent,) = verdict(found[:2], {("sleep", "a.py", "f"): " "})
    assert "no reason" in silent


def test_files_are_read_and_binary_ones_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import time\ntime.sleep(1)\n")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    assert find(tmp_path, ["a.py", "b.bin", "gone.py"]) == [Finding("a.py", 2, "sleep", "module")]


def test_a_dependency_without_a_decision_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs" / "decisions").mkdir(parents=True)
    (tmp_path / "docs" / "decisions" / "0010-msgspec.md").write_text("")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["msgspec>=0.20", "left-pad>=1"]\n')
    assert [finding.what for finding in dependencies(tmp_path)] == ["left-pad"]


@pytest.mark.proves("S1", "S6", "S91")
def test_this_tree_is_tidy() -> None:
    """No code path compares the public status to decide what to do, effects have one hand, facts one funnel."""
    assert verdict(find(tidy.ROOT, tidy.tracked(tidy.ROOT)), ALLOWED) == []
