"""What `tools/tidy.py` lets stay, each with its reason. An entry that is not needed any more is a finding."""

from __future__ import annotations

from typing import Final

_WANT = "a person's or the policy's want is a fact, and this is where it arrives"
_CHOOSES_COMMAND = (
    "chooses the QMP command that fits QEMU's own state at this moment; whether to act was decided before"
)
_HAND = "the hand of an effect of the source's table: records what it proved"
_LAZY = "start-up time: most commands never need it"
_RESTS = "an agent at rest has no numpy (60 MB); only a rescue speaks the stream itself"
_STORES = "an agent at rest has no numpy (60 MB); only snapshots need the room, and an object store its library"
_NO_EVENT = "nothing tells that the other end's kernel has received; the test holds without the pause, less sharply"

AGENT = "src/vmferry/agent"
CLI = "src/vmferry/cli"

ALLOWED: Final[dict[tuple[str, str, str], str]] = {
    ("records-fact", f"{AGENT}/job_commands.py", "cancel"): _WANT,
    ("records-fact", f"{AGENT}/job_commands.py", "change"): _WANT,
    ("records-fact", f"{AGENT}/job_commands.py", "start_postcopy"): _WANT,
    ("records-fact", f"{AGENT}/plan.py", "converge"): _WANT,
    ("records-fact", f"{AGENT}/peer_commands.py", "_release"): "the source's agent asks: its want arrives here",
    ("matches-effect", f"{AGENT}/source.py", "on_trouble"): "says what an effect that raised proves; does nothing",
    ("compares-status", f"{AGENT}/source.py", "on_facts"): "compares the status with itself, to publish a change",
    ("compares-status", f"{AGENT}/destination.py", "on_facts"): "compares the status with itself, to publish a change",
    ("compares-qemu-word", f"{AGENT}/destination.py", "incoming"): "translates QEMU's word into the table's answer",
    ("compares-qemu-word", f"{AGENT}/destination.py", "_ask"): "knows which words come before the run state settles",
    ("compares-qemu-word", f"{AGENT}/recovery.py", "pause"): _CHOOSES_COMMAND,
    ("compares-qemu-word", f"{AGENT}/reconnect.py", "_let_go"): _CHOOSES_COMMAND,
    ("compares-qemu-word", f"{AGENT}/reconnect.py", "is_over"): "waits for the end of the command that it gave",
    ("records-fact", f"{AGENT}/rescue_commands.py", "_lead_out"): "a tool by hand: who took the stream must be known",
    ("records-fact", f"{AGENT}/way_back.py", "_lead_out"): _HAND,
    ("records-fact", f"{AGENT}/way_back.py", "fence_again"): _HAND,
    ("records-fact", f"{AGENT}/way_back.py", "let_pages_go"): _HAND,
    ("compares-qemu-word", f"{AGENT}/source_act.py", "_restore_source"): "options can be set only after QEMU's cleanup",
    (
        "direction",
        "src/vmferry/vm/probe.py",
        "vmferry.pki",
    ): "doctor's list also says whether the certificates are good",
    ("sleep", f"{AGENT}/way_back.py", "keep_pages_left"): "a window of QEMU's own rate limit, which it tells nobody of",
    ("late-import", f"{AGENT}/guest_memory.py", "vmferry.engine"): _RESTS,
    ("late-import", f"{AGENT}/guest_memory.py", "vmferry.wire"): _RESTS,
    ("late-import", f"{AGENT}/rescue.py", "vmferry.engine"): _RESTS,
    ("late-import", f"{AGENT}/rescue_feed.py", "vmferry.engine"): _RESTS,
    ("late-import", f"{AGENT}/snapshot_store.py", "vmferry.store"): _STORES,
    ("late-import", f"{AGENT}/save.py", "vmferry.agent"): _STORES,
    ("late-import", f"{AGENT}/save.py", "vmferry.engine"): _STORES,
    ("late-import", f"{AGENT}/save_ways.py", "vmferry.engine"): _STORES,
    ("late-import", f"{AGENT}/saves.py", "vmferry.agent"): _STORES,
    ("late-import", f"{AGENT}/snapshot_commands.py", "vmferry.agent"): _STORES,
    ("late-import", f"{AGENT}/snapshot_commands.py", "vmferry.store"): _STORES,
    ("late-import", f"{AGENT}/chores.py", "vmferry.agent"): _STORES,
    ("late-import", f"{AGENT}/pins_after.py", "vmferry.store"): _STORES,
    ("records-fact", f"{AGENT}/chores.py", "note"): "the one way into a chore's own log",
    ("records-fact", f"{AGENT}/save.py", "note"): "the one way into a save's own log",
    ("late-import", f"{AGENT}/restore_feed.py", "vmferry.engine"): _STORES,
    ("late-import", f"{AGENT}/restore_feed.py", "vmferry.wire"): _STORES,
    ("late-import", f"{AGENT}/restore_feed.py", "numpy"): _STORES,
    ("late-import", f"{AGENT}/open_snapshots.py", "vmferry.engine"): _STORES,
    ("late-import", f"{AGENT}/open_snapshots.py", "vmferry.store"): _STORES,
    ("late-import", f"{AGENT}/restores.py", "vmferry.agent"): _STORES,
    ("late-import", f"{AGENT}/restores.py", "vmferry.engine"): _STORES,
    ("late-import", f"{AGENT}/restores.py", "vmferry.store"): _STORES,
    ("late-import", f"{AGENT}/restore_spec.py", "vmferry.engine"): _STORES,
    ("late-import", f"{AGENT}/touch_orders.py", "vmferry.engine"): _STORES,
    ("late-import", f"{AGENT}/touch_orders.py", "numpy"): _STORES,
    ("records-fact", f"{AGENT}/restoring.py", "note"): "the one way into a restore's own log",
    ("compares-qemu-word", f"{AGENT}/restore_after.py", "_look"): "translates QEMU's word into facts of a restore",
    ("late-import", f"{CLI}/chaos_cmd.py", "vmferry.chaos"): _LAZY,
    ("late-import", f"{CLI}/demo_cmd.py", "vmferry.demo"): _LAZY,
    ("late-import", f"{CLI}/inspect_cmd.py", "vmferry.wire"): f"{_LAZY}; numpy takes longer than all the rest",
    ("late-import", f"{CLI}/host_cmd.py", "vmferry.pki"): f"{_LAZY}; cryptography takes longer than all the rest",
    ("late-import", f"{CLI}/render.py", "rich.console"): f"{_LAZY}; only a terminal does",
    ("late-import", f"{CLI}/render.py", "rich.progress"): f"{_LAZY}; only a terminal does",
    (
        "late-import",
        "src/vmferry/wire/multifd.py",
        "compression.zstd",
    ): "only a zstd stream needs it, and it may be absent",
    ("late-import", "src/vmferry/wire/multifd.py", "backports.zstd"): "the same for older Pythons",
    ("sleep", "tests/real/test_tls_real.py", "test_only_a_held_channel_hides_the_death_of_the_peer"): (
        "the claim is that nothing happens meanwhile; only time can show that"
    ),
    ("sleep", "src/vmferry/bench/snapshots.py", "sizes"): "what a guest changes within ten seconds is what is measured",
    (
        "sleep",
        "src/vmferry/bench/snapshots.py",
        "_working",
    ): "what a guest changes within ten seconds is what is measured",
    ("sleep", "tests/unit/agent/test_channel.py", "test_close_ends_all_that_nobody_has_taken"): _NO_EVENT,
    ("sleep", "tests/unit/testing/test_relay.py", "test_a_reset_by_one_peer_ends_the_other"): _NO_EVENT,
}
