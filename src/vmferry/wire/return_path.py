"""The return path: what the destination says, on the same socket as the main channel.

Rule 1: the decoder stands at the source. It checks what only the message itself can get wrong; whether a block is
        known and a request inside of it, the source checks, who has the blocks (`check_request`).
Rule 2: an encoded request never breaks the rules that a QEMU source punishes by losing the guest: see
        `RequestEncoder`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NoReturn, assert_never

from vmferry.wire import limits
from vmferry.wire.buffer import Buffer, Bytes
from vmferry.wire.errors import WireError, refuse
from vmferry.wire.events import (
    NEED_DATA,
    BitmapEnd,
    BitmapPiece,
    Encoded,
    Pause,
    Pong,
    RamBlock,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    ReturnPathEvent,
    Shut,
    SwitchoverAck,
    to_raw,
    to_text,
)

SHUT, PONG, REQ_PAGES_ID, REQ_PAGES, RECV_BITMAP, RESUME_ACK, SWITCHOVER_ACK = range(1, 8)
BITMAP_END: Final = struct.pack(">Q", 0x0123456789ABCDEF)
_HEAD = struct.Struct(">HH")
_VALUE = struct.Struct(">I")
_REQUEST = struct.Struct(">QI")
_SIZE = struct.Struct(">Q")
_SHORT_REQUEST = struct.Struct(">HHQI")  # a whole REQ_PAGES
# Type → allowed lengths of the payload, (least, most).
_LENGTHS: Final = {
    SHUT: (4, 4),
    PONG: (4, 4),
    REQ_PAGES_ID: (14, 13 + 255),
    REQ_PAGES: (12, 12),
    RECV_BITMAP: (2, 256),
    RESUME_ACK: (4, 4),
    SWITCHOVER_ACK: (0, 0),
}
assert max(most for _, most in _LENGTHS.values()) <= limits.RETURN_PATH_BYTES_MAX


def bitmap_bytes(pages: int) -> int:
    """The size of a received bitmap: whole words of 64 bits."""
    return (pages + 63) // 64 * 8


class ReturnPathDecoder:
    """Decodes the bytes that a source reads."""

    def __init__(self) -> None:
        self._buffer = Buffer()
        self._bitmap: int | None = None  # bytes of a bitmap still to come
        self._has_block = False
        self._error: WireError | None = None

    def feed(self, data: Bytes) -> None:
        """Append bytes; pieces of bitmaps may be views of them."""
        self._buffer.feed(data)

    @property
    def is_between(self) -> bool:
        """Whether the connection may end here without cutting a message in two."""
        return len(self._buffer) == 0 and self._bitmap is None

    def lone_request(self, data: memoryview) -> RequestPages | None:
        """The request that these bytes are, if they are one that names no block and nothing else; else None: feed them.

        A shorter way for what a guest waits for: nearly every read finds just that.
        """
        if len(data) != _SHORT_REQUEST.size or not self._has_block or not self.is_between or self._error is not None:
            return None
        kind, size, start, length = _SHORT_REQUEST.unpack(data)
        if kind != REQ_PAGES or size != _REQUEST.size or not length or start + length > limits.RAM_BYTES_MAX:
            return None
        self._buffer.offset += len(data)
        return RequestPages(start, length)

    def next(self) -> ReturnPathEvent | Pause:
        """The next message, or NEED_DATA. Raises `WireError`, and from then on the same one."""
        if self._error is not None:
            raise self._error
        try:
            event = self._next_message() if self._bitmap is None else self._next_piece(self._bitmap)
        except WireError as error:
            self._error = error
            raise
        if event is NEED_DATA:
            self._buffer.release()
        return event

    def _next_message(self) -> ReturnPathEvent | Pause:
        head = self._buffer.peek(4)
        if head is None:
            return NEED_DATA
        kind, length = _HEAD.unpack(head)
        least, most = _LENGTHS.get(kind, (1, 0))
        if not least <= length <= most:
            self._refuse("return-path-message", f"message {kind} of {length} bytes")
        # The size of a bitmap stands behind the message, not in it.
        total = 4 + length + (8 if kind == RECV_BITMAP else 0)
        whole = self._buffer.peek(total)
        if whole is None:
            return NEED_DATA
        event = self._decode(kind, whole[4 : 4 + length], whole[4 + length :])
        self._buffer.take(total)
        if isinstance(event, ReceivedBitmap):
            self._bitmap = event.size
        return event

    def _decode(self, kind: int, payload: bytes, behind: bytes) -> ReturnPathEvent:
        match kind:
            case 0x03 | 0x04:
                return self._decode_request(payload)
            case 0x02:
                return Pong(_VALUE.unpack(payload)[0])
            case 0x01:
                return Shut(_VALUE.unpack(payload)[0])
            case 0x05:
                return self._decode_bitmap(payload, behind)
            case 0x06:
                (value,) = _VALUE.unpack(payload)
                if value != 1:
                    self._refuse("return-path-message", f"RESUME_ACK {value}")
                return ResumeAck(value)
            case _:
                assert kind == SWITCHOVER_ACK
                return SwitchoverAck()

    def _decode_request(self, payload: bytes) -> RequestPages:
        start, length = _REQUEST.unpack_from(payload)
        block = None
        if len(payload) > _REQUEST.size:
            if payload[12] != len(payload) - 13:
                self._refuse("return-path-message", "the name and the request differ in length")
            block = to_text(payload[13:])
        elif not self._has_block:
            self._refuse("request-block", "the first request names no block")
        if length == 0 or start + length > limits.RAM_BYTES_MAX:
            self._refuse("request-range", f"{length} bytes at {start:#x} are asked for")
        self._has_block = True
        return RequestPages(start, length, block)

    def _decode_bitmap(self, payload: bytes, behind: bytes) -> ReceivedBitmap:
        if payload[0] != len(payload) - 1:
            self._refuse("return-path-message", "the name and the message differ in length")
        (size,) = _SIZE.unpack(behind)
        if not 0 < size <= limits.RECEIVED_BITMAP_BYTES_MAX or size % 8:
            self._refuse("received-bitmap", f"a bitmap of {size} bytes")
        return ReceivedBitmap(to_text(payload[1:]), size)

    def _next_piece(self, left: int) -> ReturnPathEvent | Pause:
        if left == 0:
            end = self._buffer.peek(8)
            if end is None:
                return NEED_DATA
            if end != BITMAP_END:
                self._refuse("received-bitmap", f"it ends with {end.hex()}")
            self._buffer.take(8)
            self._bitmap = None
            return BitmapEnd()
        piece = self._buffer.take_some(min(left, limits.PIECE_BYTES_MAX))
        if not piece:
            return NEED_DATA
        self._bitmap = left - len(piece)
        return BitmapPiece(piece)

    def _refuse(self, reason: str, message: str) -> NoReturn:
        refuse(reason, message, offset=self._buffer.offset, section="return path")


def check_request(
    request: RequestPages, blocks: Mapping[str, RamBlock], last: str | None, *, page_size: int, offset: int = 0
) -> RamBlock:
    """The block of a request, which lies inside of it. Raises `WireError`."""
    name = last if request.block is None else request.block
    block = None if name is None else blocks.get(name)
    if block is None:
        refuse("request-block", f"block {name!r} is asked for", offset=offset, section="return path")
    low = page_size - 1
    inside = request.start + request.length <= block.used_length
    if not inside or request.start & low or request.length & low:
        message = f"{request.length} bytes at {request.start:#x} of block {block.name!r} are asked for"
        refuse("request-range", message, offset=offset, section="return path")
    return block


class RequestEncoder:
    """Encodes page requests of one connection: with the block's name first, and whenever it changes."""

    def __init__(self, *, page_size: int) -> None:
        self._page_size = page_size
        self._block: str | None = None

    def encode(self, block: RamBlock, start: int, length: int) -> bytes:
        """One request; it must be aligned and inside its block."""
        assert length > 0
        assert start % self._page_size == 0
        assert length % self._page_size == 0
        assert start + length <= block.used_length
        named = None if block.name == self._block else block.name
        self._block = block.name
        return bytes(encode(RequestPages(start, length, named))[0])


def encode(event: ReturnPathEvent) -> list[Encoded]:
    """The bytes of one message, or of a piece of it."""
    match event:
        case RequestPages(start, length, None):
            return [_HEAD.pack(REQ_PAGES, 12) + _REQUEST.pack(start, length)]
        case RequestPages(start, length, block):
            assert block is not None
            name = to_raw(block)
            return [_HEAD.pack(REQ_PAGES_ID, 13 + len(name)) + _REQUEST.pack(start, length) + bytes([len(name)]) + name]
        case Pong(value):
            return [_HEAD.pack(PONG, 4) + _VALUE.pack(value)]
        case Shut(code):
            return [_HEAD.pack(SHUT, 4) + _VALUE.pack(code)]
        case ResumeAck(value):
            return [_HEAD.pack(RESUME_ACK, 4) + _VALUE.pack(value)]
        case SwitchoverAck():
            return [_HEAD.pack(SWITCHOVER_ACK, 0)]
        case ReceivedBitmap(block, size):
            name = to_raw(block)
            return [_HEAD.pack(RECV_BITMAP, 1 + len(name)) + bytes([len(name)]) + name + _SIZE.pack(size)]
        case BitmapPiece(data):
            return [data]
        case BitmapEnd():
            return [BITMAP_END]
        case _ as never:  # pragma: no cover
            assert_never(never)
