"""Runs the tests with real QEMUs (and everything between the fast rings and them) and shows how they ended.

python tools/run_real.py                 tests/real and the other rings that need a host
python tools/run_real.py tests/real/x.py what is named, in the same way
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
WORKERS: Final = "2"
"""Tests make their own namespaces, ports and folders, so two may run side by side; more would only wait for
processors, because most guests are emulated."""
CLOSING_LINES: Final = 40


def main(paths: Sequence[str]) -> int:
    """pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-n", WORKERS, "--dist", "loadfile", "--durations", "10", "-ra"]
    done = subprocess.run([*command, *(paths or ["tests/real"])], cwd=ROOT)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
