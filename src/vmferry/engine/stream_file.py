"""A kept guest as a plain stream of QEMU's, in a file: what `-incoming file:` or `exec:cat` loads. Pure.

Theory of operation
-------------------
Such a stream is what a QEMU writes that migrates a guest which stands still into a file: no return path, no commands,
each page once, device state, vmdescription. Buffers come out in order, a bounded number of bytes at a time.

Rule 1: pages are read once, in order, `RUN_PAGES` at a time; zeros are told by a record of 9 bytes and never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.engine.frozen import FrozenState, run_state_of
from vmferry.engine.image import PAGE_BYTES, Pages
from vmferry.wire.encode import encode
from vmferry.wire.events import (
    Configuration,
    Description,
    DeviceSection,
    Encoded,
    EndOfRam,
    EndOfSections,
    Event,
    Header,
    MemorySize,
    PageRun,
    RamBlock,
    SectionFooter,
    SectionPart,
    SectionStart,
    ZeroRun,
)
from vmferry.wire.iterable import KNOWN, RAM

RUN_PAGES: Final = 256
"""A MiB at a time."""
ReadPages = Callable[[str, int, int], Pages]
"""(block, first, count) -> pages."""
ZeroPages = Callable[[str], npt.NDArray[np.bool_]]
"""block -> which of its pages are zero."""


def stream(
    state: FrozenState, blocks: Sequence[tuple[str, int]], read: ReadPages, zeros: ZeroPages
) -> Iterator[list[Encoded]]:
    """The stream's buffers. `blocks`: names and bytes, in the order of the snapshot. Raises what `read` raises."""
    found = state.configuration
    if found is not None:
        order = tuple(each for each in found.order if "capabilities" not in each)
        found = Configuration(found.machine, found.page_bits, None, found.uuid, order)
    yield _encoded(Header(), *(() if found is None else (found,)))
    for device in state.devices:
        if device.early:
            yield _encoded(*_device(state, device))
    number = state.ram_section_id
    wires = [RamBlock(name, size_bytes) for name, size_bytes in blocks]
    total = sum(wire.used_length for wire in wires)
    end = (EndOfRam(), *_footer(state, number))
    yield _encoded(SectionStart(number, RAM, 0, KNOWN[RAM]), MemorySize(total), *wires, *end)
    yield _encoded(SectionPart(number, last=True))
    for wire in wires:
        yield from _block(wire, read, zeros(wire.name))
    yield _encoded(*end)
    for device in state.devices:
        if not device.early:
            yield _encoded(*_device(state, device))
    yield _encoded(EndOfSections(), Description(state.description or b"{}"))


def _block(wire: RamBlock, read: ReadPages, is_zero: npt.NDArray[np.bool_]) -> Iterator[list[Encoded]]:
    named = True
    for first in range(0, len(is_zero), RUN_PAGES):
        numbers = np.arange(first, min(first + RUN_PAGES, len(is_zero)), dtype=np.uint64)
        zero = is_zero[first : first + len(numbers)]
        offsets = numbers * np.uint64(PAGE_BYTES)
        if zero.any():
            yield encode(ZeroRun(wire, offsets[zero], named))
            named = False
        if not zero.all():
            pages = read(wire.name, first, len(numbers))
            yield encode(PageRun(wire, offsets[~zero], np.ascontiguousarray(pages[~zero]), named))
            named = False


def _device(state: FrozenState, device: DeviceSection) -> tuple[Event, ...]:
    return (device, *_footer(state, device.section_id))


def _footer(state: FrozenState, section_id: int) -> tuple[Event, ...]:
    return (SectionFooter(section_id),) if state.has_footers else ()


def _encoded(*events: Event) -> list[Encoded]:
    return [part for event in events for part in encode(event)]


def was_running(state: FrozenState) -> bool:
    """Whether the guest ran when it was saved, as far as the state tells: QEMU keeps the word for it in a section."""
    return run_state_of(state.devices) in ("", "running")
