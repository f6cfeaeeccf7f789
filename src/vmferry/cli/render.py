"""What people see: tables, the progress line, the timeline. Plain text; a live bar only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from vmferry.units import format_ms, format_size

_DISK_BYTES = ("current-progress", "total-progress")


def is_copying(brief: dict[str, Any]) -> bool:
    """The guest's disks are on their way, or copied for a save, and its memory is not yet."""
    if brief.get("copying"):
        return True
    return brief["status"] == "setup" and any(disk["status"] == "running" for disk in brief.get("disks") or ())


class ProgressLine:
    """One line that grows on a terminal, a line per change of status elsewhere; nothing if not enabled."""

    def __init__(self, vm: str, *, enabled: bool, stream: TextIO | None = None) -> None:
        self.vm = vm
        self._stream = stream or sys.stderr
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._last = ""

    def show(self, brief: dict[str, Any]) -> None:
        """The newest short form of a job (`SourceAttempt.brief` or `wire`)."""
        if not self._enabled:
            return
        if self._stream.isatty():
            self._show_bar(brief)
            return
        text = f"{self.vm}: {brief['status']}"
        if is_copying(brief):
            text += ", its disks are on their way"
        if brief["outcome"] in ("uncertain", "held", "degraded", "lost"):
            text += f" ({brief['outcome']}; next: {brief.get('action', '')})"
        if text != self._last:
            self._stream.write(text + "\n")
            self._stream.flush()
            self._last = text

    def _show_bar(self, brief: dict[str, Any]) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.vm, total=100, detail="")
        detail = ""
        percent = brief.get("percent") or 0
        if is_copying(brief):
            done, total = _copied(brief)
            detail = f"disks: {format_size(done)} of {format_size(total)}"
            percent = 100 * done // total if total else 0
        if brief.get("remaining_bytes") is not None and brief.get("mbps") is not None:
            rate = format_size(float(brief["mbps"]) * 1e6 / 8)
            left = time_left(brief.get("left_ms_min"), brief.get("left_ms_max"))
            detail = f"{format_size(brief['remaining_bytes'])} left, {rate}/s, pass {brief.get('passes') or 1}{left}"
            if brief.get("percent_error"):
                detail = f"± {brief['percent_error']} %, {detail}"
        self._bar.update(
            self._task,
            completed=percent,
            description=f"{self.vm} {brief['status']}",
            detail=detail,
        )

    def close(self) -> None:
        """Ends the live bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _copied(brief: dict[str, Any]) -> tuple[int, int]:
    if brief.get("copying"):
        return brief["copying"]["done_bytes"], brief["copying"]["whole_bytes"]
    done, total = (sum(int(disk[key]) for disk in brief["disks"]) for key in _DISK_BYTES)
    return done, total


def time_left(low_ms: float | None, high_ms: float | None) -> str:
    """', 2.0 s to 5.0 s' between its bounds, or nothing where even the lower one is not known."""
    if low_ms is None:
        return ""
    return f", {format_ms(low_ms)} or more" if high_ms is None else f", {format_ms(low_ms)} to {format_ms(high_ms)}"


def table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Columns aligned to the left, two spaces apart."""
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def timeline_lines(wire: dict[str, Any]) -> list[str]:
    """The timeline as a table: when, what, and the public status where it changed."""
    rows = []
    for row in wire.get("timeline") or ():
        what = row["what"] + (f": {row['text']}" if row.get("text") else "")
        rows.append((f"{row['at_ms']:10.1f} ms", row.get("status", ""), what))
    return [f"  {line}" for line in table(("        at", "status", "what"), rows)] if rows else []


def objection_lines(objections: Iterable[dict[str, Any]]) -> list[str]:
    """Each objection with its fix."""
    lines = []
    for objection in objections:
        lines.append(f"  {objection['weight']}: {objection['message']}")
        if objection["fix"]:
            lines.append(f"    fix: {objection['fix']}")
    return lines
