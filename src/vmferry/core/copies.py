"""Where the guest is, whole: which process may not be lost. For people, and for whoever checks that nothing is.

Sources: the table of pairs in docs/faults.md; the rules are those of the tables (a destination that never ran has
changed nothing, so the source's copy is the newest; one that ran has).
"""

from __future__ import annotations

from enum import Enum

from vmferry.core.view import Grant, Source, SourceView, Target


class Copies(Enum):
    """What holds the guest as it is now."""

    SOURCE = "source"
    DESTINATION = "destination"
    BOTH = "both"
    """Each for itself: either may go on, not both."""
    TOGETHER = "both-needed"
    """The guest runs there, and some of its pages are only here."""
    LEFT_OVER = "destination-and-left-over-memory"
    """It is there but for the pages that only the source's dead process had; they may have outlived it in a file."""
    NONE = "none"
    UNKNOWN = "unknown"


_DEAD = (Source.GONE, Source.RETIRED)
_EVERYTHING_SENT = (Source.DONE, Source.RETIRED)


def complete_copies(view: SourceView) -> Copies:
    """For what is known at the source."""
    match view.target:
        case Target.RAN if view.source in _EVERYTHING_SENT:
            return Copies.DESTINATION
        case Target.RAN:
            return Copies.LEFT_OVER if view.source is Source.GONE else Copies.TOGETHER
        case Target.DIED:
            return Copies.NONE
        case Target.UNKNOWN if view.grant is Grant.SENT or view.source in _DEAD:
            return Copies.UNKNOWN
        case Target.LOADED | Target.REFUSED if view.source is Source.RETIRED:
            return Copies.DESTINATION
        case Target.LOADED | Target.REFUSED if view.source is Source.GONE:
            return Copies.LEFT_OVER
        case Target.LOADED | Target.REFUSED if view.source is Source.DONE:
            return Copies.BOTH
        case _:
            return Copies.NONE if view.source in _DEAD else Copies.SOURCE


WORDS = {
    Copies.SOURCE: "on the source: nothing of what is on the destination is needed",
    Copies.DESTINATION: "on the destination: nothing of what is on the source is needed",
    Copies.BOTH: "on both sides, each for itself; it must run on one of them only",
    Copies.TOGETHER: "on both sides together: neither process may be ended",
    Copies.LEFT_OVER: "on the destination, but for pages that only the source's process had",
    Copies.NONE: "nowhere",
    Copies.UNKNOWN: "not known until the other host answers",
}
"""For a sentence that begins with 'the whole guest is'."""
