"""The text of docs/decision-table.md: both decision tables, as they run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmferry.core.destination_rows import DESTINATION_ROWS
from vmferry.core.source_rows import COMMIT, GOING_BACK, GRANTED, MOVING, SET_UP
from vmferry.core.table import Row
from vmferry.core.view import DestinationView, SourceView, answers

GROUPS = (
    ("Source: set-up (P)", SourceView, SET_UP),
    ("Source: memory on its way (M)", SourceView, MOVING),
    ("Source: the commit (C)", SourceView, COMMIT),
    ("Source: going back (B)", SourceView, GOING_BACK),
    ("Source: the destination may run (G)", SourceView, GRANTED),
    ("Destination (D)", DestinationView, DESTINATION_ROWS),
)


def _when(view_type: type, row: Row[Any]) -> str:
    """The pattern in the order of the questions; a question with most answers is told by those that it lacks."""
    parts = []
    for name in view_type.__dataclass_fields__:  # type: ignore[attr-defined]
        if name not in row.when:
            continue
        possible, allowed = answers(view_type, name), row.when[name]
        absent = [answer for answer in possible if answer not in allowed]
        if len(absent) < len(allowed) and len(possible) > 3:
            parts.append(f"{name} none of {', '.join(answer.value for answer in absent)}")
        else:
            parts.append(f"{name} {' or '.join(answer.value for answer in possible if answer in allowed)}")
    return "; ".join(parts)


def _effect(row: Row[Any]) -> str:
    now = row.do.value if row.do else "wait"
    return now if row.then is None else f"{now}; after {row.limit_ms} ms {row.then.value}"


def _table(view_type: type, rows: Iterable[Row[Any]]) -> list[str]:
    lines = ["| row | when | what is done | guest | why | for people |", "|---|---|---|---|---|---|"]
    for row in rows:
        told = f"{row.outcome.value} | {row.why} | {row.action}"
        lines.append(f"| `{row.label}` | {_when(view_type, row)} | {_effect(row)} | {told} |")
    return lines


def docs_markdown() -> str:
    """Every row of both tables."""
    lines = [
        "# What is decided, and when",
        "",
        "<!-- made by tools/gen_docs.py from src/vmferry/core/source_rows.py and destination_rows.py; do not edit -->",
        "",
        "Each agent asks a few closed questions about an attempt. For every combination of answers exactly one row",
        "holds; `tests/table` walks them all. A question that is not named may have any answer. The label of the",
        "row is shown by `vmferry status` and written to the log. *guest* is where the guest runs or will run by",
        "itself.",
    ]
    for title, view_type, rows in GROUPS:
        lines += ["", f"## {title}", "", *_table(view_type, rows)]
    return "\n".join(lines) + "\n"
