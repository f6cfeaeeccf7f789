"""The cursor over slabs."""

from __future__ import annotations

from vmferry.wire.buffer import Buffer


def content(taken: memoryview | None) -> bytes:
    assert taken is not None
    return taken.tobytes()


def test_what_lies_in_one_slab_is_a_view_of_it() -> None:
    buffer, slab = Buffer(), bytearray(b"abcdef")
    buffer.feed(slab)
    assert buffer.peek(2) == b"ab"
    taken = buffer.take(3)
    slab[1] = ord("x")
    assert content(taken) == b"axc"
    assert content(buffer.window()) == b"def"
    buffer.skip(1)
    assert (len(buffer), buffer.offset) == (2, 4)
    assert buffer.take(3) is None
    assert buffer.peek(3) is None


def test_after_release_the_slab_may_be_used_again() -> None:
    buffer, slab = Buffer(), bytearray(b"abc")
    buffer.feed(slab)
    buffer.release()
    slab[:] = b"zzz"
    slab.clear()  # would fail if it was still looked at
    assert buffer.peek(3) == b"abc"
    assert content(buffer.window()) == b""


def test_what_lies_in_two_slabs_is_joined_and_no_more() -> None:
    buffer = Buffer(10)
    buffer.feed(b"ab")
    buffer.release()
    buffer.feed(b"cdefgh")
    assert buffer.peek(4) == b"abcd"
    assert buffer.peek(3) == b"abc"
    assert content(buffer.take(2)) == b"ab"
    assert content(buffer.take(3)) == b"cde"
    assert content(buffer.window()) == b"fgh"
    assert buffer.offset == 15


def test_take_some_takes_what_lies_together() -> None:
    buffer = Buffer()
    assert content(buffer.take_some(5)) == b""
    buffer.feed(b"ab")
    buffer.feed(b"cdef")
    assert content(buffer.take_some(5)) == b"ab"
    assert content(buffer.take_some(3)) == b"cde"
    assert content(buffer.take_some(3)) == b"f"


def test_bytes_can_be_put_back() -> None:
    buffer = Buffer()
    buffer.feed(b"abcdef")
    buffer.take(4)
    buffer.unread(b"cd")
    assert buffer.offset == 2
    assert content(buffer.take(4)) == b"cdef"


def test_what_is_left_is_put_in_front_of_what_comes_next() -> None:
    buffer, slab = Buffer(), memoryview(bytearray(b"....cdefg"))
    buffer.feed(b"xab")
    buffer.skip(1)
    buffer.feed_behind(slab, 4, 8)
    assert content(buffer.window()) == b"abcdef"
    assert (len(buffer), buffer.offset) == (6, 1)
    buffer.skip(5)
    slab[4:8] = b"hijk"  # what was fed is looked at until it is released
    assert content(buffer.window()) == b"k"
    buffer.release()
    slab[4:8] = b"lmno"
    assert buffer.peek(1) == b"k"
    buffer.feed_behind(slab, 4, 8)
    assert content(buffer.take(5)) == b"klmno"
    assert len(buffer) == 0


def test_what_is_left_and_has_no_room_in_front_is_joined_as_always() -> None:
    buffer, slab = Buffer(), memoryview(bytearray(b".defg"))
    buffer.feed(b"abc")
    buffer.feed_behind(slab, 1, 4)
    assert slab[0] == ord(".")
    assert content(buffer.window()) == b""
    assert buffer.peek(4) == b"abcd"
    assert content(buffer.take(6)) == b"abcdef"
