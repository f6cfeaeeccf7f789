"""`vmferry chaos`: faults on purpose, on hosts and guests of its own."""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmferry.cli.demo_cmd import INTERRUPTED, sigterm_interrupts
from vmferry.errors import UsageError


def chaos(arguments: Namespace) -> int:
    """0: every run that counts ended as it must; 1: some did not."""
    from vmferry.chaos import campaign, cells, compare

    pairs = campaign.pairs()
    chosen = cells.select(cells.matrix(pairs, core=arguments.core), arguments.only)
    names = [cell.name for cell in (compare.chosen(arguments.only) if arguments.bare else chosen)]
    if not names:
        raise UsageError(f"no cell is named like {arguments.only!r}", hint="vmferry chaos --list")
    if arguments.list:
        print("\n".join(names))
        return 0
    if arguments.bare:
        return _compare(arguments)
    keep = Path(arguments.logs) if arguments.logs else None
    say = _tell_quietly if arguments.json else _tell

    def save() -> None:
        if arguments.save:
            _save(Path(arguments.save), work.runs, work.summary()["seconds"], pairs)

    work = campaign.Campaign(chosen, say=say, keep_logs=keep, save=save)
    try:
        with sigterm_interrupts():
            found = work.go()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; hosts, agents and guests of it are gone\n")
        if arguments.json:
            print(json.dumps({"result": "interrupted"}))
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(found))
    else:
        _say_summary(found)
    return 1 if any(found[key] for key in ("lost", "double", "stuck", "surprises")) else 0


def _compare(arguments: Namespace) -> int:
    """The same faults against a bare script."""
    from vmferry.chaos import compare

    try:
        with sigterm_interrupts():
            found = compare.run_all(_tell_quietly if arguments.json else _tell, arguments.only)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the QEMUs of it are gone\n")
        return INTERRUPTED
    if arguments.save:
        path = Path(arguments.save)
        before = json.loads(path.read_text()) if path.exists() else {}
        rows = {(row["fault"], row["phase"], row["mode"]): row for row in before.get("raw", {}).get("rows", [])}
        rows |= {(row["fault"], row["phase"], row["mode"]): row for row in found["rows"]}
        path.write_text(json.dumps({**before, "raw": {"rows": [*rows.values()]}}, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(found))
    return 0


def _tell(text: str) -> None:
    print(text, flush=True)


def _tell_quietly(text: str) -> None:
    """With --json there is one object on standard output; progress goes beside it."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _say_summary(found: dict[str, Any]) -> None:
    keys = ("runs", "injected", "not_injected", "good", "good_after_action", "lost_by_physics", "lost", "double",
            "stuck", "surprises", "seconds")  # fmt: skip
    print("\n" + "   ".join(f"{key.replace('_', ' ')} {found[key]}" for key in keys))
    for name, got in found["goals"].items():
        print(f"{name}: {got}")


def _save(path: Path, runs: list[dict[str, Any]], seconds: float, pairs: list[tuple[str, str]]) -> None:
    """The file from which docs/reliability.md is made. Cells that were not run now keep what was seen of them before,
    and so does the comparison."""
    from vmferry.chaos import report

    before = json.loads(path.read_text()) if path.exists() else {}
    kept = {run["cell"]: run for run in before.get("runs", [])}
    now = {run["cell"]: run if run["verdict"] != "good" else {**run, "rows": []} for run in runs}
    merged = [*(kept | now).values()]
    saved = {
        **before,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPUs, Linux {platform.release()}, TCG",
        "pairs": [" -> ".join(pair) for pair in pairs],
        "chaos": report.summary(
            merged, seconds=seconds if len(now) == len(merged) else sum(r["wall_s"] for r in merged)
        ),
        "runs": merged,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(saved, indent=1) + "\n")
    part.rename(path)
