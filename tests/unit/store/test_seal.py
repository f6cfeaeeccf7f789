"""Seals: what was sealed comes back, bound to its place; everything else is damage."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmferry.store.errors import Damaged
from vmferry.store.seal import SEAL_BYTES, OpenSeal, Seal, SecretSeal, derived

SEALS: list[Seal] = [OpenSeal(b"k" * 16), SecretSeal(b"k" * 32), OpenSeal(b"k" * 16, frames=False)]
seals = st.sampled_from(SEALS)


@given(seals, st.binary(max_size=300), st.integers(0, 1 << 40))
@example(SEALS[0], b"data", 1)
@example(SEALS[1], b"data", 1)
@example(SEALS[2], b"data", 1)
def test_there_and_back(seal: Seal, data: bytes, number: int) -> None:
    sealed = seal.close("a/b", number, data)
    assert len(sealed) == len(data) + SEAL_BYTES
    assert seal.open("a/b", number, sealed) == data
    frame = seal.close_frame("a/b", number, data)
    assert len(frame) == len(data) + seal.frame_bytes
    assert seal.open_frame("a/b", number, frame) == data


@given(seals, st.binary(max_size=40), st.data())
def test_any_changed_bit_is_damage(seal: Seal, data: bytes, draw: st.DataObject) -> None:
    sealed = bytearray(seal.close("a", 1, data))
    at = draw.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[at // 8] ^= 1 << at % 8
    with pytest.raises(Damaged) as caught:
        seal.open("a", 1, bytes(sealed))
    assert caught.value.name == "a"


@pytest.mark.parametrize("seal", SEALS)
def test_a_piece_fits_its_own_place_only(seal: Seal) -> None:
    sealed = seal.close("a", 1, b"data")
    for name, number in (("b", 1), ("a", 2), ("a", 257)):
        with pytest.raises(Damaged):
            seal.open(name, number, sealed)
    for short in (b"", sealed[: SEAL_BYTES - 1], sealed[:-1]):
        with pytest.raises(Damaged):
            seal.open("a", 1, short)


def test_frames_are_hidden_with_a_key_proved_without_and_were_once_as_they_are() -> None:
    checked, hidden, plain = (seal.close_frame("a", 1, b"frame") for seal in SEALS)
    assert plain == b"frame"
    assert checked.startswith(b"frame")
    assert b"frame" not in hidden
    assert [seal.proves_frames for seal in SEALS] == [True, True, False]
    for seal, stored in ((SEALS[0], checked), (SEALS[1], hidden)):
        for name, number, data in (("a", 2, stored), ("b", 1, stored), ("a", 1, stored[:-1]), ("a", 1, b"")):
            with pytest.raises(Damaged):
                seal.open_frame(name, number, data)


def test_equal_pieces_look_different_everywhere() -> None:
    seal = SEALS[1]
    sealed = {seal.close(name, number, b"same") for name in ("a", "b") for number in (0, 1)}
    assert len(sealed) == 4
    assert derived(b"s", b"one") != derived(b"s", b"two")
