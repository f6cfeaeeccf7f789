"""What the user wants done in trouble: parsed, changed, and what the tables hear of it."""

from __future__ import annotations

import pytest

from vmferry.core.policy import NAMES, FailurePolicy, OnPostcopyFailure, OnStorageError, parse_policy
from vmferry.core.view import Retry


@pytest.mark.proves("S47", "S118")
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("on-storage-error", "hold", {"on_storage_error": "hold"}),
        ("on-postcopy-failure", "pause", {"on_postcopy_failure": "pause"}),
        ("retry-for", "10m", {"retry_for_ms": 600_000}),
        ("retry-for", "5", {"retry_for_ms": 5_000}),
        ("retry-for", "for-ever", {"retry_for_ms": None}),
    ],
)
def test_a_policy_is_read_as_people_write_it(name: str, text: str, expected: dict[str, object]) -> None:
    assert parse_policy(name, text) == expected
    assert FailurePolicy().changed(expected) == FailurePolicy().changed(expected).changed(expected)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("on-storage-error", "perhaps", "rollback, hold, ask"),
        ("on-postcopy-failure", "stop", "run, pause"),
        ("retry-for", "soon", "is not a time"),
        ("on-sunday", "rest", ", ".join(NAMES)),
    ],
)
def test_what_is_not_possible_is_said_with_what_is(name: str, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_policy(name, text)


@pytest.mark.parametrize(
    ("storage", "retry"),
    [(OnStorageError.ROLLBACK, Retry.BACK), (OnStorageError.HOLD, Retry.AGAIN), (OnStorageError.ASK, Retry.ASK)],
)
def test_what_the_tables_hear(storage: OnStorageError, retry: Retry) -> None:
    assert FailurePolicy(on_storage_error=storage).on_refused_start is retry


def test_the_defaults_need_nobody() -> None:
    policy = FailurePolicy()
    assert (policy.on_refused_start, policy.pauses, policy.retry_for_ms) == (Retry.BACK, False, None)
    assert policy.changed({"on_postcopy_failure": "pause"}).pauses
    assert policy.changed({"on_postcopy_failure": OnPostcopyFailure.RUN}) == policy
    assert policy.changed({"on_storage_error": "ask", "retry_for_ms": 1}).retry_for_ms == 1
