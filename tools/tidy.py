"""House rules that no linter knows, checked over every tracked file.

    python tools/tidy.py           exit 1 and one line per finding

Theory of operation
-------------------
Each rule is a function from one parsed file to findings; a finding has a rule, a file and a *what* that stays
the same when lines move. `tidy_allowed.ALLOWED` lists the findings that may stay, each with its reason.

Rule 1: a ratchet, not an amnesty: an allowance that is not needed any more is a finding itself.
Rule 2: ceilings are ceilings for everything, the tools and tests included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.tidy_allowed import ALLOWED
from vmferry.core.migration_status import MigrationStatus

ROOT: Final = Path(__file__).resolve().parent.parent
FILE_LINES_MAX: Final = 600
FUNCTION_LINES_MAX: Final = 70

_BASE: Final = frozenset({"errors", "units", "clock", "limits"})
_DOERS: Final = frozenset({"qmp", "vm", "jobs", "pki", "store"})
MAY_IMPORT: Final[Mapping[str, frozenset[str]]] = {
    "errors": frozenset(),
    "units": frozenset(),
    "clock": frozenset(),
    "limits": frozenset(),
    "core": frozenset({"errors", "units", "limits"}),
    "wire": frozenset({"errors", "units", "limits"}),
    **{doer: _BASE | {doer} for doer in _DOERS},
    "engine": _BASE | {"core", "wire"},
    "model": frozenset({"core"}),
    "agent": _BASE | _DOERS | {"core", "wire", "engine"},
    "cli": _BASE | {"core", "qmp", "pki"},
    "testing": _BASE | _DOERS | {"core", "wire", "engine", "agent"},
    "demo": _BASE | _DOERS | {"core", "wire", "engine", "agent", "cli", "testing"},
    "bench": _BASE | _DOERS | {"core", "wire", "engine", "agent", "cli", "testing", "demo"},
    "chaos": _BASE | _DOERS | {"core", "model", "wire", "engine", "agent", "cli", "testing", "demo", "bench"},
}
"""Room -> the rooms it may import besides itself. Doers never meet; only testing, demo and bench see testing."""
INTRODUCERS: Final[Mapping[str, frozenset[str]]] = {
    "src/vmferry/cli/agent_cmd.py": frozenset({"agent"}),
    "src/vmferry/cli/demo_cmd.py": frozenset({"agent", "demo", "bench"}),
    "src/vmferry/cli/inspect_cmd.py": frozenset({"wire"}),
    "src/vmferry/cli/model_cmd.py": frozenset({"agent", "model"}),
    "src/vmferry/cli/chaos_cmd.py": frozenset({"chaos"}),
    "src/vmferry/cli/bench_cmd.py": frozenset({"agent", "demo", "bench"}),
}
"""The commands that run another room instead of asking an agent."""

PURE: Final = ("src/vmferry/core/", "src/vmferry/wire/", "src/vmferry/qmp/codec.py", "src/vmferry/agent/observe.py",
               "src/vmferry/errors.py", "src/vmferry/units.py", "src/vmferry/limits.py")  # fmt: skip
IMPURE_MODULES: Final = frozenset({
    "asyncio", "concurrent", "ctypes", "datetime", "fcntl", "getpass", "glob", "io", "locale", "logging", "mmap",
    "multiprocessing", "os", "pathlib", "platform", "pwd", "random", "resource", "secrets", "select", "shutil",
    "signal", "socket", "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
})  # fmt: skip
EFFECT_HANDS: Final = (
    "src/vmferry/agent/source_act.py",
    "src/vmferry/agent/destination_act.py",
    "src/vmferry/model/source.py",  # what the hands do to the model's world
    "src/vmferry/model/destination.py",
)
EFFECT_TYPES: Final = frozenset({"Effect", "DestinationEffect"})
FACT_WRITERS: Final = (
    "src/vmferry/agent/loop.py",  # note(): the one way in
    "src/vmferry/engine/ledger.py",  # post(): the one way in of an endpoint
    "src/vmferry/agent/source.py",
    "src/vmferry/agent/destination.py",
    "src/vmferry/agent/restore.py",  # what the journal proves after a restart
    "src/vmferry/agent/source_disks.py",  # hands of both sides for local disks
    "src/vmferry/agent/destination_disks.py",
    *EFFECT_HANDS,
)
STATUS_NAMES: Final = frozenset(
    {"MigrationStatus", "source_status", "destination_status", "derive_source", "derive_destination"}
)
STATUS_WORDS: Final = frozenset(status.value for status in MigrationStatus)
DECIDES_NOTHING: Final = (
    "src/vmferry/core/",
    "src/vmferry/model/",
    "src/vmferry/testing/",
    "src/vmferry/chaos/",
    "src/vmferry/agent/observe.py",
)

# Written with classes of one letter, so that this file is not a finding of its own.
MACHINE_PATH: Final = re.compile(r"(?<![\w.$}~])/(?:[w]ork/(?:main|shared)|[r]oot/|[h]ome/\w|[o]pt/(?:pypi|wheels))")
REGISTRY_HOST: Final = re.compile(r"\b(?:[p]ypi\.org|files\.[p]ythonhosted\.org|[r]egistry\.\w+\.\w+|[c]rates\.io)")
SLEEPS: Final = frozenset({"asyncio.sleep", "time.sleep"})


@dataclass(frozen=True, order=True)
class Finding:
    """One breach of one rule. `what` does not change when lines move."""

    path: str
    line: int
    rule: str
    what: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.rule, self.path, self.what


@dataclass(frozen=True)
class Source:
    """One Python file, parsed."""

    path: str
    text: str
    tree: ast.Module

    @property
    def in_package(self) -> bool:
        return self.path.startswith("src/vmferry/")

    @property
    def room(self) -> str:
        """'core' for src/vmferry/core/facts.py, 'errors' for src/vmferry/errors.py, '' outside."""
        return self.path.removeprefix("src/vmferry/").split("/")[0].removesuffix(".py") if self.in_package else ""

    def finding(self, node: ast.AST, rule: str, what: str) -> Finding:
        return Finding(self.path, getattr(node, "lineno", 1), rule, what)


def tracked(root: Path) -> list[str]:
    """Every file that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted({name for name in listed.stdout.split("\0") if name and (root / name).is_file()})


def imported(node: ast.AST) -> list[str]:
    """The dotted names of the modules that an import statement names; `from vmferry import x` gives vmferry.x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        if node.module == "vmferry":
            return [f"vmferry.{alias.name}" for alias in node.names]
        return [node.module]
    return []


def _for_types_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes inside `if TYPE_CHECKING:`, which the running program never sees."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {child for block in blocks for statement in block.body for child in ast.walk(statement)}


def directions(source: Source) -> Iterator[Finding]:
    """Rooms import only what `MAY_IMPORT` says; no relative imports, no stars."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield source.finding(node, "relative-import", ast.unparse(node))
            if any(alias.name == "*" for alias in node.names):
                yield source.finding(node, "star-import", ast.unparse(node))
        if not source.in_package or source.room == "__init__":
            continue
        allowed = MAY_IMPORT.get(source.room, frozenset()) | INTRODUCERS.get(source.path, frozenset())
        for name in imported(node):
            parts = name.split(".")
            if parts[0] == "vmferry" and len(parts) > 1 and parts[1] not in (*allowed, source.room, "__version__"):
                yield source.finding(node, "direction", name)


def purity(source: Source) -> Iterator[Finding]:
    """What decides or translates does no input or output and asks no clock."""
    if not source.path.startswith(PURE):
        return
    for node in ast.walk(source.tree):
        for name in imported(node):
            if name.split(".")[0] in IMPURE_MODULES:
                yield source.finding(node, "impure", name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print"):
            yield source.finding(node, "impure", node.func.id)


def late_imports(source: Source) -> Iterator[Finding]:
    """No import inside a function: what a module needs stands at its top."""
    if not source.in_package:
        return
    types_only = _for_types_only(source.tree)
    for function in ast.walk(source.tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in types_only:
                for name in imported(node):
                    yield source.finding(node, "late-import", ".".join(name.split(".")[:2]))


def sizes(source: Source) -> Iterator[Finding]:
    """Files and functions stay small enough to be read at once."""
    lines = source.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield Finding(source.path, lines, "long-file", "file")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                yield source.finding(node, "long-function", node.name)


def status_comparisons(source: Source) -> Iterator[Finding]:
    """Nobody compares a status to decide what to do: decisions read facts (S6)."""
    if not source.in_package or source.path.startswith(DECIDES_NOTHING):
        return
    for function, node in _with_function(source.tree):
        if not isinstance(node, ast.Compare | ast.pattern):
            continue
        parts = list(ast.walk(node))
        names = {n.id for n in parts if isinstance(n, ast.Name)}
        attributes = {n.attr for n in parts if isinstance(n, ast.Attribute)}
        words = {n.value for n in parts if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        if names & STATUS_NAMES or "status" in attributes:
            yield source.finding(node, "compares-status", function)
        elif words & STATUS_WORDS and source.room == "agent":
            yield source.finding(node, "compares-qemu-word", function)


def effects(source: Source) -> Iterator[Finding]:
    """Only the two hands branch on effects."""
    if not source.in_package or source.path in EFFECT_HANDS or source.room in ("core", "testing", "chaos"):
        return
    for function, node in _with_function(source.tree):
        if isinstance(node, ast.MatchValue) and _base_name(node.value) in EFFECT_TYPES:
            yield source.finding(node, "matches-effect", function)


def fact_records(source: Source) -> Iterator[Finding]:
    """Facts come in through the funnel and the attempts, and from nowhere else."""
    if not source.in_package or source.path in FACT_WRITERS or source.room in ("core", "model", "testing", "chaos"):
        return
    for function, node in _with_function(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            records = node.func.attr == "with_fact" or (
                node.func.attr == "note" and any(_base_name(argument) == "Fact" for argument in node.args)
            )
            if records:
                yield source.finding(node, "records-fact", function)


def sleeps(source: Source) -> Iterator[Finding]:
    """No sleep stands for 'it will have happened by then'. In a loop it is a poll, which asks again."""
    loops = [node for node in ast.walk(source.tree) if isinstance(node, ast.While | ast.For | ast.AsyncFor)]
    polls = {child for loop in loops for child in ast.walk(loop)}
    for function, node in _with_function(source.tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in SLEEPS or node in polls:
            continue
        if not (node.args and ast.unparse(node.args[0]) == "0"):  # sleep(0) only lets others run
            yield source.finding(node, "sleep", function)


def _with_function(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every node with the name of the innermost function (or class) around it."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield name, child
            yield from walk(child, getattr(child, "name", name) if inner else name)

    yield from walk(tree, "module")


def _base_name(node: ast.AST) -> str:
    return node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""


def places(path: str, text: str) -> Iterator[Finding]:
    """Nothing tracked names a path of one machine or a package registry."""
    for number, line in enumerate(text.splitlines(), 1):
        for rule, pattern in (("machine-path", MACHINE_PATH), ("registry-host", REGISTRY_HOST)):
            for found in pattern.finditer(line):
                yield Finding(path, number, rule, found.group(0))


RULES: Final[tuple[Callable[[Source], Iterable[Finding]], ...]] = (
    directions, purity, late_imports, sizes, status_comparisons, effects, fact_records, sleeps,
)  # fmt: skip


def dependencies(root: Path) -> Iterator[Finding]:
    """What is installed with vmferry has a decision that says why."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    decided = " ".join(path.name for path in (root / "docs" / "decisions").glob("*.md"))
    for requirement in project["dependencies"]:
        name = re.split(r"[^A-Za-z0-9-]", requirement)[0]
        if f"-{name}.md" not in decided:
            yield Finding("pyproject.toml", 1, "undecided-dependency", name)


def find(root: Path, paths: Iterable[str]) -> list[Finding]:
    """All findings, before allowances."""
    found: set[Finding] = set()
    for path in paths:
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a binary file, or one that was removed meanwhile
        found.update(places(path, text))
        if path.endswith(".py"):
            source = Source(path, text, ast.parse(text, path))
            for rule in RULES:
                found.update(rule(source))
    return sorted(found)


def verdict(findings: Iterable[Finding], allowed: Mapping[tuple[str, str, str], str]) -> list[str]:
    """One line per finding that is not allowed, and per allowance that is not needed."""
    findings = list(findings)
    lines = [f"{f.path}:{f.line}: {f.rule}: {f.what}" for f in findings if f.key not in allowed]
    used = {finding.key for finding in findings}
    lines += [f"tools/tidy_allowed.py: not needed any more: {key}" for key in allowed if key not in used]
    lines += [f"tools/tidy_allowed.py: no reason given: {key}" for key, reason in allowed.items() if not reason.strip()]
    return lines


def main() -> int:
    """0 = tidy; 1 = findings, one per line."""
    lines = verdict([*find(ROOT, tracked(ROOT)), *dependencies(ROOT)], ALLOWED)
    print("\n".join(lines) if lines else "tidy")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
