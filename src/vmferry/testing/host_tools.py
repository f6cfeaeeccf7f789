"""Small helpers of the modules that prepare this machine for tests; standard library only."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path


class HostToolError(RuntimeError):
    """A tool of this machine failed; the message holds the command and what it printed."""


def project_root() -> Path:
    """The top of the source tree that this file is in."""
    return Path(__file__).resolve().parents[3]


def default_cache() -> Path:
    """Where built and downloaded things live: $VMFERRY_CACHE, else `.cache` in the project's root."""
    chosen = os.environ.get("VMFERRY_CACHE")
    return Path(chosen).absolute() if chosen else project_root() / ".cache"


def publish(data: bytes, path: Path, *, mode: int = 0o644) -> None:
    """Writes the file so that it appears whole or not at all, also when two builds run at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as half:
        half.write(data)
    Path(half.name).chmod(mode)
    os.replace(half.name, path)


def run(
    argv: list[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> str:
    """What the command printed. Raises HostToolError if it fails, cannot start or takes too long."""
    variables = {
        **os.environ,
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C.UTF-8",
        **(environment or {}),
    }
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostToolError(f"{argv[0]}: {error}") from error
    if done.returncode != 0:
        raise HostToolError(f"{' '.join(argv)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
