"""docs/reliability.md, made from docs/reliability.json: what `vmferry chaos --save` measured. No number is typed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from vmferry.chaos import report

RESULTS: Final = Path(__file__).resolve().parent.parent / "docs" / "reliability.json"


def docs_markdown() -> str:
    """The page. Raises OSError or ValueError when the results are not there or no JSON."""
    return report.docs_markdown(json.loads(RESULTS.read_text(encoding="utf-8")))
