"""Changes to specs that tests have written."""

from __future__ import annotations

from pathlib import Path


def with_local_disks(spec: str, more: str = "") -> str:
    """The same spec with its disk local to the host, and `more` at its end."""
    path = Path(spec)
    path.write_text(path.read_text().replace("[[disk]]\n", "[[disk]]\nshared = false\n") + more)
    return spec
