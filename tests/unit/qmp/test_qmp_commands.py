"""What each command sends, and that any answer at all can be read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmferry.qmp import commands, info


class Recorder:
    """A client that answers every command with `answer` and keeps what was sent."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = {} if answer is None else answer
        self.sent: list[tuple[Any, ...]] = []

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        deadline_s: float = 0.0,
        fds: Sequence[int] = (),
    ) -> Any:
        assert deadline_s == 3.5
        self.sent.append((name, arguments, *(["oob"] if oob else []), *fds))
        return self.answer


Call = Callable[[Recorder], Awaitable[Any]]
D: Any = {"deadline_s": 3.5}

SENT: list[tuple[Call, tuple[Any, ...]]] = [
    (lambda q: commands.cont(q, **D), ("cont", None)),
    (lambda q: commands.stop(q, **D), ("stop", None)),
    (lambda q: commands.quit(q, **D), ("quit", None)),
    (
        lambda q: commands.migrate_set_capabilities(q, {"events": True}, **D),
        ("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}),
    ),
    (
        lambda q: commands.migrate_set_parameters(q, {"max-bandwidth": 5}, **D),
        ("migrate-set-parameters", {"max-bandwidth": 5}),
    ),
    (lambda q: commands.migrate(q, "fd:x", **D), ("migrate", {"uri": "fd:x"})),
    (lambda q: commands.migrate(q, "fd:x", resume=True, **D), ("migrate", {"uri": "fd:x", "resume": True})),
    (lambda q: commands.migrate(q, channels=[{"a": 1}], **D), ("migrate", {"channels": [{"a": 1}]})),
    (lambda q: commands.migrate_incoming(q, "fd:x", **D), ("migrate-incoming", {"uri": "fd:x"})),
    (
        lambda q: commands.migrate_incoming(q, "fd:x", exit_on_error=False, **D),
        ("migrate-incoming", {"uri": "fd:x", "exit-on-error": False}),
    ),
    (lambda q: commands.migrate_cancel(q, **D), ("migrate_cancel", None)),
    (
        lambda q: commands.migrate_continue(q, "pre-switchover", **D),
        ("migrate-continue", {"state": "pre-switchover"}),
    ),
    (lambda q: commands.migrate_start_postcopy(q, **D), ("migrate-start-postcopy", None)),
    (lambda q: commands.migrate_pause(q, **D), ("migrate-pause", None, "oob")),
    (lambda q: commands.migrate_recover(q, "unix:/x", **D), ("migrate-recover", {"uri": "unix:/x"}, "oob")),
    (lambda q: commands.yank(q, **D), ("yank", {"instances": [{"type": "migration"}]}, "oob")),
    (lambda q: commands.getfd(q, "x", 7, **D), ("getfd", {"fdname": "x"}, 7)),
    (lambda q: commands.closefd(q, "x", **D), ("closefd", {"fdname": "x"})),
    (
        lambda q: commands.object_add(q, "tls-creds-x509", "tls0", {"dir": "/x"}, **D),
        ("object-add", {"dir": "/x", "qom-type": "tls-creds-x509", "id": "tls0"}),
    ),
    (lambda q: commands.object_add(q, "iothread", "io", **D), ("object-add", {"qom-type": "iothread", "id": "io"})),
    (lambda q: commands.object_del(q, "tls0", **D), ("object-del", {"id": "tls0"})),
    (lambda q: commands.blockdev_set_active(q, False, **D), ("blockdev-set-active", {"active": False})),
    (
        lambda q: commands.blockdev_set_active(q, True, node_name="n", **D),
        ("blockdev-set-active", {"active": True, "node-name": "n"}),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sent"), SENT, ids=lambda value: value[0] if isinstance(value, tuple) else "")
async def test_what_is_sent(call: Call, sent: tuple[Any, ...]) -> None:
    recorder = Recorder()
    assert await call(recorder) is None
    assert recorder.sent == [sent]


ASKED: list[tuple[Call, tuple[Any, ...], Any, Any]] = [
    (
        lambda q: commands.query_status(q, **D),
        ("query-status", None),
        {"status": "prelaunch", "running": False, "singlestep": False},
        info.RunState("prelaunch", running=False),
    ),
    (
        lambda q: commands.query_version(q, **D),
        ("query-version", None),
        {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "p"},
        info.Version(7, 2, 22, "p"),
    ),
    (
        lambda q: commands.query_kvm(q, **D),
        ("query-kvm", None),
        {"enabled": False, "present": True},
        info.Kvm(enabled=False, present=True),
    ),
    (
        lambda q: commands.query_migrate_capabilities(q, **D),
        ("query-migrate-capabilities", None),
        [{"capability": "events", "state": True}, {"capability": "xbzrle", "state": False}],
        {"events": True, "xbzrle": False},
    ),
    (
        lambda q: commands.query_migrate_parameters(q, **D),
        ("query-migrate-parameters", None),
        {"max-bandwidth": 1},
        {"max-bandwidth": 1},
    ),
    (
        lambda q: commands.query_machines(q, **D),
        ("query-machines", None),
        [{"name": "pc-q35-7.2", "alias": "q35", "is-default": True, "cpu-max": 288}, {"name": "none"}],
        (
            info.Machine("pc-q35-7.2", "q35", True, False, 288, None),
            info.Machine("none", None, False, False, None, None),
        ),
    ),
    (
        lambda q: commands.query_cpu_definitions(q, **D),
        ("query-cpu-definitions", None),
        [{"name": "host", "migration-safe": False, "unavailable-features": ["kvm"]}, {"name": "max"}],
        (
            info.CpuDefinition("host", False, ("kvm",), None, False),
            info.CpuDefinition("max", None, None, None, False),
        ),
    ),
    (
        lambda q: commands.query_named_block_nodes(q, **D),
        ("query-named-block-nodes", {"flat": True}),
        [{"node-name": "disk0", "drv": "raw", "file": "/x", "ro": True, "active": False}],
        (info.BlockNode("disk0", "raw", "/x", True, None, False),),
    ),
    (lambda q: commands.query_block(q, **D), ("query-block", None), [{"device": "a"}], [{"device": "a"}]),
    (lambda q: commands.query_qmp_schema(q, **D), ("query-qmp-schema", None), [{"name": "a"}], [{"name": "a"}]),
    (
        lambda q: commands.query_yank(q, **D),
        ("query-yank", None, "oob"),
        [{"type": "migration"}],
        [{"type": "migration"}],
    ),
]


@pytest.mark.parametrize(("call", "sent", "answer", "value"), ASKED, ids=[case[1][0] for case in ASKED])
async def test_what_is_asked_and_answered(call: Call, sent: tuple[Any, ...], answer: Any, value: Any) -> None:
    recorder = Recorder(answer)
    assert await call(recorder) == value
    assert recorder.sent == [sent]


async def test_query_migrate_takes_what_is_there() -> None:
    nothing = await commands.query_migrate(Recorder({}), **D)
    assert nothing.status is None
    assert nothing.blocked_reasons == ()
    answer = {
        "status": "postcopy-active", "total-time": 10, "setup-time": 2, "downtime": 3, "expected-downtime": 300,
        "cpu-throttle-percentage": 20, "error-desc": "why", "blocked-reasons": ["a", "b"], "remaining": 77,
        "socket-address": [{"type": "unix", "path": "/x"}], "vfio": {"transferred": 9},
        "postcopy-blocktime": 4, "postcopy-vcpu-blocktime": [4, 0], "postcopy-latency": 1000,
        "postcopy-vcpu-latency": [1, 2], "postcopy-non-vcpu-latency": 5, "postcopy-latency-dist": [0, 1],
        "ram": {
            "transferred": 1, "remaining": 2, "total": 3, "duplicate": 4, "normal": 5, "dirty-sync-count": 6,
            "dirty-pages-rate": 7, "mbps": 8.5, "pages-per-second": 9, "page-size": 4096, "precopy-bytes": 10,
            "downtime-bytes": 11, "postcopy-bytes": 12, "multifd-bytes": 13, "postcopy-requests": 14,
        },
    }  # fmt: skip
    full = await commands.query_migrate(Recorder(answer), **D)
    assert full == info.MigrateInfo(
        status="postcopy-active", error_desc="why", blocked_reasons=("a", "b"),
        socket_addresses=({"type": "unix", "path": "/x"},), total_time_ms=10, setup_time_ms=2,
        expected_downtime_ms=300, downtime_ms=3, cpu_throttle_percent=20, remaining_bytes=77,
        vfio_transferred_bytes=9, ram_transferred_bytes=1, ram_remaining_bytes=2, ram_total_bytes=3,
        ram_duplicate_pages=4, ram_normal_pages=5, dirty_sync_count=6, dirty_pages_per_s=7, pages_per_s=9,
        mbps=8.5, page_bytes=4096, precopy_bytes=10, downtime_bytes=11, postcopy_bytes=12, multifd_bytes=13,
        postcopy_requests=14, postcopy_blocktime_ms=4, postcopy_vcpu_blocktimes_ms=(4, 0),
        postcopy_latency_ns=1000, postcopy_vcpu_latencies_ns=(1, 2), postcopy_non_vcpu_latency_ns=5,
        postcopy_latency_counts=(0, 1),
    )  # fmt: skip


MEMBERS = [
    "status", "running", "qemu", "major", "package", "ram", "mbps", "total", "name", "drv", "capability", "vfio",
    "socket-address", "blocked-reasons", "postcopy-vcpu-blocktime", "unavailable-features", "active", "total-time",
]  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(0, 1) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=anything)
def test_no_answer_is_too_strange_to_be_read(raw: Any) -> None:
    for read in (
        info.run_state, info.version, info.kvm, info.machines, info.cpu_definitions, info.block_nodes,
        info.capabilities, info.migrate_info,
    ):  # fmt: skip
        hash(repr(read(raw)))
