"""Requirements are read from the marks, and the documents have everything that they are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import decision_tables, requirements
from tools.requirements import UnknownRequirement, proofs, state
from tools.requirements_list import NOW, REQUIREMENTS
from vmferry.core.destination_rows import DESTINATION_ROWS
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Row

SAMPLE = """
import pytest
pytestmark = [pytest.mark.real, pytest.mark.proves("S5")]

@pytest.mark.proves("S1", "S2")
@pytest.mark.parametrize("x", [1])
def test_one(x): ...

@pytest.mark.proves("S1")
async def test_two(): ...

@pytest.mark.proves("S3")
class TestThree:
    @pytest.mark.proves("S4")
    def test_four(self): ...

    name = "x"
"""


def test_marks_of_functions_classes_and_modules_are_found(tmp_path: Path) -> None:
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    (tmp_path / "tests" / "unit" / "test_x.py").write_text(SAMPLE)
    found = proofs(tmp_path / "tests")
    assert {number: tests for number, tests in found.items() if tests} == {
        "S1": ["tests/unit/test_x.py::test_one", "tests/unit/test_x.py::test_two"],
        "S2": ["tests/unit/test_x.py::test_one"],
        "S3": ["tests/unit/test_x.py::TestThree"],
        "S4": ["tests/unit/test_x.py::TestThree::test_four"],
        "S5": ["tests/unit/test_x.py::*"],
    }


def test_a_claim_that_nobody_made_a_requirement_of_is_our_mistake(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text('@pytest.mark.proves("S999")\ndef test_one(): ...\n')
    with pytest.raises(UnknownRequirement, match="S999"):
        proofs(tmp_path)


def test_the_state_of_a_requirement() -> None:
    assert state("S1", ["a test"]) == "proved"
    assert state("S1", []) == "open"
    assert state("S36", []) == "later"
    assert "S36" not in NOW
    assert len(REQUIREMENTS) == 131


def test_the_document_has_every_requirement() -> None:
    text = requirements.docs_markdown()
    assert all(f"| {number} | {line} |" in text for number, line in REQUIREMENTS.items())


@pytest.mark.proves("S33")
def test_the_document_of_decisions_has_every_row() -> None:
    text = decision_tables.docs_markdown()
    rows: list[Row[Any]] = [*SOURCE_ROWS, *DESTINATION_ROWS]
    for row in rows:
        assert text.count(f"| `{row.label}` |") == 1
        assert row.why in text
        assert row.action in text
