"""Where the whole guest is: said for every combination of answers, and never more than is known."""

from __future__ import annotations

from itertools import product

import pytest

from vmferry.core.copies import WORDS, Copies, complete_copies
from vmferry.core.view import Change, Cpus, Grant, Retry, Source, SourceView, Step, Target, Want

S, T, G, C = Source, Target, Grant, Copies


def view(source: Source, target: Target, grant: Grant) -> SourceView:
    return SourceView(Want.GO, Step.STARTED, source, Cpus.STOPPED, target, grant, Change.NONE, Retry.AGAIN)


@pytest.mark.proves("S26", "S42", "S49")
@pytest.mark.parametrize(
    ("source", "target", "grant", "expected"),
    [
        (S.BUSY, T.PREPARED, G.NONE, C.SOURCE),
        (S.BUSY, T.UNKNOWN, G.NONE, C.SOURCE),
        (S.DONE, T.LOADED, G.HELD, C.BOTH),
        (S.DONE, T.REFUSED, G.SENT, C.BOTH),
        (S.POSTCOPY, T.LOADED, G.SENT, C.SOURCE),
        (S.DONE, T.RAN, G.SENT, C.DESTINATION),
        (S.RETIRED, T.RAN, G.SENT, C.DESTINATION),
        (S.BROKEN, T.RAN, G.SENT, C.TOGETHER),
        (S.GONE, T.RAN, G.SENT, C.LEFT_OVER),
        (S.GONE, T.LOADED, G.SENT, C.LEFT_OVER),
        (S.RETIRED, T.LOADED, G.SENT, C.DESTINATION),
        (S.DONE, T.UNKNOWN, G.SENT, C.UNKNOWN),
        (S.GONE, T.UNKNOWN, G.NONE, C.UNKNOWN),
        (S.DONE, T.DIED, G.SENT, C.NONE),
        (S.GONE, T.GONE, G.SENT, C.NONE),
        (S.BROKEN, T.GONE, G.SENT, C.SOURCE),
    ],
)
def test_where_it_is(source: Source, target: Target, grant: Grant, expected: Copies) -> None:
    assert complete_copies(view(source, target, grant)) is expected


def test_every_answer_has_words_and_a_dead_source_is_never_said_to_have_it() -> None:
    for source, target, grant in product(Source, Target, Grant):
        found = complete_copies(view(source, target, grant))
        assert WORDS[found]
        if source in (S.GONE, S.RETIRED):
            assert found not in (C.SOURCE, C.BOTH, C.TOGETHER)
