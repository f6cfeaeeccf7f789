"""Hostile peers: any bytes give events, NEED_DATA, DONE or one `WireError`, however they are cut.

What was ever found stays as an example. The invariants are in `tests/wire_invariants.py`;
`tools/fuzz_wire.py` runs them with atheris.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.wire_invariants import DECODERS, LENIENT, MAIN, SLABS, one_input, run, seeds

SEEDS = [(kind, seed) for kind, found in seeds().items() for seed in found]
FAST = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Numbers that break things: lengths, sizes, tags, flags.
HOT = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 32, 64, 0x7E, 0x7F, 0x80, 0xFF]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """A seed with some bytes changed, cut out, doubled or put in."""
    kind, seed = draw(st.sampled_from(SEEDS))
    data = bytearray(seed)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["change", "change", "word", "cut", "double", "insert"])):
            case "change" if data:
                data[at] = draw(st.sampled_from(HOT) | st.integers(0, 255))
            case "word":
                word = struct.pack(">I", draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 16, 1 << 24])))
                data[at : at + 4] = word
            case "cut":
                del data[at : at + draw(st.integers(1, 5000))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 300))]
            case _:
                data[at:at] = draw(st.binary(max_size=20))
    return kind, draw(st.integers(0, len(SLABS) - 1)), bytes(data)


@FAST
@given(mutated())
@example((MAIN, 0, b"QEVM\x00\x00\x00\x02"))
def test_broken_streams_have_one_outcome(case: tuple[int, int, bytes]) -> None:
    kind, slab, data = case
    one_input(bytes([kind, slab]) + data)


@FAST
@given(st.integers(0, len(DECODERS) - 1), st.integers(0, len(SLABS) - 1), st.binary(max_size=600), st.booleans())
def test_garbage_has_one_outcome(kind: int, slab: int, data: bytes, headed: bool) -> None:
    one_input(bytes([kind, slab]) + (b"QEVM\x00\x00\x00\x03" if headed else b"") + data)


@pytest.mark.parametrize(("kind", "seed"), SEEDS)
def test_seeds_are_well_formed(kind: int, seed: bytes) -> None:
    out, reason, _ = run(kind, seed, 4096)
    assert out == seed
    assert reason in (None, "truncated")


@pytest.mark.parametrize(("kind", "seed"), SEEDS)
def test_every_truncation_has_one_outcome(kind: int, seed: bytes) -> None:
    """Every point of the short parts, and a sample inside of pages."""
    points = {*range(min(len(seed), 400)), *range(400, len(seed), 997), *range(max(len(seed) - 300, 0), len(seed))}
    for end in sorted(points):
        out, reason, _ = run(kind, seed[:end], 5000)
        assert seed.startswith(out)
        assert reason in (None, "truncated")


@pytest.mark.deep
@pytest.mark.timeout(7200)
@settings(max_examples=200_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_broken_streams_for_long(case: tuple[int, int, bytes]) -> None:
    kind, slab, data = case
    one_input(bytes([kind, slab]) + data)


def test_a_stream_of_footers_ends_soon() -> None:
    """Every byte looks like the end of a section: the search gives up instead of trying all combinations."""
    section = b"\x04\x00\x00\x00\x01\x01a" + bytes(8)
    hostile = (section + b"\x7e\x00\x00\x00\x01") * 20_000 + b"\x05"
    start = seeds()[LENIENT][0]
    at = start.index(b"\x04\x00\x00\x00\x00\x05timer")
    _, reason, _ = run(LENIENT, start[:at] + hostile, 1 << 20)
    assert reason in ("truncated", "devices-search")
