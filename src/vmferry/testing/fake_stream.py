"""A fake QEMU that migrates into vmferry's own endpoint: the turning points of `fake_link`, in QEMU's own bytes.

`header`, `ram` and `device` become a stream of a small guest (two blocks, one page that changes, two devices), and the
destination's SHUT becomes `result`. Written by hand: a fake starts without numpy, and so without `wire`.

Rule 1: which links speak so is said by the descriptor's name (`SPEAKS`): those that an agent hands over to save.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

from vmferry.testing.fake_link import Link, LinkLost, SocketLink

SPEAKS: Final = frozenset({"vmferry-save"})
PAGE_BYTES: Final = 4096
BLOCKS: Final = {"pc.ram": 64 * PAGE_BYTES, "pc.bios": 4 * PAGE_BYTES}
_DEVICES: Final = {"timer": b"\x01\x02\x03\x04", "cpu": b"state of the cpu"}
_RAM_SECTION, _EOS, _PAGE, _ZERO, _SIZE, _CONTINUE = 2, 0x10, 0x08, 0x02, 0x04, 0x20
_FLAGS = struct.Struct(">Q")
_SHUT, _PONG = 1, 2
_MESSAGE = struct.Struct(">HH")


def page(number: int) -> bytes:
    """The content of page `number` of pc.ram as it is in the end: odd ones are not zero."""
    return bytes([number]) * PAGE_BYTES if number % 2 else bytes(PAGE_BYTES)


class StreamLink(Link):
    """One connection to an endpoint."""

    def __init__(self, link: SocketLink, *, machine: str, asks: bool) -> None:
        super().__init__()
        self._link, self._machine, self._asks = link, machine, asks
        self.lost = link.lost
        link._task.cancel()  # it would read JSON; what comes here are QEMU's bytes
        self._reader, self._writer = link._reader, link._writer
        self._sent_all = False

    def send(self, kind: str, **more: Any) -> None:
        match kind:
            case "header":
                self._writer.write(_header(self._machine, asks=self._asks) + _setup())
            case "ram":
                if not self._sent_all:  # once: it is the turning points that count
                    self._writer.write(_part(0x02, _pages(first=True)))
                self._sent_all = True
            case "device":
                self._writer.write(_part(0x03, _pages(first=False)) + _devices(str(more["run_state"])))
            case _:
                raise AssertionError(f"{kind} is no part of a save")

    async def receive(self) -> dict[str, Any]:
        """SHUT as `result`. Raises LinkLost."""
        if not self._asks:
            return {"kind": "result", "ok": True}
        try:
            while True:
                kind, length = _MESSAGE.unpack(await self._reader.readexactly(_MESSAGE.size))
                body = await self._reader.readexactly(length)
                if kind == _SHUT:
                    return {"kind": "result", "ok": body == bytes(4)}
                assert kind == _PONG, kind
        except (OSError, EOFError) as error:
            self.lost.set()
            raise LinkLost from error

    def cut(self) -> None:
        self._link.cut()

    def close(self) -> None:
        self._link.close()


def _header(machine: str, *, asks: bool) -> bytes:
    name = machine.encode()
    text = b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", len(name)) + name
    return text + (b"\x08" + struct.pack(">HH", 1, 0) if asks else b"")


def _name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def _footer(section_id: int) -> bytes:
    return b"\x7e" + struct.pack(">I", section_id)


def _setup() -> bytes:
    head = b"\x01" + struct.pack(">I", _RAM_SECTION) + _name("ram") + struct.pack(">II", 0, 4)
    blocks = b"".join(_name(name) + _FLAGS.pack(size) for name, size in BLOCKS.items())
    return head + _FLAGS.pack(sum(BLOCKS.values()) | _SIZE) + blocks + _FLAGS.pack(_EOS) + _footer(_RAM_SECTION)


def _part(tag: int, body: bytes) -> bytes:
    return bytes([tag]) + struct.pack(">I", _RAM_SECTION) + body + _FLAGS.pack(_EOS) + _footer(_RAM_SECTION)


def _pages(*, first: bool) -> bytes:
    """The first pass over all of pc.ram, or the last one: page 1 comes again, as it is in the end."""
    text = b""
    for number in range(BLOCKS["pc.ram"] // PAGE_BYTES) if first else (1,):
        sticky = _CONTINUE if text else 0
        name = b"" if text else _name("pc.ram")
        at = number * PAGE_BYTES
        if number % 2:
            content = bytes([0xEE]) * PAGE_BYTES if first and number == 1 else page(number)
            text += _FLAGS.pack(at | _PAGE | sticky) + name + content
        else:
            text += _FLAGS.pack(at | _ZERO | sticky) + name + b"\0"
    return text


def devices(run_state: str) -> dict[str, bytes]:
    """Sections and their bodies; in one of them QEMU says what its run state is."""
    word = run_state.encode()
    return {**_DEVICES, "globalstate": struct.pack(">I", len(word) + 1) + word.ljust(100, b"\0")}


def _devices(run_state: str) -> bytes:
    text = b""
    described = []
    for number, (name, body) in enumerate(devices(run_state).items(), 3):
        text += b"\x04" + struct.pack(">I", number) + _name(name) + struct.pack(">II", 0, 1) + body + _footer(number)
        field = {"name": "data", "type": "buffer", "size": len(body)}
        described.append({"name": name, "instance_id": 0, "vmsd_name": name, "version": 1, "fields": [field]})
    document = json.dumps({"page_size": PAGE_BYTES, "devices": described}).encode()
    return text + b"\0\x06" + struct.pack(">I", len(document)) + document
