"""Everything that needs no QEMU: what a commit must pass.

    python tools/check.py

The steps run side by side as far as the machine has processors; the output of a step that failed is shown
whole, and the tests' last line always.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
BIN: Final = Path(sys.executable).parent
SLOW_RINGS: Final = frozenset({"real"})
"""What needs a QEMU and root, under tests/; `tools/run_real.py` runs it."""


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    shows_last_line: bool = False


def steps() -> list[Step]:
    """The longest first, so that the others fit beside it."""
    rings = [
        f"tests/{folder.name}"
        for folder in sorted((ROOT / "tests").iterdir())
        if folder.name not in SLOW_RINGS and folder.is_dir() and any(folder.rglob("test_*.py"))
    ]
    return [
        # A few that fail are named and tried once more, as those with real QEMUs are: threads race on a busy host.
        Step("tests", ("python", "tools/run_real.py", *rings), shows_last_line=True),
        Step("types", ("mypy",)),
        Step("lint", ("ruff", "check", ".")),
        Step("format", ("ruff", "format", "--check", ".")),
        Step("directions", ("lint-imports", "--no-logo")),
        Step("house rules", ("python", "tools/tidy.py")),
        Step("documents", ("python", "tools/gen_docs.py", "--check")),
    ]


def run(step: Step) -> tuple[Step, int, str, float]:
    """The step's exit code, its output and how long it took."""
    began_s = time.monotonic()
    command = [str(BIN / step.command[0]), *step.command[1:]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return step, done.returncode, done.stdout, time.monotonic() - began_s


def main() -> int:
    """0 = all steps passed; 1 = at least one failed, and its output was shown."""
    failed = []
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        for step, code, output, took_s in pool.map(run, steps()):
            print(f"{'failed' if code else 'ok':7} {step.name} ({took_s:.1f} s)", flush=True)
            if code:
                failed.append(step.name)
                print(output, flush=True)
            elif step.shows_last_line:
                lines = output.strip().splitlines()
                again = [line for line in lines if "tried once more" in line or line.startswith(("FAILED", "ERROR"))]
                print(*(f"        {line}" for line in [*again, lines[-1]]), sep="\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
