"""Will it converge? From samples to keep going, slow the guest, switch to postcopy, or give up.

Theory of operation
-------------------
`pick_mode` chooses precopy or postcopy for `--mode auto` before the start; `decide` looks at the samples of a
running precopy and says what to do next. Both walk a table from top to bottom, the first row that matches
wins, and both say why with the numbers they used.

Rule 1: postcopy begins only if the policy permits it, and never before the first pass is over: what was not
sent even once would have to be fetched page by page.
Rule 2: a stall is counted in passes, not in time: a slow link is not a stall.
Rule 3: what the person asks for by hand comes before everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vmferry.core.options import Mode
from vmferry.core.progress import Eta, Forecast, Progress, Sample, eta
from vmferry.units import format_ms, format_size

__all__ = [
    "Choice", "ConvergePolicy", "Decision", "Eta", "FailurePreference", "Forecast", "GiveUp", "Keep", "ModeInputs",
    "PostcopyStart", "Progress", "RaiseThrottle", "Sample", "StartPostcopy", "decide", "eta", "is_stalled",
    "pass_ends", "pick_mode",
]  # fmt: skip

GAIN: Final = 0.95
"""A pass made progress if it ended with less than this share of the best earlier end: less is noise."""
FILL: Final = 0.8
"""Above this share of the link the dirty rate leaves too little to catch up in reasonable time."""
SMALL_MOVE_MS: Final = 2000
"""A VM whose whole memory moves in this time gains nothing from postcopy."""
ROLLBACK_SINCE: Final = (10, 2)
"""The first QEMU that can go back while the destination loads the devices of a postcopy migration."""
MULTIFD_POSTCOPY_SINCE: Final = (10, 1)


class PostcopyStart(StrEnum):
    """When a migration that may use postcopy begins it."""

    NEVER = "never"
    FIRST_PASS = "first-pass"
    STALL = "stall"
    TIME = "time"
    HAND = "hand"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvergePolicy:
    """What the person permits. Times are ms since the start of the attempt; None = no limit."""

    start: PostcopyStart = PostcopyStart.NEVER
    stall_passes: int = 3
    postcopy_after_ms: float | None = None
    give_up_after_ms: float | None = None
    give_up_on_stall: bool = False
    throttle: bool = False
    throttle_step_percent: int = 10
    throttle_max_percent: int = 99


@dataclass(frozen=True, slots=True)
class Keep:
    """Nothing to do."""

    why: str


@dataclass(frozen=True, slots=True)
class RaiseThrottle:
    """Let auto-converge slow the guest in larger steps: the value for cpu-throttle-increment."""

    increment_percent: int
    why: str


@dataclass(frozen=True, slots=True)
class StartPostcopy:
    """Switch over now; the rest of the memory follows."""

    why: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Cancel: the guest stays where it is."""

    why: str


Decision = Keep | RaiseThrottle | StartPostcopy | GiveUp


def pass_ends(samples: Sequence[Sample]) -> tuple[int, ...]:
    """The least that remained in each completed pass, oldest first; a pass is over when the next begins."""
    lows: dict[int, int] = {}
    for sample in samples:
        lows[sample.passes] = min(sample.remaining_bytes, lows.get(sample.passes, sample.remaining_bytes))
    newest = max(lows, default=0)
    return tuple(low for number, low in sorted(lows.items()) if number < newest)


def is_stalled(samples: Sequence[Sample], passes: int) -> bool:
    """True if none of the last `passes` completed passes ended clearly lower than the best one before."""
    assert passes > 0, "a stall is at least one pass long"
    ends = pass_ends(samples)
    if len(ends) <= passes:
        return False
    return min(ends[-passes:]) >= GAIN * min(ends[:-passes])


@dataclass(frozen=True, slots=True)
class _Now:
    samples: Sequence[Sample]
    policy: ConvergePolicy
    by_hand: bool

    @property
    def last(self) -> Sample:
        return self.samples[-1]

    @property
    def first_pass_over(self) -> bool:
        return bool(pass_ends(self.samples))

    @property
    def stalled(self) -> bool:
        return is_stalled(self.samples, self.policy.stall_passes)

    def after(self, limit_ms: float | None) -> bool:
        return limit_ms is not None and self.last.elapsed_ms >= limit_ms

    def starts(self, start: PostcopyStart) -> bool:
        return self.policy.start is start and self.first_pass_over

    def arithmetic(self) -> str:
        last = self.last
        return (
            f"after {format_ms(last.elapsed_ms)} and {last.passes} passes "
            f"{format_size(last.remaining_bytes)} remain, "
            f"{format_size(last.throughput_bytes_per_s)}/s are sent and "
            f"{format_size(last.dirty_rate_bytes_per_s)}/s are changed"
        )


def _next_step(now: _Now) -> int:
    step = max(now.policy.throttle_step_percent, now.last.throttle_percent // 2)
    return min(step, now.policy.throttle_max_percent)


def _can_throttle(now: _Now) -> bool:
    throttled = now.last.throttle_percent
    return now.policy.throttle and 0 < throttled < now.policy.throttle_max_percent


_Then = Callable[[_Now], Decision]
_ROWS: Final[tuple[tuple[str, Callable[[_Now], bool], _Then], ...]] = (
    ("no sample yet", lambda n: not n.samples, lambda n: Keep("nothing has been measured yet")),
    ("already in postcopy", lambda n: n.last.in_postcopy, lambda n: Keep("the rest follows in postcopy")),
    ("by hand", lambda n: n.by_hand and n.policy.start is not PostcopyStart.NEVER,
     lambda n: StartPostcopy("it was asked for by hand")),
    ("time is up", lambda n: n.after(n.policy.give_up_after_ms),
     lambda n: GiveUp(f"the time given for it is over: {n.arithmetic()}")),
    ("after the first pass", lambda n: n.starts(PostcopyStart.FIRST_PASS),
     lambda n: StartPostcopy(f"the first pass is over: {n.arithmetic()}")),
    ("after a time", lambda n: n.starts(PostcopyStart.TIME) and n.after(n.policy.postcopy_after_ms),
     lambda n: StartPostcopy(f"the time for precopy is over: {n.arithmetic()}")),
    ("stall, postcopy", lambda n: n.starts(PostcopyStart.STALL) and n.stalled,
     lambda n: StartPostcopy(f"{n.policy.stall_passes} passes made no progress: {n.arithmetic()}")),
    ("stall, throttle", lambda n: n.stalled and _can_throttle(n),
     lambda n: RaiseThrottle(_next_step(n), f"{n.policy.stall_passes} passes made no progress although the "
                             f"guest is slowed by {n.last.throttle_percent} %")),
    ("stall, give up", lambda n: n.stalled and n.policy.give_up_on_stall,
     lambda n: GiveUp(f"{n.policy.stall_passes} passes made no progress: {n.arithmetic()}")),
    ("stall", lambda n: n.stalled, lambda n: Keep(f"it does not converge: {n.arithmetic()}")),
    ("on its way", lambda n: True, lambda n: Keep(n.arithmetic())),
)  # fmt: skip


def decide(samples: Sequence[Sample], policy: ConvergePolicy, *, by_hand: bool = False) -> Decision:
    """What to do now. `samples`: all of this attempt, oldest first; `by_hand`: postcopy was asked for now.

    A request by hand against a policy of `never` changes nothing: QEMU was not set up for postcopy.
    """
    now = _Now(samples, policy, by_hand)
    return next(then(now) for _, matches, then in _ROWS if matches(now))


# --- --mode auto -----------------------------------------------------------------------------------------


class FailurePreference(StrEnum):
    """What the person fears more: a migration without end, or a time in which both hosts are needed."""

    SURE = "sure"
    BALANCED = "balanced"
    FINISH = "finish"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeInputs:
    """What is known before the start; None = not known."""

    memory_bytes: int
    source_version: tuple[int, ...]
    destination_version: tuple[int, ...]
    userfaultfd_source: bool | None = None
    userfaultfd_destination: bool | None = None
    has_vfio: bool | None = None
    dirty_rate_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None
    multifd_channels: int = 0
    preference: FailurePreference = FailurePreference.BALANCED

    @property
    def oldest_version(self) -> tuple[int, ...]:
        """The older of the two QEMUs, as major and minor."""
        return min(self.source_version[:2], self.destination_version[:2])

    @property
    def whole_ms(self) -> float | None:
        """How long the whole memory needs on this link."""
        return self.memory_bytes / self.link_bytes_per_s * 1000 if self.link_bytes_per_s else None

    @property
    def fill(self) -> float | None:
        """The dirty rate as a share of the link."""
        if self.dirty_rate_bytes_per_s is None or not self.link_bytes_per_s:
            return None
        return self.dirty_rate_bytes_per_s / self.link_bytes_per_s


@dataclass(frozen=True, slots=True)
class Choice:
    """The mode, when postcopy begins, and why."""

    mode: Mode
    start: PostcopyStart
    why: str


def _rates(i: ModeInputs) -> str:
    dirty, link = i.dirty_rate_bytes_per_s or 0.0, i.link_bytes_per_s or 0.0
    return f"the guest changes {format_size(dirty)}/s and the link carries {format_size(link)}/s"


_PRE: Final = (Mode.PRECOPY, PostcopyStart.NEVER)
_ON_STALL: Final = (Mode.POSTCOPY, PostcopyStart.STALL)
_FIRST_PASS: Final = (Mode.POSTCOPY, PostcopyStart.FIRST_PASS)
_Matches = Callable[[ModeInputs], bool]
_Why = Callable[[ModeInputs], str]
_MODES: Final[tuple[tuple[tuple[Mode, PostcopyStart], _Matches, _Why], ...]] = (
    (_PRE, lambda i: i.has_vfio is not False,
     lambda i: "the VM has a passed-through device (VFIO), whose memory cannot follow later" if i.has_vfio
     else "whether the VM has a passed-through device (VFIO) is not known"),
    (_PRE, lambda i: i.userfaultfd_destination is not True,
     lambda i: "the destination does not allow userfaultfd" if i.userfaultfd_destination is False
     else "whether the destination allows userfaultfd is not known"),
    (_PRE, lambda i: i.multifd_channels > 0 and i.oldest_version < MULTIFD_POSTCOPY_SINCE,
     lambda i: "multifd together with postcopy needs QEMU 10.1 on both hosts"),
    (_PRE, lambda i: i.preference is FailurePreference.SURE,
     lambda i: "you asked that one host has the complete VM at every moment"),
    (_PRE, lambda i: i.whole_ms is not None and i.whole_ms <= SMALL_MOVE_MS and (i.fill or 0.0) < FILL,
     lambda i: f"the whole memory moves in {format_ms(i.whole_ms or 0.0)}"),
    (_FIRST_PASS, lambda i: i.fill is not None and i.fill >= FILL,
     lambda i: f"precopy would hardly end: {_rates(i)}"),
    (_PRE, lambda i: i.oldest_version < ROLLBACK_SINCE and i.preference is not FailurePreference.FINISH,
     lambda i: "one QEMU is older than 10.2 and could not go back by itself from a failed start of postcopy"),
    (_PRE, lambda i: i.userfaultfd_source is not True and i.preference is not FailurePreference.FINISH,
     lambda i: "the source does not allow userfaultfd, so the way back would be without postcopy"),
    (_ON_STALL, lambda i: i.fill is not None,
     lambda i: f"precopy should end, and postcopy stands by if it stalls: {_rates(i)}"),
    (_ON_STALL, lambda i: True,
     lambda i: "how fast the guest changes its memory is not known; postcopy stands by if precopy stalls"),
)  # fmt: skip


def pick_mode(inputs: ModeInputs) -> Choice:
    """The mode for `--mode auto`. What is not known counts against postcopy, never for it."""
    (mode, start), _, why = next(row for row in _MODES if row[1](inputs))
    return Choice(mode, start, why(inputs))
