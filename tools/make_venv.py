#!/usr/bin/env python3
"""Makes the virtual environment .venv with vmferry and its development tools, if that is not there already.

    python3 tools/make_venv.py

A stamp in the environment holds the hash of pyproject.toml and the version of Python, so that a repeated call
takes no time. Only the standard library is used: this runs before there is an environment.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "vmferry.stamp"


def wanted() -> str:
    """What the stamp says when nothing has to be done."""
    text = (ROOT / "pyproject.toml").read_bytes() + sys.version.encode()
    return hashlib.sha256(text).hexdigest()


def main() -> int:
    """The exit code: 0, or that of the step that failed."""
    stamp = wanted()
    if STAMP.exists() and STAMP.read_text().strip() == stamp:
        return 0
    print("making the virtual environment .venv", flush=True)
    steps = [
        [sys.executable, "-m", "venv", str(VENV)],
        [str(VENV / "bin" / "pip"), "install", "--quiet", "--editable", f"{ROOT}[dev]"],
    ]
    for step in steps:
        done = subprocess.run(step, cwd=ROOT)
        if done.returncode:
            print(f"failed: {' '.join(step)}", file=sys.stderr)
            return done.returncode
    STAMP.write_text(stamp + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
