"""Which test proves which requirement: the text of docs/requirements.md, from the marks in the tests.

    python tools/requirements.py     prints the requirements of now that no test proves; exit 1 if there is one

A test says what it proves with `@pytest.mark.proves("S31", "S63")`. The marks are read from the source text,
so this needs neither pytest nor the real QEMUs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.requirements_list import NOW, REQUIREMENTS

ROOT: Final = Path(__file__).resolve().parent.parent
STATES: Final = {
    "proved": "a test proves it",
    "open": "to be proved now, and no test does yet",
    "later": "belongs to a later issue",
}


class UnknownRequirement(Exception):
    """A test claims to prove something that is not in the list."""


def _marked(decorators: list[ast.expr], mark: str) -> Iterator[str]:
    for decorator in decorators:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(f"mark.{mark}"):
            for argument in decorator.args:
                yield str(ast.literal_eval(argument))


def _marks_of(tree: ast.Module, mark: str) -> Iterator[tuple[str, str]]:
    """(requirement, test) of one file: marks of functions, of classes, and of the whole module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            calls = [call for call in ast.walk(node.value) if isinstance(call, ast.Call)]
            yield from ((number, "*") for number in _marked(list(calls), mark))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from ((number, node.name) for number in _marked(node.decorator_list, mark))
        if isinstance(node, ast.ClassDef):
            yield from ((number, node.name) for number in _marked(node.decorator_list, mark))
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from (
                        (number, f"{node.name}::{inner.name}") for number in _marked(inner.decorator_list, mark)
                    )


def proofs(tests: Path, *, mark: str = "proves", known: Mapping[str, str] = REQUIREMENTS) -> dict[str, list[str]]:
    """Requirement -> the tests that carry its number in this mark, as file::test. Raises UnknownRequirement."""
    found: dict[str, list[str]] = {number: [] for number in known}
    for path in sorted(tests.rglob("test_*.py")):
        name = path.relative_to(tests.parent).as_posix()
        for number, test in _marks_of(ast.parse(path.read_text(encoding="utf-8"), str(path)), mark):
            if number not in found:
                raise UnknownRequirement(f"{name}::{test} claims to prove {number}")
            found[number].append(f"{name}::{test}")
    return found


def state(number: str, tests: list[str]) -> str:
    """'proved', 'open' or 'later'."""
    if tests:
        return "proved"
    return "open" if number in NOW else "later"


def docs_markdown() -> str:
    """The text of docs/requirements.md."""
    found = proofs(ROOT / "tests")
    states = {number: state(number, found[number]) for number in REQUIREMENTS}
    counts = {name: sum(1 for value in states.values() if value == name) for name in STATES}
    lines = [
        "# Requirements and their proofs",
        "",
        "<!-- made by tools/gen_docs.py from tools/requirements_list.py and the marks in tests/; do not edit -->",
        "",
        "A requirement is proved by the tests that carry its number (`@pytest.mark.proves`). Run them with",
        "`make test`.",
        "",
        "| state | meaning | how many |",
        "|---|---|---|",
        *[f"| {name} | {meaning} | {counts[name]} |" for name, meaning in STATES.items()],
        "",
        "| | requirement | state | proved by |",
        "|---|---|---|---|",
    ]
    for number, text in REQUIREMENTS.items():
        tests = "<br>".join(f"`{test}`" for test in found[number])
        lines.append(f"| {number} | {text} | {states[number]} | {tests} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """0 = everything of now is proved; 1 = the open ones, one per line."""
    found = proofs(ROOT / "tests")
    still_open = [number for number in REQUIREMENTS if state(number, found[number]) == "open"]
    for number in still_open:
        print(f"{number:5} {REQUIREMENTS[number]}")
    return 1 if still_open else 0


if __name__ == "__main__":
    sys.exit(main())
