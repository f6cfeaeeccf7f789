"""What makes the bytes of an object provably its own: a check, or encryption. Nothing else depends on which.

Theory of operation
-------------------
A sealed piece is bound to its object's name and to its number in it, so a piece cannot stand in for another one.

* `OpenSeal`: for a repository without encryption. Every piece carries 16 bytes of keyed SHA-256. The key is in the
  config object, for everybody to see: this finds damage, not malice. In repositories of older configs frames of pages
  carry nothing (`frames=False`), and every page is compared with its id before it is handed out.
* `SecretSeal`: AES-256-GCM (cryptography). Each object has a key of its own, HMAC-SHA256(master, its name); the nonce
  is the piece's number. A nonce is therefore used once: names are random, and an object is written once.

Rule 1: number 0 is the head or directory; frames and sections count from 1.
Rule 2: a piece that does not fit raises Damaged with its object's name; nothing of it is returned.
"""

from __future__ import annotations

import hashlib
import hmac
from functools import lru_cache
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vmferry.store.errors import Damaged

SEAL_BYTES: Final = 16
_KEYS_KEPT: Final = 256


class Seal(Protocol):
    """Seals pieces of objects and opens them again."""

    @property
    def frame_bytes(self) -> int:
        """By how much a frame grows; other pieces grow by SEAL_BYTES."""
        ...

    @property
    def proves_frames(self) -> bool:
        """Whether what `open_frame` gives back is what was written. Else pages have to be compared with their ids."""
        ...

    def close(self, name: str, number: int, data: bytes) -> bytes:
        """A head, table or directory -> what is stored."""
        ...

    def open(self, name: str, number: int, sealed: bytes) -> bytes:
        """The reverse. Raises Damaged."""
        ...

    def close_frame(self, name: str, number: int, data: bytes) -> bytes:
        """A frame of pages -> what is stored."""
        ...

    def open_frame(self, name: str, number: int, sealed: bytes) -> bytes:
        """The reverse; see `proves_frames`. Raises Damaged."""
        ...


def derived(secret: bytes, what: bytes) -> bytes:
    """A key for one purpose: whoever learns it learns nothing of the secret or of other purposes."""
    return hmac.digest(secret, what, "sha256")


class OpenSeal:
    """Finds damage; hides nothing. `frames`: also that of frames of pages."""

    def __init__(self, key: bytes, *, frames: bool = True) -> None:
        self._begun = hashlib.sha256(derived(key, b"vmferry: checks of objects"))
        self.proves_frames = frames
        self.frame_bytes = SEAL_BYTES if frames else 0

    def close(self, name: str, number: int, data: bytes) -> bytes:
        """See `Seal`."""
        return data + self._check(name, number, data)

    def open(self, name: str, number: int, sealed: bytes) -> bytes:
        """See `Seal`."""
        data, check = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:]
        if not hmac.compare_digest(check, self._check(name, number, data)):
            raise Damaged(name, f"piece {number} does not fit its check")
        return data

    def close_frame(self, name: str, number: int, data: bytes) -> bytes:
        """See `Seal`."""
        return self.close(name, number, data) if self.proves_frames else data

    def open_frame(self, name: str, number: int, sealed: bytes) -> bytes:
        """See `Seal`."""
        return self.open(name, number, sealed) if self.proves_frames else sealed

    def _check(self, name: str, number: int, data: bytes) -> bytes:
        check = self._begun.copy()
        check.update(_place(name, number))
        check.update(data)
        return check.digest()[:SEAL_BYTES]


class SecretSeal:
    """Hides and proves."""

    frame_bytes: Final = SEAL_BYTES
    proves_frames: Final = True

    def __init__(self, master: bytes) -> None:
        self._master = master
        self._cipher = lru_cache(_KEYS_KEPT)(self._new_cipher)

    def close(self, name: str, number: int, data: bytes) -> bytes:
        """See `Seal`."""
        return self._cipher(name).encrypt(_nonce(number), data, _place(name, number))

    def open(self, name: str, number: int, sealed: bytes) -> bytes:
        """See `Seal`."""
        try:
            return self._cipher(name).decrypt(_nonce(number), sealed, _place(name, number))
        except (InvalidTag, ValueError):  # ValueError: shorter than a tag
            raise Damaged(name, f"piece {number} was not written with this repository's key") from None

    def close_frame(self, name: str, number: int, data: bytes) -> bytes:
        """See `Seal`."""
        return self.close(name, number, data)

    def open_frame(self, name: str, number: int, sealed: bytes) -> bytes:
        """See `Seal`."""
        return self.open(name, number, sealed)

    def _new_cipher(self, name: str) -> AESGCM:
        return AESGCM(derived(self._master, b"vmferry: object " + name.encode()))


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _place(name: str, number: int) -> bytes:
    return len(name).to_bytes(2, "little") + name.encode() + number.to_bytes(8, "little")
