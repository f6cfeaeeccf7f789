"""Facts -> row; row and time -> effect. The only two questions that an agent's loop asks the core."""

from __future__ import annotations

from typing import TypeVar

from vmferry.core.destination_rows import DESTINATION_ROWS
from vmferry.core.effects import (
    DESTINATION_GUARDS,
    SOURCE_GUARDS,
    DestinationEffect,
    Effect,
)
from vmferry.core.facts import FactLog
from vmferry.core.source_rows import SOURCE_ROWS
from vmferry.core.table import Row, find
from vmferry.core.view import DestinationView, Incoming, Readings, SourceView, destination_view, source_view

E = TypeVar("E", Effect, DestinationEffect)


def decide_source(log: FactLog, readings: Readings) -> Row[Effect]:
    """The one row of the source's table for what is known now."""
    return find(SOURCE_ROWS, source_view(log, readings))


def decide_destination(
    log: FactLog, incoming: Incoming, *, pauses: bool = False, is_frozen: bool = False
) -> Row[DestinationEffect]:
    """The one row of the destination's table for what is known now."""
    return destination_row(destination_view(log, incoming, pauses=pauses, is_frozen=is_frozen))


def destination_row(view: DestinationView) -> Row[DestinationEffect]:
    """The one row of the destination's table for a view."""
    return find(DESTINATION_ROWS, view)


def effect_now(row: Row[E], lasted_ms: float) -> E | None:
    """What the row asks for after it has lasted so long; `then` takes over at the limit."""
    if row.limit_ms is not None and lasted_ms >= row.limit_ms:
        return row.then
    return row.do


def source_allows(effect: Effect, view: SourceView) -> bool:
    """True if the effect may be carried out in this (fresh) view."""
    return any(guard.allows(view) for guard in SOURCE_GUARDS[effect])


def destination_allows(effect: DestinationEffect, view: DestinationView) -> bool:
    """True if the effect may be carried out in this (fresh) view."""
    return any(guard.allows(view) for guard in DESTINATION_GUARDS[effect])
