"""QEMU's own analyze-migration.py, for a test that reads with it what vmferry exports.

No package of Debian has the script, and it is QEMU's under the GPL, so it is not part of this tree: it comes out of
Debian's source package (24 MB, some seconds) into the cache.

Rule 1: nothing is used whose checksum is not the one that is written here; a script that is there is looked at again.
"""

from __future__ import annotations

import hashlib
import lzma
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Final

from vmferry.testing.host_tools import HostToolError, publish

SOURCE: Final = "http://deb.debian.org/debian/pool/main/q/qemu/qemu_7.2+dfsg.orig.tar.xz"
SOURCE_SHA256: Final = "91aca71520040edc40b8d437aa3004dae614f58e286cf653ee8996c07af2962f"
"""As the signed qemu_7.2+dfsg-7+deb12u18.dsc has it."""
MEMBER: Final = "qemu-7.2.0/scripts/analyze-migration.py"
SCRIPT_SHA256: Final = "3fadb92ba5c134d3e455b12256a7bee860b9fecfd4514cca2f90f80bf09baba6"
_SOURCE_BYTES_MAX: Final = 64 << 20
_FETCH_S: Final = 60.0


def home(cache: Path) -> Path:
    """Where the script is, if `is_there`."""
    return cache / "qemu-scripts" / "analyze-migration.py"


def is_there(cache: Path) -> bool:
    """Whether `fetch` has nothing to do."""
    path = home(cache)
    return path.is_file() and _digest(path.read_bytes()) == SCRIPT_SHA256


def fetch(cache: Path) -> Path:
    """Fetches the script if need be; returns its path. Raises HostToolError: then there is none, and again is fine."""
    path = home(cache)
    if is_there(cache):
        return path
    try:
        with urllib.request.urlopen(SOURCE, timeout=_FETCH_S) as answer:
            data = answer.read(_SOURCE_BYTES_MAX)
    except OSError as error:
        raise HostToolError(f"{SOURCE}: {error}") from error
    if _digest(data) != SOURCE_SHA256:
        raise HostToolError(f"{SOURCE} is not what it was: its SHA-256 is {_digest(data)}")
    script = _member(data)
    if _digest(script) != SCRIPT_SHA256:
        raise HostToolError(f"{MEMBER} is not what it was: its SHA-256 is {_digest(script)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(script, path)
    return path


def _member(archive: bytes) -> bytes:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(archive)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:xz") as tar:
                found = tar.extractfile(MEMBER)
                return b"" if found is None else found.read()
    except (KeyError, tarfile.TarError, lzma.LZMAError, OSError) as error:
        raise HostToolError(f"{SOURCE} has no {MEMBER}: {error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
