"""What vmferry counts on in a QEMU, as checks that the real programs and the fake both pass.

Theory of operation
-------------------
A check gets a `Pair`: a running source and a destination that waits (`-S -incoming defer`), each with a QMP client
that keeps its events. It drives one migration and compares the sequence of status words, STOP and RESUME with what
the version is known to do. `CHECKS` has them by name; each
wants a fresh pair.

Rule 1: what is compared is what vmferry's decisions depend on, not every word of QEMU.
Rule 2: a check waits for events, never for time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from vmferry.testing.contract_pairs import ROUNDS_WAITED, Pair, until
from vmferry.testing.fake_profile import PROFILES

Check = Callable[[Pair], Awaitable[None]]


async def options_are_known(pair: Pair) -> None:
    """The fake reports the names and defaults that the real one of its version does."""
    for side in (pair.source, pair.destination):
        major, minor, _ = side.client.version
        profile = PROFILES[f"{major}.{minor}"]
        capabilities = await side.execute("query-migrate-capabilities")
        assert {c["capability"]: c["state"] for c in capabilities} == profile.capabilities()
        values, known = await side.execute("query-migrate-parameters"), profile.parameters()
        assert values.keys() == known.keys()
        different = {name for name, value in values.items() if value != known[name]}
        assert different <= {"zero-page-detection"}, different  # its default follows from the machine type
        assert side.client.oob


async def run_states(pair: Pair) -> None:
    """Before anything: the source runs, the destination waits, nobody has a migration."""
    assert await pair.source.run_state() == "running"
    assert await pair.destination.run_state() == "inmigrate"
    assert await pair.source.word() in (None, "none")
    assert not await pair.source.can_yank()
    await pair.source.execute("stop")
    await pair.source.execute("cont")
    await pair.source.until("RESUME")
    assert pair.source.seen == ["STOP", "RESUME"]


async def precopy(pair: Pair) -> None:
    """The ordinary way, and that the destination runs at `cont` only."""
    await pair.begin()
    await pair.go_on()
    await pair.source.until("completed")
    assert pair.source.seen == ["setup", "active", "STOP", "pre-switchover", "device", "completed"]
    await pair.destination.until("completed")
    await pair.destination.until_run_state("paused")
    assert pair.destination.seen == ["setup", "active", "completed"]
    await pair.source.until_run_state("postmigrate")
    await pair.destination.execute("cont")
    await pair.destination.until("RESUME")
    assert await pair.destination.run_state() == "running"


async def postcopy(pair: Pair) -> None:
    """The destination may run only once the package is loaded; 7.2 as source says so too early."""
    await pair.begin(postcopy=True, slow=True)
    await pair.source.until("active")
    await pair.source.execute("migrate-start-postcopy")
    await pair.faster()
    await pair.go_on()
    await pair.source.until("completed")
    await pair.destination.until("completed")
    middle = ["device", "postcopy-device", "postcopy-active"] if pair.source.has_proof else ["postcopy-active"]
    assert pair.source.seen == ["setup", "active", "STOP", "pre-switchover", *middle, "completed"]
    loading = ["postcopy-device", "postcopy-active"] if pair.destination.has_proof else ["postcopy-active"]
    assert pair.destination.seen == ["setup", "active", *loading, "completed"]
    await pair.destination.until_run_state("paused")
    await pair.source.until_run_state("postmigrate")
    await pair.destination.execute("cont")
    await pair.destination.until("RESUME")


async def postcopy_at_once(pair: Pair) -> None:
    """The switch is taken as soon as `migrate` is. Slowly until then, so that there is something to discard, without
    which the destination would refuse to run (`core.hazards`)."""
    await pair.source.execute("stop")
    await pair.begin(postcopy=True, slow=True, switch=True)
    await pair.faster()
    await pair.go_on()
    await pair.source.until("completed")
    await pair.destination.until("completed")
    assert pair.source.seen.count("postcopy-active") == 1
    await pair.destination.until_run_state("paused")


async def switchover_ack(pair: Pair) -> None:
    """With the capability (from 8.1) rounds over memory go on until the destination's devices have agreed: there is no
    such thing in what QEMU tells, so the switchover is the proof."""
    if any(side.client.version < (8, 1, 0) for side in (pair.source, pair.destination)):
        wanted = {"capabilities": [{"capability": "switchover-ack", "state": True}]}
        older = min(pair.source, pair.destination, key=lambda side: side.client.version)
        assert "switchover-ack" in await older.refused("migrate-set-capabilities", wanted)
        return
    await pair.begin(switchover_ack=True, holds_answers=True)
    await pair.source.until("active")

    async def has_gone_round_and_round() -> bool:
        info = await pair.source.execute("query-migrate")
        assert info["status"] == "active", "it did not wait"
        return int((info.get("ram") or {}).get("dirty-sync-count", 0)) >= ROUNDS_WAITED

    await until(has_gone_round_and_round)
    assert "STOP" not in pair.source.seen
    pair.may_answer.set()
    await pair.go_on()
    await pair.source.until("completed")
    await pair.destination.until_run_state("paused")


async def background_snapshot(pair: Pair) -> None:
    """The guest stops for a moment and goes on by itself, long before everything is sent; nobody answers. It is loaded
    as a precopy is."""
    await pair.begin(background=True)
    await pair.source.until("completed")
    assert pair.source.seen == ["setup", "active", "STOP", "RESUME", "completed"]
    assert await pair.source.run_state() == "running", "it is nobody's postmigrate"
    await pair.destination.until("completed")
    await pair.destination.until_run_state("paused")


async def cancel_in_active(pair: Pair) -> None:
    """Ends in cancelled (7.2: now and then in failed), the guest never stopped, and options are open again."""
    await pair.begin(slow=True)
    await pair.source.until("active")
    assert await pair.source.can_yank()
    await pair.source.execute("migrate_cancel")

    async def is_over() -> bool:
        return await pair.source.word() in ("cancelled", "failed")

    await until(is_over)
    end = pair.source.seen[2:]
    if not pair.source.has_proof and "cancelled" not in end:
        assert end in (["failed"], ["cancelling", "failed"]), end
    else:
        assert end in (["cancelling", "cancelled"], ["failing", "cancelling", "cancelled"]), end
    assert await pair.source.run_state() == "running"
    assert "STOP" not in pair.source.seen
    await pair.source.execute("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle", "state": False}]})


async def cancel_before_switchover(pair: Pair) -> None:
    """The guest runs again on the source."""
    await pair.begin()
    await pair.source.until("pre-switchover")
    assert await pair.source.run_state() == "finish-migrate"
    await pair.source.execute("migrate_cancel")
    await pair.source.until("cancelled")
    await pair.source.until("RESUME")
    tail = [word for word in pair.source.seen[4:] if word != "device"]  # 7.2 goes on for a moment, now and then
    assert sorted(tail) == sorted(["cancelling", "RESUME", "cancelled"]), tail
    assert await pair.source.run_state() == "running"


async def peer_killed_in_active(pair: Pair) -> None:
    """An error, named; the guest never stopped."""
    await pair.begin(slow=True)
    await pair.source.until("active")
    await pair.destination.kill()
    await pair.source.until("failed")
    ending = ["failing", "failed"] if pair.source.has_proof else ["failed"]
    assert pair.source.seen == ["setup", "active", *ending]
    assert (await pair.source.execute("query-migrate"))["error-desc"]
    assert await pair.source.run_state() == "running"


async def cut_in_active(pair: Pair) -> None:
    """As a dead peer; the destination says failed and stays where it may (11.1)."""
    await pair.begin(slow=True)
    await pair.source.until("active")
    await pair.destination.until("active")
    pair.cut()
    await pair.source.until("failed")
    assert await pair.source.run_state() == "running"
    if pair.destination.has_proof:
        await pair.destination.until("failed")
        assert await pair.destination.run_state() == "inmigrate"
    else:
        assert await pair.destination.ended() == 1


async def yank_ends_it(pair: Pair) -> None:
    """Out of band, in active."""
    await pair.begin(slow=True)
    await pair.source.until("active")
    await pair.source.execute("yank", {"instances": [{"type": "migration"}]}, oob=True)
    await pair.source.until("failed")
    assert await pair.source.run_state() == "running"


async def options_are_refused_while_running(pair: Pair) -> None:
    """Capabilities are locked on the source, parameters are not."""
    await pair.begin(slow=True)
    await pair.source.until("active")
    wanted = {"capabilities": [{"capability": "xbzrle", "state": True}]}
    assert "in progress" in await pair.source.refused("migrate-set-capabilities", wanted)
    await pair.source.execute("migrate-set-parameters", {"downtime-limit": 200})
    assert (await pair.source.execute("query-migrate-parameters"))["downtime-limit"] == 200
    assert await pair.source.refused("migrate-set-parameters", {"no-such": 1})


async def second_migrate_is_refused(pair: Pair) -> None:
    """On both sides, and the first one goes on."""
    await pair.begin(slow=True)
    await pair.source.until("active")
    assert await pair.source.refused("migrate", {"uri": "tcp:127.0.0.1:1"})
    assert await pair.destination.refused("migrate", {"uri": "tcp:127.0.0.1:1"})
    await pair.faster()
    await pair.go_on()
    await pair.source.until("completed")

    async def is_cleaned_up() -> bool:  # before that 11.1 aborts at the next migrate
        return not await pair.source.can_yank()

    await until(is_cleaned_up)
    assert await pair.source.refused("migrate", {"uri": "tcp:127.0.0.1:1"})


async def cont_when(pair: Pair) -> None:
    """On the source refused in the switchover; on the destination good once it is loaded; a completed source that
    nobody replaced can go on."""
    await pair.begin()
    await pair.source.until("pre-switchover")
    assert await pair.source.refused("cont")
    assert await pair.destination.run_state() == "inmigrate"
    await pair.go_on()
    await pair.source.until("completed")
    await pair.destination.until_run_state("paused")
    await pair.source.until_run_state("postmigrate")  # a moment after the word: until then it is in finish-migrate
    await pair.destination.kill()
    await pair.source.execute("cont")
    await pair.source.until("RESUME")
    assert await pair.source.run_state() == "running"


async def migrate_continue_wants_its_state(pair: Pair) -> None:
    """Leave is refused where nobody waits for it."""
    await pair.begin(slow=True)
    await pair.source.until("active")
    assert await pair.source.refused("migrate-continue", {"state": "pre-switchover"})


async def postcopy_needs_its_capability(pair: Pair) -> None:
    """Asked for without it, or without a migration: refused."""
    assert await pair.source.refused("migrate-start-postcopy")
    await pair.begin(slow=True)
    await pair.source.until("active")
    assert await pair.source.refused("migrate-start-postcopy")


async def descriptors_are_named(pair: Pair) -> None:
    """`fd:` of an unknown name is refused; closefd takes a name once."""
    assert await pair.source.refused("migrate", {"uri": "fd:nothing"})
    assert await pair.source.refused("getfd", {"fdname": "channel"})
    left, right = pair.connected()
    with contextlib.closing(left), contextlib.closing(right):
        await pair.source.execute("getfd", {"fdname": "channel"}, fds=(left.fileno(),))
    await pair.source.execute("closefd", {"fdname": "channel"})
    assert await pair.source.refused("closefd", {"fdname": "channel"})


async def mirror_ends_equal(pair: Pair) -> None:
    """At the pause before the switchover a mirror that is ready is asked to end, waits in `pending`, and concludes
    without an error; it is readable until dismissed, and its target can go before that. What the destination served is
    its guest's alone afterwards."""
    await pair.mirror()
    await pair.source.until_job("mirror-0", "ready")
    if pair.source.client.version >= (8, 2, 0):
        change = {"id": "mirror-0", "type": "mirror", "copy-mode": "write-blocking"}
        await pair.source.execute("block-job-change", change)
    else:
        assert "not been found" in await pair.source.refused("block-job-change", {"id": "mirror-0"})
    await pair.begin()
    await pair.source.until("pre-switchover")
    await pair.source.execute("block-job-cancel", {"device": "mirror-0"})
    await pair.source.until_job("mirror-0", "pending")
    await pair.source.execute("job-finalize", {"id": "mirror-0"})
    ended = await pair.source.until_job("mirror-0", "concluded")
    assert "error" not in ended, ended
    await pair.source.execute("blockdev-del", {"node-name": "target"})
    await pair.go_on()
    await pair.source.until("completed")
    await pair.destination.until_run_state("paused")
    await pair.destination.execute("nbd-server-stop")
    assert "not running" in await pair.destination.refused("nbd-server-stop")
    assert await pair.destination.execute("query-block-exports") == []
    await pair.destination.execute("cont")
    await pair.destination.until("RESUME")
    await pair.source.execute("job-dismiss", {"id": "mirror-0"})
    assert await pair.source.execute("query-jobs") == []


async def mirror_is_given_up(pair: Pair) -> None:
    """A cancelled mirror concludes with an error, and the guest does not notice."""
    await pair.mirror()
    await pair.source.until_job("mirror-0", "ready")
    await pair.source.execute("job-cancel", {"id": "mirror-0"})
    await pair.source.until_job("mirror-0", "concluded")
    await pair.source.execute("job-dismiss", {"id": "mirror-0"})
    await pair.source.execute("blockdev-del", {"node-name": "target"})
    assert await pair.source.refused("job-dismiss", {"id": "mirror-0"})
    assert await pair.source.refused("blockdev-del", {"node-name": "target"})
    assert await pair.source.run_state() == "running"
    assert pair.source.seen == []


async def mirror_is_paused(pair: Pair) -> None:
    """One that is ready stands by until it is resumed; it is not asked to end meanwhile, but can be cancelled."""
    await pair.mirror()
    await pair.source.until_job("mirror-0", "ready")
    assert await pair.source.refused("job-resume", {"id": "mirror-0"})
    await pair.source.execute("job-pause", {"id": "mirror-0"})
    await pair.source.until_job("mirror-0", "standby")
    assert await pair.source.refused("job-pause", {"id": "mirror-0"})
    assert "paused" in await pair.source.refused("block-job-cancel", {"device": "mirror-0"})
    await pair.source.execute("job-resume", {"id": "mirror-0"})
    await pair.source.until_job("mirror-0", "ready")
    await pair.source.execute("job-pause", {"id": "mirror-0"})
    await pair.source.until_job("mirror-0", "standby")
    await pair.source.execute("job-cancel", {"id": "mirror-0"})
    ended = await pair.source.until_job("mirror-0", "concluded")
    assert ended["error"]
    assert await pair.source.run_state() == "running"


async def mirror_without_its_peer(pair: Pair) -> None:
    """One whose destination is gone cannot end well, and the guest does not notice."""
    await pair.mirror()
    await pair.source.until_job("mirror-0", "ready")
    await pair.destination.kill()
    await pair.source.execute("block-job-cancel", {"device": "mirror-0"})
    ended = await pair.source.until_job("mirror-0", "concluded")
    assert ended["error"]
    assert await pair.source.run_state() == "running"


async def mirror_is_yanked(pair: Pair) -> None:
    """Out of band the target's connection can be cut, and nothing but the mirror suffers."""
    await pair.mirror()
    await pair.source.until_job("mirror-0", "ready")
    instance = {"type": "block-node", "node-name": "target"}
    await pair.source.execute("yank", {"instances": [instance]}, oob=True)
    await pair.source.execute("block-job-cancel", {"device": "mirror-0"})
    ended = await pair.source.until_job("mirror-0", "concluded")
    assert ended["error"]
    assert await pair.source.run_state() == "running"


async def mirror_to_a_node_of_its_own(pair: Pair) -> None:
    """Asked for in the background, to a node of the same QEMU: it ends in the pause before the switchover, its target
    goes, and a migration that is cancelled then gives the guest back as if nothing had been."""
    source = pair.source
    target = {"driver": "null-co", "node-name": "target", "size": 1 << 20, "read-zeroes": True}
    await source.execute("blockdev-add", target)
    wanted = {
        "job-id": "mirror-0", "device": "disk0", "target": "target", "sync": "full", "filter-node-name": "filter",
        "copy-mode": "background", "on-target-error": "report", "auto-finalize": False, "auto-dismiss": False,
    }  # fmt: skip
    known = source.client.version >= (10, 1, 0)
    if known:
        wanted["target-is-zero"] = True
    else:
        assert await source.refused("blockdev-mirror", {**wanted, "target-is-zero": True})
    await source.execute("blockdev-mirror", wanted)
    await source.until_job("mirror-0", "ready")
    assert await source.refused("blockdev-del", {"node-name": "target"})
    await pair.begin()
    await source.until("pre-switchover")
    await source.execute("block-job-cancel", {"device": "mirror-0"})
    await source.until_job("mirror-0", "pending")
    await source.execute("job-finalize", {"id": "mirror-0"})
    assert "error" not in await source.until_job("mirror-0", "concluded")
    await source.execute("job-dismiss", {"id": "mirror-0"})
    await source.execute("blockdev-del", {"node-name": "target"})
    nodes = {node["node-name"] for node in await source.execute("query-named-block-nodes", {"flat": True})}
    assert not nodes & {"target", "filter"}, nodes
    await source.execute("migrate_cancel")
    await source.until("cancelled")
    await source.until_run_state("running")


async def mirror_to_a_full_node(pair: Pair) -> None:
    """It fails with the reason, and the guest does not notice. The target is not known to be empty, so that even of an
    empty disk there is something to write."""
    source = pair.source
    image = {"driver": "null-co", "size": 1 << 20}
    target = {"driver": "blkdebug", "node-name": "target", "image": image}
    full = {"event": "none", "errno": 28, "immediately": False, "once": False}
    await source.execute("blockdev-add", {**target, "inject-error": [full]})
    wanted = {
        "job-id": "mirror-0", "device": "disk0", "target": "target", "sync": "full", "on-target-error": "report",
        "auto-finalize": False, "auto-dismiss": False,
    }  # fmt: skip
    await source.execute("blockdev-mirror", wanted)
    ended = await source.until_job("mirror-0", "concluded")
    assert ended["error"] == "No space left on device"
    await source.execute("job-dismiss", {"id": "mirror-0"})
    await source.execute("blockdev-del", {"node-name": "target"})
    assert await source.run_state() == "running"
    assert source.seen == []


async def rounds_send_what_a_bitmap_has(pair: Pair) -> None:
    """A bitmap of the guest's disk is moved to a second node on top of it, and what it has is sent from there, while
    the guest has its disk; a transaction is done whole or not at all; a backup job ends by itself or when it may."""
    source = pair.source
    await pair.target()
    await source.execute("block-dirty-bitmap-add", {"node": "disk0", "name": "since", "granularity": 65536})
    assert "already exists" in await source.refused("block-dirty-bitmap-add", {"node": "disk0", "name": "since"})
    (device,) = [each for each in await source.execute("query-block") if each.get("inserted")]
    (bitmap,) = device["inserted"]["dirty-bitmaps"]
    assert (bitmap["name"], bitmap["count"], bitmap["recording"]) == ("since", 0, True)
    reader = {"driver": "raw", "node-name": "reader", "file": "disk0", "read-only": True, "force-share": True}
    await source.execute("blockdev-add", reader)
    take: list[dict[str, Any]] = [
        {
            "type": "block-dirty-bitmap-add",
            "data": {"node": "reader", "name": "round", "granularity": 65536, "disabled": True},
        },
        {
            "type": "block-dirty-bitmap-merge",
            "data": {"node": "reader", "target": "round", "bitmaps": [{"node": "disk0", "name": "since"}]},
        },
        {"type": "block-dirty-bitmap-clear", "data": {"node": "disk0", "name": "since"}},
    ]
    await source.execute("transaction", {"actions": take})
    again = [{"type": "block-dirty-bitmap-add", "data": {"node": "disk0", "name": "more"}}, *take]
    assert "already exists" in await source.refused("transaction", {"actions": again})
    assert "not found" in await source.refused("block-dirty-bitmap-remove", {"node": "disk0", "name": "more"})
    for job, ends in (("round-1", True), ("round-2", False)):
        wanted = {
            "job-id": job, "device": "reader", "target": "target", "sync": "bitmap", "bitmap": "round",
            "bitmap-mode": "never", "auto-finalize": ends, "auto-dismiss": False,
        }  # fmt: skip
        await source.execute("blockdev-backup", wanted)
        if not ends:
            await source.until_job(job, "pending")
            assert await source.execute("human-monitor-command", {"command-line": "qemu-io target flush"}) == ""
            await source.execute("job-finalize", {"id": job})
        ended = await source.until_job(job, "concluded")
        assert ("error" in ended, ended["type"]) == (False, "backup"), ended
        await source.execute("job-dismiss", {"id": job})
    nodes = {node["node-name"]: node for node in await source.execute("query-named-block-nodes", {"flat": True})}
    assert [bitmap["name"] for bitmap in nodes["reader"]["dirty-bitmaps"]] == ["round"]
    await source.execute("blockdev-del", {"node-name": "reader"})
    await source.execute("blockdev-del", {"node-name": "target"})
    await source.execute("block-dirty-bitmap-remove", {"node": "disk0", "name": "since"})
    assert await source.run_state() == "running"


async def quit_is_told(pair: Pair) -> None:
    """SHUTDOWN, then the process ends with 0."""
    await pair.source.execute("quit")
    assert await pair.source.ended() == 0


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        options_are_known,
        run_states,
        precopy,
        postcopy,
        postcopy_at_once,
        switchover_ack,
        background_snapshot,
        cancel_in_active,
        cancel_before_switchover,
        peer_killed_in_active,
        cut_in_active,
        yank_ends_it,
        options_are_refused_while_running,
        second_migrate_is_refused,
        cont_when,
        migrate_continue_wants_its_state,
        postcopy_needs_its_capability,
        descriptors_are_named,
        mirror_ends_equal,
        mirror_is_given_up,
        mirror_is_paused,
        mirror_without_its_peer,
        mirror_is_yanked,
        mirror_to_a_node_of_its_own,
        mirror_to_a_full_node,
        rounds_send_what_a_bitmap_has,
        quit_is_told,
    )
}
