"""The transition map: every change of the public status that anybody may ever see. Data and documents only.

Theory of operation
-------------------
The status is computed from facts (`core.status`), so no code walks this map. It is what the computation
promises to people and programs that follow the events: `tests/unit/core/test_status.py` explores the causal
histories and fails if one takes an edge that is not here, or if an edge here is never taken.

Rule 1: an edge is added or removed on purpose, in the same commit as the rule that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vmferry.core.migration_status import MigrationStatus as S
from vmferry.core.migration_status import meaning

_TURNS_BACK: Final = frozenset({S.CANCELLING, S.FAILING})

SOURCE_EDGES: Final[Mapping[S, frozenset[S]]] = {
    S.NONE: frozenset({S.SETUP}),
    S.SETUP: frozenset({S.ACTIVE, S.WAIT_UNPLUG}) | _TURNS_BACK,
    S.WAIT_UNPLUG: frozenset({S.ACTIVE}) | _TURNS_BACK,
    S.ACTIVE: frozenset({S.PRE_SWITCHOVER, S.DEVICE}) | _TURNS_BACK,
    S.PRE_SWITCHOVER: frozenset({S.DEVICE}) | _TURNS_BACK,
    S.DEVICE: frozenset({S.POSTCOPY_DEVICE, S.COMPLETED, S.COLO}) | _TURNS_BACK,
    S.POSTCOPY_DEVICE: frozenset({S.POSTCOPY_ACTIVE}) | _TURNS_BACK,
    S.POSTCOPY_ACTIVE: frozenset({S.POSTCOPY_PAUSED, S.COMPLETED, S.COLO}) | _TURNS_BACK,
    S.POSTCOPY_PAUSED: frozenset({S.POSTCOPY_RECOVER_SETUP}) | _TURNS_BACK,
    S.POSTCOPY_RECOVER_SETUP: frozenset({S.POSTCOPY_RECOVER, S.POSTCOPY_PAUSED}) | _TURNS_BACK,
    S.POSTCOPY_RECOVER: frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED}) | _TURNS_BACK,
    S.FAILING: frozenset({S.FAILED, S.CANCELLING}),
    S.CANCELLING: frozenset({S.CANCELLED}),
    S.COMPLETED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
    S.COLO: frozenset(),
}
"""The source's status -> what it may change to. An attempt starts in `none` and a new one starts anew."""

DESTINATION_EDGES: Final[Mapping[S, frozenset[S]]] = {
    S.NONE: frozenset({S.SETUP, S.FAILED}),
    S.SETUP: frozenset({S.ACTIVE, S.FAILED}),
    S.ACTIVE: frozenset({S.POSTCOPY_DEVICE, S.COMPLETED, S.FAILED}),
    S.POSTCOPY_DEVICE: frozenset({S.POSTCOPY_ACTIVE, S.FAILED}),
    S.POSTCOPY_ACTIVE: frozenset({S.POSTCOPY_PAUSED, S.COMPLETED, S.FAILED}),
    S.POSTCOPY_PAUSED: frozenset({S.POSTCOPY_RECOVER_SETUP, S.FAILED}),
    S.POSTCOPY_RECOVER_SETUP: frozenset({S.POSTCOPY_RECOVER, S.POSTCOPY_PAUSED, S.FAILED}),
    S.POSTCOPY_RECOVER: frozenset({S.POSTCOPY_ACTIVE, S.POSTCOPY_PAUSED, S.FAILED}),
    S.COMPLETED: frozenset(),
    S.FAILED: frozenset(),
}
"""The same for the destination; it has no failing and no cancelling: its QEMU just ends."""

SOURCE_RULES: Final[tuple[tuple[str, str], ...]] = (
    ("nobody asked for a migration", "none"),
    ("all sent, the destination's result, the proof that it runs the guest, and in postcopy the proof of "
     "loading, told to the outside; all of them before any cancel and any error", "completed (colo)"),
    ("a cancel was accepted before the end", "cancelling, after the cleanup cancelled"),
    ("an error, or a link lost before the proof of loading", "failing, after the cleanup failed"),
    ("the device state left the source, and its loading is not proved", "postcopy-device"),
    ("its loading is proved: by the newest lost round and how far its repair got",
     "postcopy-active, postcopy-paused, postcopy-recover-setup, postcopy-recover"),
    ("the CPUs stopped; the source waits for leave to go on", "pre-switchover"),
    ("the CPUs stopped", "device"),
    ("the guest has not let go of its failover devices yet", "wait-unplug"),
    ("the set-up is over", "active"),
    ("otherwise", "setup"),
)  # fmt: skip
"""For people: the rules of `status.derive_source` in their order; the first that matches wins."""


def _mermaid(edges: Mapping[S, frozenset[S]]) -> list[str]:
    lines = ["```mermaid", "stateDiagram-v2"]
    for start, ends in edges.items():
        lines += [f"    {_name(start)} --> {_name(end)}" for end in sorted(ends)]
        if not ends:
            lines.append(f"    {_name(start)} --> [*]")
    return [*lines, "```"]


def _name(status: S) -> str:
    return status.value.replace("-", "_")


def docs_markdown() -> str:
    """The text of docs/status.md."""
    lines = [
        "# How the status is computed, and how it may change",
        "",
        "<!-- made by tools/gen_docs.py from src/vmferry/core/transitions.py; do not edit -->",
        "",
        "The status of a migration is never stored. It is computed from the facts of the attempt, and every",
        "status comes with the facts that made it (`because`). The words are QEMU's; [migration-status.md]",
        "(migration-status.md) says what each means to people and to libvirt.",
        "",
        "## Rules of the source, in order",
        "",
        "| | if | then |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {when} | {then} |" for n, (when, then) in enumerate(SOURCE_RULES, 1)]
    for title, edges in (("source", SOURCE_EDGES), ("destination", DESTINATION_EDGES)):
        count = sum(len(ends) for ends in edges.values())
        lines += ["", f"## Every change of the {title}'s status ({count})", "", *_mermaid(edges)]
    lines += ["", "| status | meaning | may become |", "|---|---|---|"]
    for status, ends in SOURCE_EDGES.items():
        lines.append(f"| `{status}` | {meaning(status)} | {', '.join(f'`{e}`' for e in sorted(ends)) or 'final'} |")
    return "\n".join(lines) + "\n"
