"""Intervals of CPUs, and the guest's memory, as outsiders see them."""

from __future__ import annotations

from vmferry.chaos import guest
from vmferry.chaos.witness import Life, first_run_after, longest_pause_s, overlap_s


def life(*ran: tuple[float, float | None]) -> Life:
    return Life(1, "", list(ran))


def test_overlap() -> None:
    one, other = life((0, 10)), life((12, None))
    assert overlap_s(one, other, until_s=20) == 0
    assert overlap_s(life((0, 13)), other, until_s=20) == 1
    assert overlap_s(life((0, None)), other, until_s=20) == 8
    assert overlap_s(life((0, 5), (14, 15)), other, until_s=20) == 1


def test_when_it_ran_again() -> None:
    both = [life((0, 10)), life((12, None))]
    assert first_run_after(both, 5) == 5
    assert first_run_after(both, 11) == 12
    assert first_run_after([life((0, 10))], 11) is None


def test_the_longest_pause() -> None:
    both = [life((0, 10), (13, 14)), life((15, None))]
    assert longest_pause_s(both, 5, 20) == 3
    assert longest_pause_s(both, 11, 20) == 2
    assert longest_pause_s([life((0, 10))], 5, 20) == 10


def test_intervals_begin_and_end_once() -> None:
    one = Life(1, "")
    one.end(1)
    one.begin(2)
    one.begin(3)
    one.end(4)
    one.end(5)
    assert one.ran == [(2, 4)]
    assert not one.is_running
    one.begin(6)
    assert one.is_running
    one.gone_s = 7
    assert not one.is_running


def test_pages() -> None:
    def page(first: int, rest: int = 0) -> bytes:
        return bytes([first]) + bytes([rest]) * 4095

    assert guest.wrong_pages(page(5) + page(6) + page(4), 4, 5) == 0
    assert guest.wrong_pages(page(3) + page(7) + page(4), 4, 5) == 2
    assert guest.wrong_pages(page(5, rest=1), 4, 5) == 1
    assert guest.wrong_pages(page(0) + page(255), 255, 255) == 0


def test_letters_of_two_lives_are_found() -> None:
    assert guest.passes(b"ABCD") == (3, "")
    count, wrong = guest.passes(b"ABCDCD")
    assert (count, bool(wrong)) == (0, True)
