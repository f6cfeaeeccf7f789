"""THE table of migration options: every capability and parameter of QEMU 7.2 to 11.1, one row each.

Theory of operation
-------------------
QEMU has capabilities (bool) and parameters (anything) and accepts most of them at any moment, also when a
change destroys the running migration. This table says per option what it is, who uses it, when it is first
used, when it may change, and what vmferry does with it. `options` reads it; nothing else
knows an option by name.

Rule 1: presence is decided at run time by what the QEMU itself reports; `since` and `gone_in` are for people.
Rule 2: `Window` is an allow-list. Whatever is not open is locked: a new status or row locks by itself.
Rule 3: an option in a window other than LOCKED says in `safe_because` why a change cannot hurt.
Rule 4: `default` is what vmferry sets when nobody chose a value; UNSET = it cannot or must not be reset.

Sources: QEMU's schema and `query-migrate-*` of 7.2.22 and 11.1.2 (names, defaults, enum values), its own
refusals (ranges), and trials of every option in every state (windows).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any, Final

from vmferry.units import MIB

Version = tuple[int, int]
Value = bool | int | str | list[Any]


class Kind(StrEnum):
    """Which of QEMU's two commands sets it."""

    CAPABILITY = "capability"
    PARAMETER = "parameter"


class ValueType(StrEnum):
    """What the value is and in which unit QEMU takes it."""

    BOOL = "on/off"
    INT = "number"
    PERCENT = "percent"
    SIZE = "size in bytes"
    RATE = "bytes per second"
    RATE_MB = "MB per second"
    TIME = "time in ms"
    ENUM = "word"
    STR = "text"
    LIST = "list"


class Role(StrEnum):
    """The side that an option matters to."""

    SOURCE = "source"
    DESTINATION = "destination"


class Window(StrEnum):
    """When an option may change while an attempt is on; `options.OPEN` maps each to its statuses."""

    LOCKED = "locked"
    ACTIVE = "while active"
    ACTIVE_AND_POSTCOPY = "while active and in postcopy"
    POSTCOPY_PAUSED = "while postcopy is paused, before resume"


class Policy(StrEnum):
    """What vmferry does with the option."""

    FREE = "free"
    FORCED_ON = "forced on"
    FORBIDDEN = "forbidden"
    MANAGED = "managed"


class _Unset(Enum):
    UNSET = "unset"


UNSET: Final = _Unset.UNSET
SOURCE: Final = frozenset({Role.SOURCE})
DESTINATION: Final = frozenset({Role.DESTINATION})
BOTH: Final = frozenset(Role)
UNLIMITED_BYTES_PER_S: Final = 1 << 40
"""1 TiB/s: no limit in practice. QEMU's own default of 128 MiB/s would throttle every link above 1 Gbit/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One row. `reason` belongs to the policy (why forced, forbidden, or who manages it)."""

    name: str
    kind: Kind
    type: ValueType
    roles: frozenset[Role]
    since: Version
    first_use: str
    what: str
    gone_in: Version | None = None
    low: int | None = None
    high: int | None = None
    power_of_two: bool = False
    words: tuple[str, ...] = ()
    qemu_default: Value | _Unset = UNSET
    default: Value | _Unset = UNSET
    window: Window = Window.LOCKED
    policy: Policy = Policy.FREE
    reason: str = ""
    safe_because: str = ""
    meaningful_later: str = "no"

    def allowed(self) -> str:
        """The values a person may write, as text."""
        match self.type:
            case ValueType.BOOL:
                return "on or off"
            case ValueType.ENUM:
                return ", ".join(self.words)
            case ValueType.STR | ValueType.LIST:
                return str(self.type)
            case _:
                assert self.low is not None, "every number has a range"
                assert self.high is not None, "every number has a range"
                if self.high > UNLIMITED_BYTES_PER_S:
                    return f"{self.low} or more ({self.type})"
                return f"{self.low} to {self.high} ({self.type})"


def _cap(
    name: str,
    roles: frozenset[Role],
    since: Version,
    first_use: str,
    what: str,
    *,
    gone_in: Version | None = None,
    policy: Policy = Policy.FREE,
    reason: str = "",
    later: str = "no",
) -> Option:
    return Option(
        name=name, kind=Kind.CAPABILITY, type=ValueType.BOOL, roles=roles, since=since, first_use=first_use,
        what=what, gone_in=gone_in, qemu_default=False, default=policy is Policy.FORCED_ON, policy=policy,
        reason=reason, meaningful_later=later,
    )  # fmt: skip


def _par(
    name: str,
    type_: ValueType,
    roles: frozenset[Role],
    since: Version,
    first_use: str,
    what: str,
    *,
    between: tuple[int, int] | None = None,
    power_of_two: bool = False,
    qemu: Value | _Unset = UNSET,
    ours: Value | _Unset | None = None,
    words: tuple[str, ...] = (),
    gone_in: Version | None = None,
    window: Window = Window.LOCKED,
    safe_because: str = "",
    later: str = "no",
    policy: Policy = Policy.FREE,
    reason: str = "",
) -> Option:
    low, high = between or (None, None)
    return Option(
        name=name, kind=Kind.PARAMETER, type=type_, roles=roles, since=since, first_use=first_use, what=what,
        low=low, high=high, words=words, gone_in=gone_in, qemu_default=qemu,
        power_of_two=power_of_two,
        default=qemu if ours is None else ours, window=window, safe_because=safe_because,
        meaningful_later=later, policy=policy, reason=reason,
    )  # fmt: skip


_FREE, _ON, _NO, _MANAGED = Policy.FREE, Policy.FORCED_ON, Policy.FORBIDDEN, Policy.MANAGED
_T = ValueType
_OPENED = "the channels were opened"
_SETUP = "the source began its set-up"
_RATE_MAX = (1 << 62) - 1
_GONE_COMPRESS = "newer QEMUs have dropped it; use multifd-compression"

CAPABILITIES: Final[tuple[Option, ...]] = (
    _cap("events", BOTH, (2, 4), "its first status event was sent", "tells every change of status at once",
         policy=_ON, reason="without events vmferry is blind"),
    _cap("return-path", BOTH, (2, 10), "the channel was connected",
         "lets the destination answer the source", policy=_ON,
         reason="only the destination's answer proves that it has loaded everything"),
    _cap("postcopy-ram", BOTH, (2, 6), _SETUP, "memory may follow after the VM has moved", policy=_MANAGED,
         reason="it follows from --mode"),
    _cap("postcopy-preempt", BOTH, (7, 1), _OPENED, "urgent pages get a channel of their own in postcopy"),
    _cap("multifd", BOTH, (4, 0), _OPENED, "sends memory over several channels", policy=_MANAGED,
         reason="it follows from --multifd"),
    _cap("release-ram", SOURCE, (2, 9), "the first page was sent",
         "frees pages on the source once they are sent", policy=_NO,
         reason="it destroys the copy that a rollback or a recovery needs"),
    _cap("pause-before-switchover", SOURCE, (2, 11), "the switchover was prepared",
         "stops before the images are handed over", policy=_ON,
         reason="vmferry gives the leave to hand over itself", later="would be useful, QEMU forbids it"),
    _cap("late-block-activate", DESTINATION, (3, 0), "the destination began to load",
         "takes the images only when the VM is started", policy=_ON,
         reason="without it QEMU 7.2 starts a VM although the lock of an image was refused"),
    _cap("x-ignore-shared", BOTH, (4, 0), _SETUP, "leaves out memory in shared files", policy=_NO,
         reason="the memory left out would be missing on another host"),
    _cap("mapped-ram", BOTH, (9, 0), "the memory header was written",
         "gives every page a fixed place in a file", policy=_MANAGED,
         reason="it is a file format; a migration between hosts has no file"),
    _cap("background-snapshot", SOURCE, (6, 0), "the migration started", "saves a running VM to a file",
         policy=_NO, reason="it makes a snapshot and moves nothing"),
    _cap("x-colo", BOTH, (2, 8), _SETUP, "keeps a second VM in step all the time", policy=_NO,
         reason="continuous replication is not supported, and switched on late it crashes the destination"),
    _cap("xbzrle", BOTH, (1, 2), _SETUP, "sends only the difference of pages sent before"),
    _cap("zero-copy-send", SOURCE, (7, 1), _OPENED, "sends pages without copying them in the kernel"),
    _cap("auto-converge", SOURCE, (1, 6), "the first pass over memory began",
         "slows the vCPUs down when memory changes faster than it is sent",
         later="yes in principle, QEMU forbids it"),
    _cap("dirty-limit", SOURCE, (8, 1), "the first pass over memory began",
         "slows down only the vCPUs that write a lot; needs KVM with a dirty ring"),
    _cap("switchover-ack", BOTH, (8, 1), _SETUP,
         "waits until devices on the destination say they are ready; on by itself for a VM with VFIO devices"),
    _cap("dirty-bitmaps", BOTH, (2, 12), _SETUP, "takes the dirty bitmaps of block devices along"),
    _cap("validate-uuid", BOTH, (4, 2), "the configuration section was sent",
         "the destination refuses a VM with another UUID"),
    _cap("postcopy-blocktime", DESTINATION, (3, 0), "postcopy was announced",
         "measures how long vCPUs wait for pages"),
    _cap("rdma-pin-all", BOTH, (2, 0), "the RDMA connection was made", "pins all memory for RDMA",
         policy=_NO, reason="RDMA is refused: vmferry could not cut such a channel"),
    _cap("compress", BOTH, (2, 4), _SETUP, "old compression", gone_in=(9, 1), policy=_NO,
         reason=_GONE_COMPRESS),
    _cap("block", BOTH, (2, 10), _SETUP, "old storage migration", gone_in=(9, 1), policy=_NO,
         reason="newer QEMUs have dropped it; images are shared or mirrored"),
    _cap("zero-blocks", BOTH, (1, 6), "the first image block was sent", "part of old storage migration",
         gone_in=(11, 1), policy=_NO, reason="newer QEMUs have dropped it together with block"),
)  # fmt: skip

_RATE_SAFE = "QEMU reads it anew for each period of 100 ms; it changes the speed and nothing in the stream"
_DOWNTIME_SAFE = "QEMU reads it anew for each test whether to switch over; it changes when, not what"
_THROTTLE_SAFE = "QEMU reads it anew for each throttle decision; it changes the speed of the guest only"
_ACTIVE, _AND_POSTCOPY, _PAUSED = Window.ACTIVE, Window.ACTIVE_AND_POSTCOPY, Window.POSTCOPY_PAUSED
_TLS = "a broken channel is gone for good, and the next one makes a new handshake with the new value"
_TLS_BY = "it follows from the certificates of the migration"
_CONVERGE = "the source's first test whether to switch over"
_THROTTLE = "the source's first throttle decision"
_LOAD_END = "the destination was prepared"
_RDMA = "RDMA is refused: vmferry could not cut such a channel"

PARAMETERS: Final[tuple[Option, ...]] = (
    _par("max-bandwidth", _T.RATE, SOURCE, (2, 8), "the first rate period",
         "most bytes per second in precopy; 0 = no limit", between=(0, _RATE_MAX), qemu=128 * MIB,
         ours=UNLIMITED_BYTES_PER_S, window=_ACTIVE, safe_because=_RATE_SAFE, later="yes, in precopy"),
    _par("downtime-limit", _T.TIME, SOURCE, (2, 8), _CONVERGE, "the pause that QEMU aims at",
         between=(0, 2_000_000), qemu=300, window=_ACTIVE, safe_because=_DOWNTIME_SAFE,
         later="yes, in precopy"),
    _par("avail-switchover-bandwidth", _T.RATE, SOURCE, (8, 2), _CONVERGE,
         "the speed that QEMU assumes for the switchover; 0 = it estimates", between=(0, _RATE_MAX), qemu=0,
         window=_ACTIVE, safe_because=_DOWNTIME_SAFE, later="yes, in precopy"),
    _par("max-postcopy-bandwidth", _T.RATE, SOURCE, (3, 0), "the switchover",
         "most bytes per second of background pages in postcopy; 0 = no limit", between=(0, _RATE_MAX),
         qemu=0, window=_AND_POSTCOPY,
         safe_because="it limits the pages nobody waits for; asked-for pages pass anyway",
         later="yes, above all in postcopy"),
    _par("throttle-trigger-threshold", _T.PERCENT, SOURCE, (5, 0), _THROTTLE,
         "auto-converge acts when this share of what was sent is dirty again", between=(1, 100), qemu=50,
         window=_ACTIVE, safe_because=_THROTTLE_SAFE, later="yes, in precopy"),
    _par("cpu-throttle-initial", _T.PERCENT, SOURCE, (2, 7), _THROTTLE, "the first slow-down of the vCPUs",
         between=(1, 99), qemu=20, window=_ACTIVE, safe_because=_THROTTLE_SAFE,
         later="until the first slow-down"),
    _par("cpu-throttle-increment", _T.PERCENT, SOURCE, (2, 7), _THROTTLE,
         "how much each further slow-down adds", between=(1, 99), qemu=10, window=_ACTIVE,
         safe_because=_THROTTLE_SAFE, later="yes, in precopy"),
    _par("cpu-throttle-tailslow", _T.BOOL, SOURCE, (5, 1), _THROTTLE, "makes the last slow-downs smaller",
         qemu=False, window=_ACTIVE, safe_because=_THROTTLE_SAFE, later="yes, in precopy"),
    _par("max-cpu-throttle", _T.PERCENT, SOURCE, (3, 1), _THROTTLE, "the greatest slow-down of the vCPUs",
         between=(1, 99), qemu=99, window=_ACTIVE, safe_because=_THROTTLE_SAFE, later="yes, in precopy"),
    _par("vcpu-dirty-limit", _T.RATE_MB, SOURCE, (8, 1), "dirty-limit first acted",
         "how fast one vCPU may dirty memory under dirty-limit", between=(1, 1 << 31), qemu=1,
         later="partly"),
    _par("x-vcpu-dirty-limit-period", _T.TIME, SOURCE, (8, 1), "dirty-limit first acted",
         "how often dirty-limit measures", between=(1, 1000), qemu=1000, later="partly"),
    _par("xbzrle-cache-size", _T.SIZE, SOURCE, (2, 11), _SETUP, "memory for xbzrle; a power of two",
         between=(4096, 1 << 62), power_of_two=True, qemu=64 * MIB, later="little"),
    _par("announce-initial", _T.TIME, DESTINATION, (4, 0), _LOAD_END,
         "wait before the first network announcement", between=(0, 100_000), qemu=50,
         later="until the load ends"),
    _par("announce-max", _T.TIME, DESTINATION, (4, 0), _LOAD_END,
         "longest wait between network announcements", between=(0, 100_000), qemu=550,
         later="until the load ends"),
    _par("announce-rounds", _T.INT, DESTINATION, (4, 0), _LOAD_END, "how many network announcements",
         between=(0, 1000), qemu=5, later="until the load ends"),
    _par("announce-step", _T.TIME, DESTINATION, (4, 0), _LOAD_END, "how much each wait is longer",
         between=(1, 10_000), qemu=100, later="until the load ends"),
    _par("multifd-channels", _T.INT, BOTH, (4, 0), _OPENED, "how many channels multifd opens",
         between=(1, 255), qemu=2, policy=_MANAGED, reason="it follows from --multifd"),
    _par("multifd-compression", _T.ENUM, BOTH, (5, 0), _OPENED, "compresses on the multifd channels",
         words=("none", "zlib", "zstd", "qatzip", "qpl", "uadk"), qemu="none"),
    _par("multifd-zlib-level", _T.INT, SOURCE, (5, 0), _OPENED,
         "zlib's level; 7.2 accepts a value and ignores it", between=(0, 9), qemu=1),
    _par("multifd-zstd-level", _T.INT, SOURCE, (5, 0), _OPENED,
         "zstd's level; 7.2 accepts a value and ignores it", between=(0, 20), qemu=1),
    _par("multifd-qatzip-level", _T.INT, SOURCE, (9, 2), _OPENED, "QATzip's level", between=(1, 9), qemu=1),
    _par("zero-page-detection", _T.ENUM, SOURCE, (9, 0), _SETUP, "where empty pages are found",
         words=("none", "legacy", "multifd"), qemu="multifd"),
    _par("tls-creds", _T.STR, BOTH, (2, 7), "the channel was connected",
         "the TLS credentials object; empty = no TLS", qemu="", window=_PAUSED, safe_because=_TLS,
         later="for the next connection", policy=_MANAGED, reason=_TLS_BY),
    _par("tls-hostname", _T.STR, BOTH, (2, 7), "the channel was connected",
         "the name the certificate must carry", qemu="", window=_PAUSED, safe_because=_TLS,
         later="for the next connection", policy=_MANAGED, reason=_TLS_BY),
    _par("tls-authz", _T.STR, BOTH, (4, 0), "the channel was connected",
         "the object that says whose certificate is let in", qemu="", ours=UNSET, window=_PAUSED,
         safe_because=_TLS, later="for the next connection", policy=_MANAGED, reason=_TLS_BY),
    _par("mode", _T.ENUM, BOTH, (8, 2), "the migration started", "what kind of migration it is",
         words=("normal", "cpr-reboot", "cpr-transfer", "cpr-exec"), qemu="normal", policy=_MANAGED,
         reason="only 'normal' moves a VM between hosts; the cpr modes are not supported"),
    _par("cpr-exec-command", _T.LIST, SOURCE, (10, 2), "the migration started",
         "the QEMU that cpr-exec becomes", qemu=[], policy=_NO, reason="the cpr modes are not supported"),
    _par("direct-io", _T.BOOL, BOTH, (9, 1), "the file was opened", "opens a migration file with O_DIRECT",
         qemu=False, policy=_MANAGED, reason="it is for files; a migration between hosts has none"),
    _par("block-bitmap-mapping", _T.LIST, BOTH, (5, 2), _SETUP, "other names for dirty bitmaps", policy=_NO,
         reason="both QEMUs have the same names, and a mapping once set cannot be taken back"),
    _par("x-checkpoint-delay", _T.TIME, BOTH, (2, 8), "the first checkpoint",
         "time between COLO checkpoints", between=(0, (1 << 32) - 1), qemu=20_000, policy=_NO,
         reason="continuous replication is not supported"),
    _par("x-rdma-chunk-size", _T.SIZE, BOTH, (11, 1), "the RDMA connection was made",
         "unit of RDMA transfers", between=(MIB, 1 << 30), qemu=MIB, policy=_NO, reason=_RDMA),
    _par("compress-level", _T.INT, SOURCE, (2, 4), _SETUP, "old compression", between=(0, 9), qemu=1,
         gone_in=(9, 1), policy=_NO, reason=_GONE_COMPRESS),
    _par("compress-threads", _T.INT, SOURCE, (2, 4), _SETUP, "old compression", between=(1, 255), qemu=8,
         gone_in=(9, 1), policy=_NO, reason=_GONE_COMPRESS),
    _par("compress-wait-thread", _T.BOOL, SOURCE, (3, 1), _SETUP, "old compression", qemu=True,
         gone_in=(9, 1), policy=_NO, reason=_GONE_COMPRESS),
    _par("decompress-threads", _T.INT, DESTINATION, (2, 4), _SETUP, "old compression", between=(1, 255),
         qemu=2, gone_in=(9, 1), policy=_NO, reason=_GONE_COMPRESS),
    _par("block-incremental", _T.BOOL, SOURCE, (2, 10), _SETUP, "part of old storage migration", qemu=False,
         gone_in=(9, 1), policy=_NO, reason="newer QEMUs have dropped it together with block"),
)  # fmt: skip

OPTIONS: Final[dict[str, Option]] = {option.name: option for option in CAPABILITIES + PARAMETERS}
assert len(OPTIONS) == len(CAPABILITIES) + len(PARAMETERS), "an option has two rows"
assert all(bool(o.safe_because) == (o.window is not Window.LOCKED) for o in OPTIONS.values()), "Rule 3"
assert all(bool(o.reason) == (o.policy is not Policy.FREE) for o in OPTIONS.values()), "no reason"
