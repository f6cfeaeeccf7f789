"""A disk that goes back to where its guest came from: only what changed since, in rounds, as memory goes.

Theory of operation
-------------------
QEMU's mirror takes no bitmap, and its backup job holds up the guest's writes until what they replace is sent, and
fails them where that fails. So the copy is read from a second node on top of the guest's own one (`reader`, read-only),
whose readers the guest never waits for; what it writes meanwhile goes into the next round, and the last round is at
the pause:

    since     on the guest's node: what differs from the image there; nothing clears it, so no failure makes it wrong
    fresh     on the guest's node: what no round has taken yet; begins as a copy of `since`
    round     on the reader: what the round under way sends

    a round: 1. in one transaction `fresh` is moved to `round`  2. a backup job sends what `round` has
    an agent that dies between 1 and 2: the next one finds a `round` without a job, and gives it back to `fresh`

For the rest of the copy (`source_disks`) it looks like a mirror: running, ready when little is left, and at the pause
pending when nothing is. Nothing about rounds is remembered here: it is in QEMU.

Rule 1: `concluded` without an error is said of the last round only, which begins when the guest is paused.
Rule 2: two rounds of one disk never overlap.

Sources: qemu docs/interop/bitmaps.rst; qapi/block-core.json (block-dirty-bitmap-merge, blockdev-backup, force-share).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vmferry import limits
from vmferry.agent.wants import Mirror
from vmferry.core.facts import Fact
from vmferry.qmp.errors import QmpCommandError

if TYPE_CHECKING:
    from vmferry.agent.source import SourceAttempt

log = logging.getLogger("vmferry.agent")

ROUND = "round"
ASK_S = 2.0
FLUSH_S = 4.0


def last_job(mirror: Mirror) -> str:
    """QEMU's job of the round at the pause."""
    return f"{mirror.job}-last"


def reader(mirror: Mirror) -> str:
    """QEMU's node that rounds are read from."""
    return f"{mirror.target}r"


def fresh(mirror: Mirror) -> str:
    """QEMU's bitmap of what no round has taken."""
    return f"{mirror.job}-fresh"


async def start(attempt: SourceAttempt, mirror: Mirror) -> None:
    """The target is there. Raises QemuError."""
    machine = attempt.machine
    node = {"driver": "raw", "node-name": reader(mirror), "file": mirror.node, "read-only": True, "force-share": True}
    await machine.execute("blockdev-add", node)
    add = {"node": mirror.node, "name": fresh(mirror), "granularity": limits.DISK_BITMAP_BYTES}
    merge = {"node": mirror.node, "target": fresh(mirror), "bitmaps": [mirror.since]}
    await _together(attempt, ("block-dirty-bitmap-add", add), ("block-dirty-bitmap-merge", merge))
    await _begin(attempt, mirror, mirror.job)


async def look(attempt: SourceAttempt, jobs: Iterable[dict[str, Any]], *, at_pause: bool) -> list[dict[str, Any]]:
    """QEMU's jobs -> the same, with one for each disk that goes in rounds, as a mirror's would be; the next round
    begins where it is due (`at_pause`: never). Raises QemuError."""
    found = {str(job["id"]): job for job in jobs}
    for mirror in (each for each in attempt.mirrors if each.since):
        last, job = found.pop(last_job(mirror), None), found.pop(mirror.job, None)
        if last is None and job is not None and job["status"] == "concluded" and not job.get("error"):
            await _end(attempt, mirror)
            attempt.copying.sent_in_rounds[mirror.job] = attempt.copying.sent_in_rounds.get(mirror.job, 0) + int(
                job["current-progress"]
            )
            job = None
        seen = last or job or await _between(attempt, mirror, at_pause=at_pause)
        found[mirror.job] = _with_all_rounds(seen, mirror, attempt.copying.sent_in_rounds.get(mirror.job, 0))
    return list(found.values())


def _with_all_rounds(job: dict[str, Any], mirror: Mirror, sent_bytes: int) -> dict[str, Any]:
    bytes_of = {key: int(job[key]) + sent_bytes for key in ("current-progress", "total-progress")}
    return {**job, **bytes_of, "id": mirror.job}


async def _between(attempt: SourceAttempt, mirror: Mirror, *, at_pause: bool) -> dict[str, Any]:
    """No round is under way: whether one is due. What this disk's copy looks like, as a job."""
    left_bytes = await _give_back(attempt, mirror)
    seen = {"id": mirror.job, "type": "backup", "current-progress": 0, "total-progress": left_bytes or 0}
    if left_bytes is None:  # somebody took the bitmap away: nobody knows what is left
        return {**seen, "status": "concluded", "error": "what has changed is not counted any more"}
    if at_pause and left_bytes > limits.DISK_ROUND_PAUSE_BYTES:  # the guest would stand for as long as that takes
        return {**seen, "status": "concluded", "error": "the guest writes faster than its disk is sent"}
    is_known = attempt.facts.entry(Fact.DISK_READY, mirror.number) is not None
    is_near = left_bytes <= limits.DISK_ROUND_READY_BYTES
    if at_pause or (is_near and not is_known) or left_bytes <= limits.DISK_ROUND_BYTES:
        return {**seen, "status": "ready"}
    try:
        await _begin(attempt, mirror, mirror.job)
    except QmpCommandError as error:
        return {**seen, "status": "concluded", "error": str(error)}
    return {**seen, "status": "running"}


async def begin_last(attempt: SourceAttempt, mirror: Mirror) -> None:
    """The guest is paused, and no round is under way: what is left is all that there will be. Raises QemuError."""
    await _begin(attempt, mirror, last_job(mirror))


async def flush(attempt: SourceAttempt, mirror: Mirror) -> None:
    """What was sent is on the destination's disk, as after a mirror's end: a backup job does not ask for it. Best
    effort: QEMU tells nobody how it went; the data is in the destination's QEMU in any case. Raises QemuError."""
    await attempt.machine.execute(
        "human-monitor-command", {"command-line": f"qemu-io {mirror.target} flush"}, deadline_s=FLUSH_S
    )


async def _begin(attempt: SourceAttempt, mirror: Mirror, job: str) -> None:
    """There is no `round`: `_between` has just looked, or nothing was begun yet."""
    where = {"node": reader(mirror), "name": ROUND}
    add = {**where, "granularity": limits.DISK_BITMAP_BYTES, "disabled": True}
    take = {"node": reader(mirror), "target": ROUND, "bitmaps": [{"node": mirror.node, "name": fresh(mirror)}]}
    clear = {"node": mirror.node, "name": fresh(mirror)}
    await _together(
        attempt,
        ("block-dirty-bitmap-add", add),
        ("block-dirty-bitmap-merge", take),
        ("block-dirty-bitmap-clear", clear),
    )
    wanted: dict[str, Any] = {
        "job-id": job,
        "device": reader(mirror),
        "target": mirror.target,
        "sync": "bitmap",
        "bitmap": ROUND,
        "bitmap-mode": "never",
        "on-source-error": "report",
        "on-target-error": "report",
        "auto-finalize": job != last_job(mirror),
        "auto-dismiss": False,
    }
    if attempt.copying.speed and job != last_job(mirror):  # the guest waits for that one
        wanted["speed"] = attempt.copying.speed
    await attempt.machine.execute("blockdev-backup", wanted)


async def _give_back(attempt: SourceAttempt, mirror: Mirror) -> int | None:
    """Gives a round back that was taken and not sent: an agent died between, or QEMU refused. The bytes that no round
    has taken then; None: nobody counts them."""
    counts = await _counts(attempt)
    if (reader(mirror), ROUND) not in counts:
        return counts.get((mirror.node, fresh(mirror)))
    back = {"node": mirror.node, "target": fresh(mirror), "bitmaps": [{"node": reader(mirror), "name": ROUND}]}
    await attempt.machine.execute("block-dirty-bitmap-merge", back)
    await attempt.machine.execute("block-dirty-bitmap-remove", {"node": reader(mirror), "name": ROUND})
    return (await _counts(attempt)).get((mirror.node, fresh(mirror)))


async def _end(attempt: SourceAttempt, mirror: Mirror) -> None:
    """A round was sent whole. Whoever dies between the two finds its job, and does it again."""
    await unless_gone(attempt, "block-dirty-bitmap-remove", {"node": reader(mirror), "name": ROUND})
    await unless_gone(attempt, "job-dismiss", {"id": mirror.job})


async def forget(attempt: SourceAttempt, mirror: Mirror) -> None:
    """Nothing of the rounds is left in QEMU but their reader, and what counts since the guest came. Not before the
    attempt is over: the last job proves that the disk is equal. Raises QemuError other than that something is gone
    already."""
    await unless_gone(attempt, "job-dismiss", {"id": last_job(mirror)})
    await unless_gone(attempt, "block-dirty-bitmap-remove", {"node": mirror.node, "name": fresh(mirror)})


async def _counts(attempt: SourceAttempt) -> dict[tuple[str, str], int]:
    """The bytes of each bitmap, by its node and its name. Raises QemuError."""
    nodes = await attempt.machine.execute("query-named-block-nodes", {"flat": True}, deadline_s=ASK_S)
    return {
        (str(node["node-name"]), str(bitmap.get("name", ""))): int(bitmap["count"])
        for node in nodes
        for bitmap in node.get("dirty-bitmaps") or ()
    }


async def _together(attempt: SourceAttempt, *actions: tuple[str, dict[str, Any]]) -> None:
    wanted = [{"type": name, "data": data} for name, data in actions]
    await attempt.machine.execute("transaction", {"actions": wanted})


async def unless_gone(attempt: SourceAttempt, command: str, arguments: dict[str, Any]) -> None:
    """One command for something that need not be there any more. Raises QemuError for other trouble."""
    try:
        await attempt.machine.execute(command, arguments)
    except QmpCommandError as error:
        log.info("job=%s vm=%s command=%s result=%s", attempt.job, attempt.vm, command, error)
