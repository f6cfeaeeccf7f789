"""What a command costs through a VM's monitor socket, against the same command said to its QEMU directly.

Theory of operation
-------------------
One QEMU has a second monitor, which nobody but the measurement uses. The same client says the same command to that
monitor and to the VM's monitor socket, a few times each by turns, and the difference of the medians is what the agent
in between costs: one more hop over a unix socket each way, JSON twice, and two turns of the agent's loop.

Rule 1: both are asked in the same run by turns; nothing else is asked meanwhile, and the guest stands still: it would
        take a processor from those who are measured.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from vmferry.cli.render import table
from vmferry.errors import UsageError
from vmferry.qmp.blocking import BlockingClient
from vmferry.testing.hosts import Guests, TwoAgents, boot
from vmferry.testing.qemus import available, with_second_monitor

ROUNDS_MIN: Final = 7
PER_ROUND: Final = 50
COMMANDS: Final = ("query-status", "query-block", "query-cpus-fast")
"""A short answer and longer ones. A list of all commands is what a tool asks for once."""
ADDED_MS_MAX: Final = 0.3


def run_bench(*, rounds: int) -> dict[str, Any]:
    """Everything as one JSON object. Raises VmferryError when something cannot be measured."""
    if rounds < ROUNDS_MIN:
        raise UsageError(f"--rounds: medians of fewer than {ROUNDS_MIN} rounds say nothing")
    version, program = list(available().items())[-1]
    with tempfile.TemporaryDirectory(prefix="vmferry-bench-") as name:
        folder = Path(name)
        (folder / "direct").mkdir()
        qemu = with_second_monitor(program, folder / "qemu", folder / "direct")
        pair = TwoAgents(qemu, qemu, pki=None)
        try:
            pair.start()
            boot(pair.a, Guests(folder).boot())
            direct = BlockingClient(str(next((folder / "direct").glob("*.sock"))), name="QEMU")
            through = BlockingClient(pair.a.status("web1")["monitor"], name="the monitor")
            direct.execute("stop")
            try:
                samples = _measure(direct, through, rounds)
            finally:
                direct.close()
                through.close()
        finally:
            pair.close()
            pair.remove()
    return _result(samples, rounds=rounds, version=version)


def _measure(direct: BlockingClient, through: BlockingClient, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each answer, by command and way."""
    found: dict[str, dict[str, list[float]]] = {name: {"direct": [], "monitor": []} for name in COMMANDS}
    for number in range(rounds + 1):
        for name in COMMANDS:
            ways = [("direct", direct), ("monitor", through)]
            for way, client in ways if number % 2 else reversed(ways):
                times = [_ask(client, name) for _ in range(PER_ROUND)]
                if number:  # the first is for warming up
                    found[name][way] += times
    return found


def _ask(client: BlockingClient, command: str) -> float:
    began_s = time.perf_counter()
    client.execute(command)
    return (time.perf_counter() - began_s) * 1000


def _result(samples: dict[str, dict[str, list[float]]], *, rounds: int, version: str) -> dict[str, Any]:
    rows = {}
    for command, ways in samples.items():
        medians = {way: statistics.median(times) for way, times in ways.items()}
        rows[command] = {
            "direct_ms": round(medians["direct"], 4),
            "monitor_ms": round(medians["monitor"], 4),
            "added_ms": round(medians["monitor"] - medians["direct"], 4),
            "monitor_p99_ms": round(statistics.quantiles(ways["monitor"], n=100)[98], 4),
        }
    worst = max(row["added_ms"] for row in rows.values())
    return {
        "commands": rows,
        "added_ms": worst,
        "goals_met": {"added_ms": worst <= ADDED_MS_MAX},
        "rounds": rounds,
        "qemu": version,
        "load_average": os.getloadavg()[0],
    }


def report_lines(result: dict[str, Any]) -> list[str]:
    """The table for people."""
    rows = [
        (name, f"{row['direct_ms']:.3f} ms", f"{row['monitor_ms']:.3f} ms", f"{row['added_ms']:.3f} ms")
        for name, row in result["commands"].items()
    ]
    word = "met" if result["goals_met"]["added_ms"] else "missed"
    return [
        *table(("COMMAND", "QEMU", "MONITOR", "ADDED"), rows),
        "",
        f"the monitor adds {result['added_ms']:.3f} ms at the median; goal {ADDED_MS_MAX} ms: {word}",
        f"QEMU {result['qemu']}, {result['rounds']} rounds of {PER_ROUND}; the load was {result['load_average']:.1f}",
    ]
