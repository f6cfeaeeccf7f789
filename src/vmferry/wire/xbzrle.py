"""The difference of a page to its last content, as capability `xbzrle` writes it.

A delta is a row of pairs: how many bytes stay, how many are new, and those bytes. Lengths are 7 bits per byte, low
bits first, at most two bytes. The new bytes are values, not differences.

Rule 1: `apply` accepts exactly what QEMU's decoder accepts; `make` writes exactly what QEMU's encoder writes for
        a delta that is shorter than the page.
"""

from __future__ import annotations

from typing import NoReturn

from vmferry.wire.buffer import Bytes
from vmferry.wire.errors import refuse


def apply(page: bytearray | memoryview, delta: Bytes) -> None:
    """Changes `page` to its new content. Raises `WireError`, and then leaves a page that must not be used."""
    size = len(page)
    at = position = 0
    while at < len(delta):
        is_first = at == 0
        stay, at = _length(delta, at)
        if stay == 0 and not is_first:
            _refuse("bytes that stay: none, but not at the beginning")
        position += stay
        fresh, at = _length(delta, at)
        if fresh == 0 or position + fresh > size or at + fresh > len(delta):
            _refuse(f"{fresh} new bytes at {position} of {size}")
        page[position : position + fresh] = delta[at : at + fresh]
        position += fresh
        at += fresh


def make(old: Bytes, new: Bytes) -> bytes:
    """The delta from `old` to `new`; empty if they are equal."""
    assert len(old) == len(new)
    out = bytearray()
    position = 0
    while True:
        start = position
        while position < len(new) and old[position] == new[position]:
            position += 1
        if position == len(new):
            return bytes(out)
        begun = position
        while position < len(new) and old[position] != new[position]:
            position += 1
        out += _encode_length(begun - start) + _encode_length(position - begun) + new[begun:position]


def _length(delta: Bytes, at: int) -> tuple[int, int]:
    if at >= len(delta):
        _refuse("it ends inside a pair")
    low = delta[at]
    if low < 0x80:
        return low, at + 1
    if at + 1 >= len(delta) or delta[at + 1] >= 0x80:
        _refuse("a length of more than two bytes")
    return low & 0x7F | delta[at + 1] << 7, at + 2


def _encode_length(length: int) -> bytes:
    return bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])


def _refuse(message: str) -> NoReturn:
    refuse("ram-xbzrle", message, offset=0, section="xbzrle delta")
