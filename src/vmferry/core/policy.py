"""What shall be done when a migration gets into trouble: the user's choice, made at its start, changeable on the way.

Theory of operation
-------------------
Three policies, each with a default that needs nobody:

    on-storage-error      the destination cannot take its disks (a lock, an I/O error) and never ran the guest
    on-postcopy-failure   the channel breaks while the guest runs there and some of its pages are still here
    retry-for             how long the agents connect a broken postcopy again before they wait for a person

Sources: the discussions behind S47, S117 to S120 (QEMU and libvirt have no such switch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from vmferry.core.view import Retry
from vmferry.units import parse_time_ms


class OnStorageError(StrEnum):
    """The destination cannot take the guest's disks."""

    ROLLBACK = "rollback"
    """The guest goes back to the source by itself."""
    HOLD = "hold"
    """The start is tried again until it works; nothing goes back by itself."""
    ASK = "ask"
    """Both sides stay paused and whole until a person says: `vmferry recover` or `vmferry cancel`."""


class OnPostcopyFailure(StrEnum):
    """The channel of a postcopy breaks."""

    RUN = "run"
    """The guest goes on; only what touches a missing page waits for it."""
    PAUSE = "pause"
    """The destination's agent stops the guest's CPUs at once, by itself, until the channel is back."""


RETRIES = {OnStorageError.ROLLBACK: Retry.BACK, OnStorageError.HOLD: Retry.AGAIN, OnStorageError.ASK: Retry.ASK}


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """The policies of one migration."""

    on_storage_error: OnStorageError = OnStorageError.ROLLBACK
    on_postcopy_failure: OnPostcopyFailure = OnPostcopyFailure.RUN
    retry_for_ms: int | None = None
    """None: for ever."""

    @property
    def on_refused_start(self) -> Retry:
        """What the tables ask."""
        return RETRIES[self.on_storage_error]

    @property
    def pauses(self) -> bool:
        """A guest without its pages is stopped."""
        return self.on_postcopy_failure is OnPostcopyFailure.PAUSE

    def changed(self, changes: Mapping[str, Any]) -> FailurePolicy:
        """With some of them replaced, by field name, in their plain form. Raises ValueError."""
        values = dict(changes)
        if "on_storage_error" in values:
            values["on_storage_error"] = OnStorageError(values["on_storage_error"])
        if "on_postcopy_failure" in values:
            values["on_postcopy_failure"] = OnPostcopyFailure(values["on_postcopy_failure"])
        return replace(self, **values)


NAMES = ("on-storage-error", "on-postcopy-failure", "retry-for")
FOR_EVER = "for-ever"


def parse_policy(name: str, text: str) -> dict[str, Any]:
    """'retry-for', '10min' -> the field and its plain value. Raises ValueError with the allowed values."""
    match name:
        case "on-storage-error":
            return {"on_storage_error": _one_of(OnStorageError, text).value}
        case "on-postcopy-failure":
            return {"on_postcopy_failure": _one_of(OnPostcopyFailure, text).value}
        case "retry-for":
            return {"retry_for_ms": None if text == FOR_EVER else parse_time_ms(text, bare_unit="s")}
        case _:
            raise ValueError(f"there is no policy {name!r} (there are: {', '.join(NAMES)})")


def _one_of(kind: type[OnStorageError] | type[OnPostcopyFailure], text: str) -> StrEnum:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not possible; allowed: {', '.join(one.value for one in kind)}") from None
