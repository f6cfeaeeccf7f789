"""What must hold for any bytes on the wire: events, NEED_DATA, DONE or one `WireError`, however they are cut.

For the property tests (hypothesis) and `tools/fuzz_wire.py` (atheris) alike. The first byte of an input chooses the
decoder, the second how the rest is cut.
"""

from __future__ import annotations

from typing import Any, Final

from tests.wire_streams import BLOCKS, join, multifd, multifd_compressed, opening, postcopy, precopy
from vmferry.wire.encode import encode
from vmferry.wire.errors import WireError
from vmferry.wire.events import MultifdPacket, MultifdPayload, Pause
from vmferry.wire.multifd import COMPRESSION, MultifdDecoder, PageInflater
from vmferry.wire.preempt import PreemptDecoder
from vmferry.wire.return_path import ReturnPathDecoder
from vmferry.wire.stream import Resume, Section, Settings, StreamDecoder

DECODERS: Final[tuple[Any, ...]] = (
    StreamDecoder,
    lambda: StreamDecoder(Settings(end="end-of-input", compress=True)),
    lambda: StreamDecoder(resume=Resume(BLOCKS, {2: Section("ram"), 5: Section("dirty-bitmap")})),
    ReturnPathDecoder,
    lambda: MultifdDecoder(BLOCKS),
    lambda: PreemptDecoder(BLOCKS),
)
MAIN, LENIENT, RECOVERY, RETURN_PATH, MULTIFD, PREEMPT = range(len(DECODERS))
ROOM: Final = 4200
SLABS: Final = (1, 7, 64, 4099, 4105, 65536, 16)
Outcome = tuple[bytes, str | None, int | None]


def run(kind: int, data: bytes, slab: int, *, room: int = 0) -> Outcome:
    """What came out, encoded again, and how it ended. Raises whatever is not allowed to happen.

    `room`: so many bytes are free in front of each slab, where a decoder of the main channel may put what was left.
    """
    decoder = DECODERS[kind]()
    inflate = _Inflate()
    out = bytearray()
    try:
        for at in range(0, len(data), slab):
            piece = bytearray(room) + data[at : at + slab]
            lone = decoder.lone_request(memoryview(piece)) if isinstance(decoder, ReturnPathDecoder) else None
            if isinstance(decoder, StreamDecoder) and room:
                decoder.feed_behind(memoryview(piece), room, len(piece))
            elif lone is not None:
                out += b"".join(bytes(part) for part in encode(lone))
            else:
                decoder.feed(piece)
            _collect(decoder, out, inflate)
            piece[:] = bytes(len(piece))  # nothing may look at it any more
        if hasattr(decoder, "finish"):
            decoder.finish()
            _collect(decoder, out, inflate)
    except WireError as error:
        if _after(decoder) is not error:
            raise AssertionError("an error was forgotten") from error
        return bytes(out), error.reason, error.offset
    return bytes(out), None, None


def _collect(decoder: Any, out: bytearray, inflate: _Inflate) -> None:
    while not isinstance(event := decoder.next(), Pause):
        for part in encode(event):
            out += bytes(part)
        inflate.event(event)


class _Inflate:
    """Inflates what is compressed up to the first error, which does not end the channel's framing."""

    def __init__(self) -> None:
        self._inflater: PageInflater | None = PageInflater()

    def event(self, event: Any) -> None:
        try:
            if self._inflater is not None and isinstance(event, MultifdPacket) and event.normal:
                if event.flags & COMPRESSION:
                    self._inflater.begin(event)
            elif self._inflater is not None and isinstance(event, MultifdPayload):
                self._inflater.feed(event)
        except WireError:
            self._inflater = None


def _after(decoder: Any) -> object:
    """What a decoder says when it is asked again after its error."""
    try:
        return decoder.next()
    except WireError as again:
        return again


def one_input(data: bytes) -> None:
    """The invariants, for one input."""
    if len(data) < 2:
        return
    kind, slab, body = data[0] % len(DECODERS), SLABS[data[1] % len(SLABS)], data[2:]
    whole = run(kind, body, max(len(body), 1))
    assert body.startswith(whole[0]), "what was read does not encode to what came"
    cut = run(kind, body, slab)
    assert cut == whole, "it matters how the bytes were cut"
    if kind in (MAIN, LENIENT, RECOVERY):
        assert run(kind, body, slab, room=ROOM) == whole, "it matters whether there is room in front of a slab"


def seeds() -> dict[int, list[bytes]]:
    """Well-formed bytes for each decoder."""
    return {
        MAIN: [join(precopy()), postcopy()],
        LENIENT: [join(precopy(description=False)), join(opening()[:4])],
        RECOVERY: [join(opening()[3:4])],
        RETURN_PATH: [bytes.fromhex("0002000400000042000300130000000000001000000010000670632e72616d0001000400000000")],
        MULTIFD: [join(multifd()), join(multifd_compressed(2)), join(multifd_compressed(4))],
        PREEMPT: [join(precopy()[12:13])],
    }
