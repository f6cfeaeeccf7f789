"""The preempt channel."""

from __future__ import annotations

import pytest

from tests.wire_streams import BLOCKS, drain, join, pages, zeros
from vmferry.wire.errors import WireError
from vmferry.wire.events import DONE, NEED_DATA, EndOfRam, MultifdFlush
from vmferry.wire.preempt import PreemptDecoder


@pytest.mark.parametrize("slab", [1, 5000, 1 << 20])
def test_pages_up_to_eos_and_what_follows_is_left_alone(slab: int) -> None:
    data = join([pages([1]), pages([2], named=False), zeros([3]), pages([9]), EndOfRam()])
    decoder = PreemptDecoder(BLOCKS)
    found = []
    for at in range(0, len(data), slab):
        decoder.feed(data[at : at + slab])
        found += drain(decoder)
    assert join(found) == data
    assert decoder.next() is DONE
    decoder.feed(b"xyz")
    assert decoder.next() is DONE
    assert decoder.unread_bytes == 3


def test_it_may_end_between_pages_only() -> None:
    decoder = PreemptDecoder(BLOCKS)
    assert decoder.is_between
    decoder.feed(join([pages([1])])[:-1])
    assert decoder.next() is NEED_DATA
    assert not decoder.is_between


def test_an_error_stays() -> None:
    decoder = PreemptDecoder(BLOCKS)
    decoder.feed(join([MultifdFlush()]))
    for _ in range(2):
        with pytest.raises(WireError) as caught:
            decoder.next()
        assert caught.value.section == "preempt"
