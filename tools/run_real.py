"""Runs the tests with real QEMUs (and everything between the fast rings and them) and shows how they ended.

python tools/run_real.py                 tests/real and the other rings that need a host
python tools/run_real.py tests/real/x.py what is named, in the same way
"""

from __future__ import annotations

import json
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


FAILED_BEFORE_MAX: Final = 5
"""So many failures may be the host's doing (it may hang for seconds under emulation); more are the code's."""


def main(paths: Sequence[str]) -> int:
    """pytest's exit code. A few tests that fail are tried once more, one at a time, and named whatever comes of it."""
    pytest = [sys.executable, "-m", "pytest", "-ra"]
    wanted = list(paths or ["tests/real"])
    first = subprocess.run([*pytest, "-n", WORKERS, "--dist", "loadfile", "--durations", "10", *wanted], cwd=ROOT)
    if first.returncode != 1:
        return first.returncode
    failed = failed_before(wanted)
    if not 0 < len(failed) <= FAILED_BEFORE_MAX:
        return first.returncode
    print(f"\n{len(failed)} failed and are tried once more on the quieter host:", *failed, sep="\n  ", flush=True)
    return subprocess.run([*pytest, "-p", "no:xdist", *failed], cwd=ROOT).returncode


def failed_before(paths: Sequence[str], *, root: Path = ROOT) -> list[str]:
    """The tests below these paths that failed in the run that has just ended, as pytest's cache has them: it forgets of
    a path what passes there."""
    cache = root / ".pytest_cache" / "v" / "cache" / "lastfailed"
    try:
        found = json.loads(cache.read_text())
    except (OSError, ValueError):
        return []
    return sorted(name for name in found if any(name.startswith(path.rstrip("/")) for path in paths))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
