"""Sizes, times and rates as people write them, and the plain numbers that the code keeps.

Units live in names: `_bytes`, `_ms`, `_s`, `_bytes_per_s`. Nothing here touches the outside.
"""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgtKMGT]?)(?:i?[bB])?\s*$")
_TIME = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(us|ms|s|min|m|h)?\s*$")
_POWER = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_size_bytes(text: str) -> int:
    """'512M', '2G', '1.5GiB', '4096' -> bytes. Binary multiples, as QEMU reads them. Raises ValueError."""
    found = _SIZE.match(text)
    if found is None:
        raise ValueError(f"{text!r} is not a size; write for example 512M or 2G")
    return int(float(found.group(1)) * _POWER[found.group(2).lower()])


def parse_time_ms(text: str, *, bare_unit: str = "ms") -> int:
    """'200ms', '1.5s', '2m' -> milliseconds; a bare number counts as `bare_unit`. Raises ValueError."""
    found = _TIME.match(text)
    if found is None:
        raise ValueError(f"{text!r} is not a time; write for example 200ms or 1.5s")
    return round(float(found.group(1)) * _SECONDS[found.group(2) or bare_unit] * 1000)


def format_size(size_bytes: float) -> str:
    """1536 MiB -> '1.5 GiB': at most one decimal, binary units."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_ms(time_ms: float) -> str:
    """12.3 -> '12.3 ms', 1234 -> '1.23 s', 90_000 -> '1 min 30 s'."""
    if time_ms < 1000:
        return f"{time_ms:.1f} ms" if time_ms < 100 else f"{time_ms:.0f} ms"
    if time_ms < 60_000:
        return f"{time_ms / 1000:.2f} s"
    minutes, rest = divmod(round(time_ms / 1000), 60)
    return f"{minutes} min {rest} s"
