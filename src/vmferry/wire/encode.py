"""Events to bytes, for every event of the wire: what a decoder read comes out as it went in.

Rule 1: `encode` returns a list of buffers in wire order, fit for `sendmsg`; payloads are passed on, not copied,
        except that a run's heads and pages are woven together.
Rule 2: the caller keeps the order of events; an encoder has no state to go wrong.
"""

from __future__ import annotations

import struct
from typing import assert_never

from vmferry.wire import commands, configuration, devices, iterable, multifd, ram, return_path, stream
from vmferry.wire.events import (
    BitmapChunk,
    BitmapEnd,
    BitmapPiece,
    Configuration,
    Description,
    DeviceSection,
    Encoded,
    EndOfSections,
    Event,
    Header,
    MultifdInit,
    MultifdPacket,
    MultifdPages,
    MultifdPayload,
    OpaqueDevices,
    Packaged,
    PackageEnd,
    Pong,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    SectionFooter,
    SectionPart,
    SectionStart,
    Shut,
    SwitchoverAck,
)
from vmferry.wire.events import Command as _Command
from vmferry.wire.events import RamEvent as _RamEvent

_TAGGED = struct.Struct(">BI")


def encode(event: Event) -> list[Encoded]:
    """The bytes of one event of any channel."""
    if isinstance(event, _RamEvent):
        return ram.encode(event)
    if isinstance(event, _Command):
        return [commands.encode(event)]
    match event:
        case SectionPart(section_id, last):
            return [_TAGGED.pack(stream.END if last else stream.PART, section_id)]
        case SectionFooter(section_id):
            return [_TAGGED.pack(devices.FOOTER, section_id)]
        case DeviceSection():
            return [*devices.encode(event)]
        case SectionStart(section_id, idstr, instance, version):
            return [devices.encode_head(stream.START, section_id, idstr, instance, version)]
        case BitmapChunk():
            return [iterable.encode_chunk(event)]
        case Header():
            return [stream.MAGIC]
        case Configuration():
            return [configuration.encode(event)]
        case EndOfSections():
            return [bytes([stream.EOF])]
        case Description(text):
            return [_TAGGED.pack(stream.DESCRIPTION, len(text)), text]
        case OpaqueDevices(data):
            return [data]
        case PackageEnd():
            return []
        case MultifdInit() | MultifdPacket() | MultifdPages() | MultifdPayload():
            return multifd.encode(event)
        case (
            Shut() | Pong() | RequestPages() | ReceivedBitmap() | BitmapPiece() | BitmapEnd() | ResumeAck()
            | SwitchoverAck()
        ):  # fmt: skip
            return return_path.encode(event)
        case _ as never:  # pragma: no cover
            assert_never(never)


def encode_package(events: list[Event]) -> list[Encoded]:
    """The command PACKAGED and these events as its content."""
    body = b"".join(bytes(part) for event in events for part in encode(event))
    return [commands.encode(Packaged(len(body))), body]
