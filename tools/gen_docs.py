"""Writes the documents that are made from the code, or checks that they are up to date.

    python tools/gen_docs.py           writes them
    python tools/gen_docs.py --check   writes nothing; exit 1 and a list if a document differs

To add a document: give its module a pure function that returns the text, and add a line to `DOCUMENTS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import commands_doc, conformance, decision_tables, reliability, requirements
from vmferry import errors
from vmferry.core import job, migration_status, options, transitions
from vmferry.model import faults_doc

ROOT: Final = Path(__file__).resolve().parent.parent
DOCUMENTS: Final[tuple[tuple[str, Callable[[], str]], ...]] = (
    ("docs/options.md", options.docs_markdown),
    ("docs/migration-status.md", migration_status.docs_markdown),
    ("docs/status.md", transitions.docs_markdown),
    ("docs/jobs.md", job.docs_markdown),
    ("docs/decision-table.md", decision_tables.docs_markdown),
    ("docs/faults.md", faults_doc.docs_markdown),
    ("docs/exit-codes.md", errors.docs_markdown),
    ("docs/commands.md", commands_doc.docs_markdown),
    ("docs/requirements.md", requirements.docs_markdown),
    ("docs/conformance.md", conformance.docs_markdown),
    ("docs/reliability.md", reliability.docs_markdown),
)


def main(arguments: Sequence[str], *, root: Path = ROOT) -> int:
    """0 = all written or all up to date; 1 = --check found a difference; 2 = wrong arguments."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = []
    for path, make in DOCUMENTS:
        target, text = root / path, make()
        if target.exists() and target.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if not arguments:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path} {'is out of date: run python tools/gen_docs.py' if arguments else 'written'}")
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
