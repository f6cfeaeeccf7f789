"""A guest's last pages, set aside in a file of this host while it stands, until they can be put into packs.

The file has no name: nobody else opens it, and it is gone with the process. Its blocks stay on the disk all the same
until something else is written there; so where the repository is encrypted they are too, with a key that is never
written down and used for this file only. That is against whoever gets at the disk later, not against who can read this
process.

Rule 1: what was written is read once, from the beginning, in the order in which it was written.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from vmferry import limits
from vmferry.errors import RepositoryError

_KEY_BYTES: Final = 32
_COUNTER: Final = bytes(16)
"""The key is used for one file, so its counter may begin where it likes."""


class Spill:
    """One file. `write` all of it, then `rewind`, then `read`; `close` at any time."""

    def __init__(self, folder: Path, *, is_secret: bool) -> None:
        """Raises OSError."""
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, prefix="vmferry-save-")  # noqa: SIM115
        self._cipher = Cipher(algorithms.AES(os.urandom(_KEY_BYTES)), modes.CTR(_COUNTER)) if is_secret else None
        self._in = self._cipher.encryptor() if self._cipher is not None else None
        self._out = self._cipher.decryptor() if self._cipher is not None else None

    def write(self, data: memoryview) -> None:
        """Behind what was written before. Raises OSError; RepositoryError where the journal would have no room left."""
        room = os.fstatvfs(self._file.fileno())
        if room.f_bavail * room.f_frsize - data.nbytes < limits.SAVE_SPILL_LEAVES_BYTES:
            raise RepositoryError(
                f"{self._folder} has no room for the guest's last pages: the agent's journal needs the rest",
                hint="make room there, or say --pause",
            )
        self._file.write(data if self._in is None else self._in.update(data.cast("B")))

    def rewind(self) -> None:
        """From now on it is read, from the beginning."""
        self._file.seek(0)
        if self._cipher is not None:
            self._out = self._cipher.decryptor()

    def read(self, size_bytes: int) -> bytes:
        """The next bytes. Raises OSError."""
        data = self._file.read(size_bytes)
        return data if self._out is None else self._out.update(data)

    def close(self) -> None:
        """The file is gone. Again is fine."""
        self._file.close()
