"""zstd as the repository uses it: whole frames without checksums, and an end to what comes out.

Rule 1: the length of what comes out is known before; a frame that gives more, less, or wants a large window is damage.
        What comes out is bounded while it comes, so a small object cannot fill the memory.
"""

from __future__ import annotations

import sys
from typing import Final

from vmferry.store.errors import Damaged

if sys.version_info >= (3, 14):  # pragma: no cover (the same library under its later name)
    from compression import zstd
else:
    from backports import zstd

_WINDOW_LOG_MAX: Final = 23
"""8 MiB, what levels up to 19 use: more is memory that a hostile frame takes."""
_OPTIONS: Final[dict[int, int]] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}


class Compressor:
    """One context, used again and again: making one costs as much as compressing a page. For one thread."""

    def __init__(self, level: int) -> None:
        self._one = zstd.ZstdCompressor(level=level)

    def frame(self, data: bytes | memoryview) -> bytes:
        """A whole frame."""
        return self._one.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)


def inflate(name: str, data: bytes, length: int) -> bytes:
    """What a frame holds, which must be exactly so long. Raises Damaged with the object's name."""
    one = zstd.ZstdDecompressor(options=_OPTIONS)
    try:
        out = one.decompress(data, length)
        if length == 0 and not one.eof:
            out = one.decompress(b"", 1)
    except (zstd.ZstdError, EOFError, MemoryError) as error:
        raise Damaged(name, f"what was compressed cannot be inflated: {error}") from None
    if len(out) != length or not one.eof or one.unused_data:
        raise Damaged(name, f"what was compressed does not inflate to {length} bytes")
    return out
