"""The text of docs/faults.md: every pair of states of the two sides, and what leads out of it.

It walks the views that the source's table can be asked about, so it says what the rows say that decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmferry.core.effects import Effect
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Row
from vmferry.core.view import Source, Step, Target
from vmferry.model.pairs import PAIRS

_HEAD = """\
# Faults: every pair of states, and the way out of it

<!-- made by tools/gen_docs.py from src/vmferry/model/faults_doc.py and the decision tables; do not edit -->

A migration has two sides. Whatever breaks leaves them in a pair of states: what the source's QEMU says, and what is
known of the destination. For each pair this page has the rows that decide in it
([decision-table.md](decision-table.md)), where the guest is, what the agents do by themselves, and what a person can
do. The rows are looked up when the page is made. `make model` explores how the pairs are reached and that each is left.
"""


def _itself(row: Row[Effect]) -> str:
    if row.do is None and row.then is None:
        return "waits"
    now = row.do.value if row.do is not None else "waits"
    return now if row.then is None else f"{now}; in the end {row.then.value}"


def _lines(first: str, rows: Iterable[Row[Effect]]) -> Iterator[str]:
    """One line of the table for each row; the pair stands in the first."""
    for row in rows:
        yield f"{first} | `{row.label}` | {row.outcome.value} | {_itself(row)} | {row.action or '–'} |"
        first = "| | "


def _rows(source: Source, target: Target) -> tuple[str, ...]:
    """Labels of the rows that hold in this pair once the migration has started, without those never reached."""
    pair = {"step": Step.STARTED, "source": source, "target": target}
    # Every view has exactly one row: a row that these three answers do not exclude holds in some view with them.
    return tuple(
        row.label
        for row in SOURCE_ROWS
        if not row.label.startswith("X-")
        and all(name not in row.when or answer in row.when[name] for name, answer in pair.items())
    )


def _all_pairs() -> list[str]:
    by_label = {row.label: row for row in SOURCE_ROWS}
    lines = ["| source | destination | row | guest | by itself | for people |", "|---|---|---|---|---|---|"]
    for source in Source:
        groups: dict[tuple[str, ...], list[str]] = {}
        for target in Target:
            groups.setdefault(_rows(source, target), []).append(target.value)
        for labels, targets in groups.items():
            lines += _lines(f"| {source.value} | {', '.join(targets)}", (by_label[label] for label in labels))
    return lines


def _named_pairs() -> list[str]:
    lines = ["| pair | source / destination | row | guest | by itself | for people |", "|---|---|---|---|---|---|"]
    for pair in PAIRS:
        note = f"; not reached: {pair.unreachable}" if pair.unreachable else ""
        lines += _lines(f"| {pair.name} | {pair.text}{note}", pair.rows())
    return lines


def docs_markdown() -> str:
    """docs/faults.md; the same at every call."""
    parts = [
        _HEAD,
        "## P1 to P30",
        "",
        "The pairs that QEMU's own states make. Several rows: which one holds depends on where the guest shall be"
        " and on whether the right to run was sent.",
        "",
        *_named_pairs(),
        "",
        "## All pairs of a migration that has started",
        "",
        *_all_pairs(),
    ]
    return "\n".join(parts) + "\n"
