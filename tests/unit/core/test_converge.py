"""Convergence: what is done about a migration that does not end, and which mode is picked, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.core import converge
from vmferry.core.converge import (
    Choice,
    ConvergePolicy,
    Decision,
    FailurePreference,
    GiveUp,
    Keep,
    ModeInputs,
    PostcopyStart,
    RaiseThrottle,
    Sample,
    StartPostcopy,
    decide,
    is_stalled,
    pass_ends,
    pick_mode,
)
from vmferry.core.options import Mode
from vmferry.units import GIB, MIB


def run(*remaining_mib: int, throttle: int = 0, postcopy: bool = False) -> list[Sample]:
    """One sample per pass, a second each."""
    return [
        Sample(
            elapsed_ms=1000.0 * number, sent_bytes=100 * MIB * number, remaining_bytes=left * MIB, passes=number,
            throughput_bytes_per_s=100.0 * MIB, dirty_rate_bytes_per_s=90.0 * MIB, throttle_percent=throttle,
            in_postcopy=postcopy,
        )
        for number, left in enumerate(remaining_mib, 1)
    ]  # fmt: skip


STALLED = run(1000, 500, 490, 495, 500, 498)
FALLING = run(1000, 500, 300, 200, 100, 50)
P = ConvergePolicy
START = PostcopyStart


@pytest.mark.parametrize(
    ("samples", "policy", "by_hand", "kind", "words"),
    [
        ([], P(), False, Keep, "nothing has been measured"),
        (run(9, postcopy=True), P(start=START.STALL), True, Keep, "in postcopy"),
        (run(9), P(start=START.HAND), True, StartPostcopy, "by hand"),
        (run(9), P(start=START.NEVER), True, Keep, "remain"),
        (run(9, 8, 7), P(start=START.HAND), False, Keep, "remain"),
        (FALLING, P(give_up_after_ms=6000), False, GiveUp, "time given for it is over"),
        (FALLING, P(give_up_after_ms=6001), False, Keep, "50.0 MiB remain, 100 MiB/s are sent and 90.0 MiB/s"),
        (run(9), P(start=START.FIRST_PASS), False, Keep, "remain"),
        (run(9, 8), P(start=START.FIRST_PASS), False, StartPostcopy, "the first pass is over: after 2.00 s"),
        (run(9), P(start=START.TIME, postcopy_after_ms=10), False, Keep, "remain"),
        (run(9, 8), P(start=START.TIME, postcopy_after_ms=2001), False, Keep, "remain"),
        (run(9, 8), P(start=START.TIME, postcopy_after_ms=2000), False, StartPostcopy, "time for precopy"),
        (run(9, 8), P(start=START.TIME), False, Keep, "remain"),
        (STALLED, P(start=START.STALL), False, StartPostcopy, "3 passes made no progress"),
        (FALLING, P(start=START.STALL), False, Keep, "remain"),
        (STALLED, P(), False, Keep, "does not converge"),
        (STALLED, P(give_up_on_stall=True), False, GiveUp, "no progress"),
        (run(9, 9, 9, 9, 9, throttle=20), P(throttle=True), False, RaiseThrottle, "slowed by 20 %"),
        (run(9, 9, 9, 9, 9, throttle=0), P(throttle=True), False, Keep, "does not converge"),
        (run(9, 9, 9, 9, 9, throttle=99), P(throttle=True, give_up_on_stall=True), False, GiveUp, "no progress"),
    ],
)
def test_the_table_of_decisions(
    samples: list[Sample], policy: ConvergePolicy, by_hand: bool, kind: type, words: str
) -> None:
    decision = decide(samples, policy, by_hand=by_hand)
    assert type(decision) is kind
    assert words in decision.why


@pytest.mark.parametrize(("throttle", "step"), [(20, 10), (40, 20), (90, 45)])
def test_throttle_steps_grow_up_to_the_limit(throttle: int, step: int) -> None:
    decision = decide(run(9, 9, 9, 9, 9, throttle=throttle), P(throttle=True, throttle_max_percent=95))
    assert isinstance(decision, RaiseThrottle)
    assert decision.increment_percent == step
    capped = decide(
        run(9, 9, 9, 9, 9, throttle=20), P(throttle=True, throttle_max_percent=25, throttle_step_percent=30)
    )
    assert capped == RaiseThrottle(25, decision.why.replace(f"{throttle} %", "20 %"))


def test_pass_ends_are_the_lows_of_completed_passes() -> None:
    again = [
        *run(50, 40),
        Sample(elapsed_ms=2500, sent_bytes=0, remaining_bytes=30 * MIB, passes=2),
        *run(9, 9, 20)[2:],
    ]
    assert pass_ends(again) == (50 * MIB, 30 * MIB)
    assert pass_ends([]) == ()


def test_a_stall_needs_full_passes_and_a_base() -> None:
    assert not is_stalled(run(9, 9, 9), 2)
    assert is_stalled(run(9, 9, 9, 9), 2)
    assert not is_stalled(run(100, 97, 94, 1), 2)
    assert is_stalled(run(100, 97, 96, 1), 2)


samples_strategy = st.lists(
    st.builds(
        Sample,
        elapsed_ms=st.floats(0, 1e6), sent_bytes=st.integers(0, 1 << 40), remaining_bytes=st.integers(0, 1 << 40),
        throughput_bytes_per_s=st.floats(0, 1e12), dirty_rate_bytes_per_s=st.floats(0, 1e12),
        passes=st.integers(1, 12), throttle_percent=st.integers(0, 99), in_postcopy=st.booleans(),
    ),
    max_size=30,
)  # fmt: skip
policies = st.builds(
    ConvergePolicy,
    start=st.sampled_from(START), stall_passes=st.integers(1, 5),
    postcopy_after_ms=st.none() | st.floats(0, 1e6), give_up_after_ms=st.none() | st.floats(0, 1e6),
    give_up_on_stall=st.booleans(), throttle=st.booleans(), throttle_step_percent=st.integers(1, 99),
    throttle_max_percent=st.integers(1, 99),
)  # fmt: skip


@given(samples_strategy, policies, st.booleans())
def test_nothing_happens_that_the_policy_does_not_permit(
    samples: list[Sample], policy: ConvergePolicy, by_hand: bool
) -> None:
    decision: Decision = decide(samples, policy, by_hand=by_hand)
    assert decision.why
    match decision:
        case StartPostcopy():
            assert policy.start is not START.NEVER
            assert by_hand or pass_ends(samples)
            assert not samples[-1].in_postcopy
        case RaiseThrottle(increment_percent=step):
            assert policy.throttle
            assert 1 <= step <= policy.throttle_max_percent
        case GiveUp():
            assert policy.give_up_on_stall or policy.give_up_after_ms is not None
            assert not samples[-1].in_postcopy
        case Keep():
            pass


# --- auto

FIT: dict[str, Any] = {
    "memory_bytes": 8 * GIB,
    "source_version": (11, 1, 2),
    "destination_version": (11, 1, 2),
    "userfaultfd_source": True,
    "userfaultfd_destination": True,
    "has_vfio": False,
}
OLD = {"destination_version": (7, 2, 22)}
FAST = {"link_bytes_per_s": 1e9, "dirty_rate_bytes_per_s": 1e7}
PRE = (Mode.PRECOPY, START.NEVER)
STANDBY = (Mode.POSTCOPY, START.STALL)
FIRST = (Mode.POSTCOPY, START.FIRST_PASS)


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({"has_vfio": True}, PRE, "has a passed-through device"),
        ({"has_vfio": None}, PRE, "(VFIO) is not known"),
        ({"userfaultfd_destination": False}, PRE, "does not allow userfaultfd"),
        ({"userfaultfd_destination": None}, PRE, "userfaultfd is not known"),
        ({"multifd_channels": 2, "source_version": (10, 0, 5)}, PRE, "needs QEMU 10.1"),
        ({"multifd_channels": 2}, STANDBY, "postcopy stands by"),
        ({"preference": FailurePreference.SURE}, PRE, "you asked"),
        ({"memory_bytes": GIB, "link_bytes_per_s": 1e9}, PRE, "the whole memory moves in 1.07 s"),
        ({"memory_bytes": GIB, "link_bytes_per_s": 1e9, "dirty_rate_bytes_per_s": 9e8}, FIRST, "hardly end"),
        ({"link_bytes_per_s": 1e9, "dirty_rate_bytes_per_s": 2e9}, FIRST, "1.9 GiB/s"),
        (OLD | FAST, PRE, "older than 10.2"),
        (OLD | FAST | {"preference": FailurePreference.FINISH}, STANDBY, "stands by if it stalls"),
        ({"userfaultfd_source": None}, PRE, "the way back"),
        ({"userfaultfd_source": False, "preference": FailurePreference.FINISH}, STANDBY, "stands by"),
        (FAST, STANDBY, "9.5 MiB/s"),
        ({}, STANDBY, "is not known; postcopy stands by"),
        ({"dirty_rate_bytes_per_s": 5.0}, STANDBY, "is not known; postcopy stands by"),
        ({"dirty_rate_bytes_per_s": 5.0, "link_bytes_per_s": 0.0}, STANDBY, "is not known; postcopy"),
    ],
)
def test_auto_picks_and_says_why(changes: dict[str, Any], expected: tuple[Mode, PostcopyStart], words: str) -> None:
    choice = pick_mode(ModeInputs(**(FIT | changes)))
    assert (choice.mode, choice.start) == expected
    assert words in choice.why


@given(
    st.sampled_from([True, False, None]), st.sampled_from([True, False, None]),
    st.none() | st.floats(0, 1e12), st.none() | st.floats(0, 1e12), st.sampled_from(FailurePreference),
    st.integers(1, 1 << 40), st.integers(0, 8),
)  # fmt: skip
def test_auto_never_guesses_for_postcopy(
    vfio: bool | None,
    uffd: bool | None,
    dirty: float | None,
    link: float | None,
    preference: FailurePreference,
    memory_bytes: int,
    channels: int,
) -> None:
    choice: Choice = pick_mode(
        ModeInputs(
            **(FIT | {"has_vfio": vfio, "userfaultfd_destination": uffd, "dirty_rate_bytes_per_s": dirty,
                      "link_bytes_per_s": link, "preference": preference, "memory_bytes": memory_bytes,
                      "multifd_channels": channels})
        )
    )  # fmt: skip
    assert choice.why
    if choice.mode is Mode.POSTCOPY:
        assert vfio is False
        assert uffd is True
        assert preference is not FailurePreference.SURE
    assert (choice.start is START.NEVER) == (choice.mode is Mode.PRECOPY)


def test_the_public_names_exist() -> None:
    assert all(hasattr(converge, name) for name in converge.__all__)
