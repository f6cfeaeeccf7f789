"""vmferry's own ends of the migration stream against QEMU's, by turns in one run.

Theory of operation
-------------------
A stopped guest with filled memory is migrated over and over: into an `Incoming` and into another QEMU, and from an
`Outgoing` and from a QEMU into new QEMUs. Both of a pair run the same round one after the other, the order changes
from round to round, and only the ratio of the medians says something: machines are noisy.

What is compared is timed by the QEMU that is the same in both: for incoming, the source's events from `setup` to
`completed`; for outgoing, the destination's events from `active` to `completed`.

Beside both, a reader that throws everything away is timed: no destination, however quick, lets that source end earlier
(`ceiling_ratio`).

Rule 1: memory is taken before the clock starts, on both sides (prealloc and `prefault`): the first touch of a page
        costs more than its transfer.
Rule 2: nothing is left out of a figure because it is bad; every sample is in the report.
Rule 3: each side has a processor of its own, the same for both contenders, as it would have on two hosts. Left to the
        scheduler, both ends of a local socket are put on one processor in one run and on two in the next one, which
        makes a difference of two, and shows nothing of either.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vmferry import limits
from vmferry.cli.render import table
from vmferry.core.facts import Fact
from vmferry.engine.image import PAGE_BYTES, Image
from vmferry.engine.incoming import Incoming
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.engine.shared import IncomingOptions
from vmferry.errors import QemuError, UsageError
from vmferry.qmp.codec import Event
from vmferry.testing.qemus import available
from vmferry.testing.stream_peers import QemuPeer, unix_listener

ROUNDS_MIN: Final = 7
MEMORY_MIB: Final = 1024
FILLED_MIB: Final = 960
RESUME_MIB: Final = (256, 1024, 4096)
RESUME_FILLED_MIB: Final = 192
"""The same in every size: what grows is the memory that nobody has touched, as in real guests."""
MOVE_S: Final = 60.0

CHANNELS: Final = {"": 0, ", multifd 2": 2, ", multifd 4": 4}

PROCESSORS: Final = sorted(os.sched_getaffinity(0))
SOURCE_CPU, DESTINATION_CPU = PROCESSORS[0], PROCESSORS[-1]

GOALS: Final = {
    "ratio": 1.15,
    "multifd_ratio": 1.0,
    "multifd4_ratio": 1.0,
    "outgoing_ratio": 1.1,
    "outgoing_multifd_ratio": 1.1,
}
REQUEST_P50_US_MAX, REQUEST_P99_US_MAX = 30.0, 200.0
RESUME_MS_MAX: Final = 20.0
ENDPOINT_MB_MAX: Final = 100.0


@dataclass
class Pair:
    """Two ways of doing the same; seconds of each round, and the bytes of guest memory that were moved."""

    name: str
    ours: list[float] = field(default_factory=list)
    qemus: list[float] = field(default_factory=list)
    sinks: list[float] = field(default_factory=list)
    """The same source into a reader that keeps nothing; empty where it is not measured."""
    moved_bytes: int = 0

    def result(self) -> dict[str, Any]:
        """Medians and their ratio; above 1: ours is faster."""
        ours, qemus = statistics.median(self.ours), statistics.median(self.qemus)
        ceiling: dict[str, Any] = {}
        if self.sinks:
            ceiling = {
                "ceiling_ratio": round(qemus / statistics.median(self.sinks), 3),
                "sink_ms": [round(each * 1000, 1) for each in self.sinks],
            }
        return {
            "gbps": round(self.moved_bytes / ours / 1e9, 3),
            "qemu_gbps": round(self.moved_bytes / qemus / 1e9, 3),
            "ratio": round(qemus / ours, 3),
            "ours_ms": [round(each * 1000, 1) for each in self.ours],
            "qemu_ms": [round(each * 1000, 1) for each in self.qemus],
            **ceiling,
        }


class Bed:
    """The source guest, what is known of its blocks, and new destinations. Everything ends with the block."""

    def __init__(
        self, version: str, *, memory_mib: int, filled_mib: int, prealloc: bool, stack: contextlib.ExitStack
    ) -> None:
        self.version, self._memory_mib = version, memory_mib
        self._prealloc = "on" if prealloc else "off"
        self._stack = stack
        self.source = stack.enter_context(self._peer(touch_mib=filled_mib, delay_loops=0))
        self.source.execute("stop")
        _put(self.source.process.pid, SOURCE_CPU)
        self.memory_mb = 0.0
        self.image = self._take_first()

    def _peer(self, *, touch_mib: int = 0, delay_loops: int = 0, incoming: bool = False) -> QemuPeer:
        more = ("-object", f"memory-backend-ram,id=m0,size={self._memory_mib}M,prealloc={self._prealloc}")
        return QemuPeer(
            self.version,
            machine="pc,memory-backend=m0",
            ram_mib=self._memory_mib,
            memory=f"{self._memory_mib}M",
            touch_mib=touch_mib,
            delay_loops=delay_loops,
            incoming=incoming,
            more=more,
        )

    def _take_first(self) -> Image:
        """The warm image for the outgoing runs; it also tells what blocks there are."""
        image = Image()
        self._stack.callback(image.close)
        self._incoming(image, channels=0)
        return image

    def new_image(self) -> Image:
        """An empty one whose memory is taken already."""
        image = Image()
        for block in self.image:
            image.add_block(block.wire).prefault()
        return image

    # --- into one destination or the other ------------------------------------------------------------------

    def into_ours(self, channels: int) -> float:
        """Seconds of a move into an endpoint of ours."""
        image = self.new_image()
        try:
            with _on(DESTINATION_CPU):
                return self._incoming(image, channels=channels)
        finally:
            image.close()

    def _incoming(self, image: Image, *, channels: int) -> float:
        listener, uri = unix_listener(self.source.folder / "in")
        endpoint = Incoming(image, options=IncomingOptions(channels=channels))
        endpoint.listen(listener)
        try:
            took_s = self._move(uri, channels)
            if endpoint.ledger.wait(Fact.ALL_SENT, Fact.ERROR, timeout_s=MOVE_S) is not Fact.ALL_SENT:
                raise QemuError(f"the move into an endpoint failed: {endpoint.error}")
            self.memory_mb = max(self.memory_mb, own_memory_mb())
            return took_s
        finally:
            endpoint.stop()
            (self.source.folder / "in").unlink()

    def into_qemu(self, channels: int) -> float:
        """Seconds of a move into a QEMU."""
        with self.destination(channels=channels) as destination:
            return self._move(f"unix:{destination.folder}/in", channels)

    def into_nothing(self, channels: int) -> float:
        """Seconds of a move into a reader that throws everything away, and so has no return path either."""
        listener, uri = unix_listener(self.source.folder / "in")
        with _on(DESTINATION_CPU), contextlib.closing(listener):
            sinks = [
                threading.Thread(target=_drain, args=(listener,), name=f"sink-{number}")
                for number in range(channels + 1)
            ]
            for sink in sinks:
                sink.start()
            try:
                return self._move(uri, channels, off=("return-path",))
            finally:
                listener.shutdown(socket.SHUT_RDWR)  # whoever waits for a connection that never came
                for sink in sinks:
                    sink.join()
                (self.source.folder / "in").unlink()

    def _move(self, uri: str, channels: int, *, off: tuple[str, ...] = ()) -> float:
        """From the source's `setup` to its `completed`, by its own clock; then it is as it was."""
        source = self.source
        _choose_multifd(source, channels, off=off)
        source.heard.clear()
        source.migrate(uri)
        took_s = _between(source, "setup", "completed")
        source.until_runstate("postmigrate")  # QEMU says `completed` before it has finished
        source.execute("cont")
        source.execute("stop")
        return took_s

    @contextlib.contextmanager
    def destination(self, *, channels: int = 0, postcopy: bool = False) -> Iterator[QemuPeer]:
        """A QEMU that listens."""
        with self._peer(incoming=True) as peer:
            _put(peer.process.pid, DESTINATION_CPU)
            _choose_multifd(peer, channels, *(["postcopy-ram"] if postcopy else []))
            peer.migrate_incoming(f"unix:{peer.folder}/in")
            yield peer

    # --- out of one source or the other ---------------------------------------------------------------------

    def out_of_ours(self, channels: int) -> float:
        """Seconds of a move out of the warm image."""
        _forget_sent(self.image)
        with self.destination(channels=channels) as destination, self._outgoing(channels=channels) as endpoint:
            endpoint.start(lambda: _dial(destination))
            took_s = _between(destination, "active", "completed")
            if endpoint.ledger.wait(Fact.PEER_ACK, Fact.ERROR, timeout_s=MOVE_S) is not Fact.PEER_ACK:
                raise QemuError(f"the move out of an endpoint failed: {endpoint.error}")
            self.memory_mb = max(self.memory_mb, own_memory_mb())
            return took_s

    def out_of_qemu(self, channels: int) -> float:
        """Seconds of the same move out of the source QEMU."""
        with self.destination(channels=channels) as destination:
            self._move(f"unix:{destination.folder}/in", channels)
            return _between(destination, "active", "completed")

    @contextlib.contextmanager
    def _outgoing(self, *, channels: int = 0, postcopy: bool = False) -> Iterator[Outgoing]:
        options = OutgoingOptions(channels=channels, postcopy="at-once" if postcopy else "never")
        endpoint = Outgoing(self.image, options=options)
        with _on(SOURCE_CPU):  # the endpoint's threads are made here
            try:
                yield endpoint
            finally:
                endpoint.stop()

    def serve(self) -> dict[str, float]:
        """One postcopy out of the warm image, while the guest runs: times of pages that it asked for, in µs."""
        _forget_sent(self.image)
        with self.destination(postcopy=True) as destination, self._outgoing(postcopy=True) as endpoint:
            began_s = time.time()
            endpoint.start(lambda: _dial(destination))
            resumed_s = _when(destination, lambda event: event.name == "RESUME")
            if endpoint.ledger.wait(Fact.PEER_ACK, Fact.ERROR, timeout_s=MOVE_S) is not Fact.PEER_ACK:
                raise QemuError(f"the postcopy out of an endpoint failed: {endpoint.error}")
            outcome = endpoint.outcome()
            return {
                "requests": outcome.requests,
                "timed": outcome.requests_served,
                "p50_us": outcome.request_p50_us or 0.0,
                "p99_us": outcome.request_p99_us or 0.0,
                "resume_ms": (resumed_s - began_s) * 1000,
            }


def _put(pid: int, cpu: int) -> None:
    """All threads of a process, and those that they will make, on one processor."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {cpu})


@contextlib.contextmanager
def _on(cpu: int) -> Iterator[None]:
    """This thread, and those that it makes meanwhile, on one processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def own_memory_mb() -> float:
    """What this process holds beside the guest images (which are shared memory), in MB (10^6 bytes)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) * 1024 / 1e6


def _forget_sent(image: Image) -> None:
    for block in image:
        block.sent[:] = False
        block.dirty[:] = False


def _choose_multifd(peer: QemuPeer, channels: int, *more: str, off: tuple[str, ...] = ()) -> None:
    unwanted = [*off, *([] if channels else ["multifd"])]
    capabilities = (["multifd"] if channels else []) + list(more)
    peer.set_up(*capabilities, off=unwanted, **({"multifd_channels": channels} if channels else {}))


def _drain(listener: socket.socket) -> None:
    """One connection, to its end; nothing of it is kept."""
    try:
        connection, _ = listener.accept()
    except OSError:
        return
    with connection:
        slab = bytearray(limits.ENGINE_SLAB_BYTES)
        while connection.recv_into(slab):
            pass


def _dial(destination: QemuPeer) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(f"{destination.folder}/in")
    except OSError:
        sock.close()
        raise
    return sock


def _between(peer: QemuPeer, first: str, last: str) -> float:
    """Seconds between two statuses, by the time stamps of their events."""
    return _when(peer, _says(last)) - _when(peer, _says(first))


def _says(status: str) -> Callable[[Event], bool]:
    def is_it(event: Event) -> bool:
        if event.name == "MIGRATION" and event.data.get("status") in ("failed", "cancelled"):
            raise QemuError(f"a measured migration ended as {event.data['status']}")
        return event.name == "MIGRATION" and event.data.get("status") == status

    return is_it


def _when(peer: QemuPeer, is_it: Callable[[Event], bool]) -> float:
    """The time stamp of the first such event, heard already or still to come."""
    for event in peer.heard:
        if is_it(event):
            assert event.timestamp_us is not None
            return event.timestamp_us / 1e6
    for event in peer.qmp.events(MOVE_S):
        peer.heard.append(event)
        if is_it(event):
            assert event.timestamp_us is not None
            return event.timestamp_us / 1e6
    raise QemuError("a measured migration did not get on")


# --- the run --------------------------------------------------------------------------------------------------


def run_bench(*, rounds: int) -> dict[str, Any]:
    """Everything as one JSON object. Raises VmferryError when something cannot be measured."""
    if rounds < ROUNDS_MIN:
        raise UsageError(f"--rounds: medians of fewer than {ROUNDS_MIN} rounds say nothing")
    version = list(available())[-1]
    with contextlib.ExitStack() as stack:
        bed = Bed(version, memory_mib=MEMORY_MIB, filled_mib=FILLED_MIB, prealloc=True, stack=stack)
        pairs = _throughput(bed, rounds)
        _tell(f"pages on demand, {rounds} rounds …")
        served = [bed.serve() for _ in range(rounds)]
    resume = {}
    for memory_mib in RESUME_MIB:
        _tell(f"connect to RESUME, {memory_mib} MiB, {rounds} rounds …")
        with contextlib.ExitStack() as stack:
            # Not taken before: a postcopy would only have to give it back.
            small = Bed(version, memory_mib=memory_mib, filled_mib=RESUME_FILLED_MIB, prealloc=False, stack=stack)
            resume[str(memory_mib)] = [round(small.serve()["resume_ms"], 2) for _ in range(rounds)]
    return _result(pairs, served, resume, rounds=rounds, version=version, memory_mb=bed.memory_mb)


def _throughput(bed: Bed, rounds: int) -> dict[str, dict[str, Any]]:
    moved_bytes = sum(int(block.touched.sum()) for block in bed.image) * PAGE_BYTES
    into: dict[str, Callable[[int], float]] = {"ours": bed.into_ours, "qemu": bed.into_qemu, "sink": bed.into_nothing}
    out_of: dict[str, Callable[[int], float]] = {"ours": bed.out_of_ours, "qemu": bed.out_of_qemu}
    kinds = [(f"incoming{name}", into, channels) for name, channels in CHANNELS.items()]
    kinds += [(f"outgoing{name}", out_of, channels) for name, channels in CHANNELS.items() if channels < 4]
    results = {}
    for name, ways, channels in kinds:
        _tell(f"{name}, {rounds} rounds …")
        pair = Pair(name, moved_bytes=moved_bytes)
        samples = {"ours": pair.ours, "qemu": pair.qemus, "sink": pair.sinks}
        for number in range(rounds + 1):
            for who in ways if number % 2 else reversed(ways):
                took_s = ways[who](channels)
                if number:  # the first is for warming up
                    samples[who].append(took_s)
        results[name] = pair.result()
    return results


def _result(
    pairs: dict[str, dict[str, Any]],
    served: list[dict[str, float]],
    resume: dict[str, list[float]],
    *,
    rounds: int,
    version: str,
    memory_mb: float,
) -> dict[str, Any]:
    result = {
        "incoming_gbps": pairs["incoming"]["gbps"],
        "qemu_incoming_gbps": pairs["incoming"]["qemu_gbps"],
        "ratio": pairs["incoming"]["ratio"],
        "multifd_ratio": pairs["incoming, multifd 2"]["ratio"],
        "multifd4_ratio": pairs["incoming, multifd 4"]["ratio"],
        "ceiling_ratio": pairs["incoming"]["ceiling_ratio"],
        "outgoing_ratio": pairs["outgoing"]["ratio"],
        "outgoing_multifd_ratio": pairs["outgoing, multifd 2"]["ratio"],
        "request_p50_us": round(statistics.median(each["p50_us"] for each in served), 1),
        "request_p99_us": round(statistics.median(each["p99_us"] for each in served), 1),
        "requests": [int(each["requests"]) for each in served],
        "connect_to_resume_ms": {size: round(statistics.median(times), 2) for size, times in resume.items()},
        "endpoint_memory_mb": round(memory_mb, 1),
        "rounds": rounds,
        "qemu": version,
        "load_average": os.getloadavg()[0],
        "pairs": pairs,
        "served": served,
        "connect_to_resume_all_ms": resume,
    }
    result["goals_met"] = {name: result[name] >= least for name, least in GOALS.items()} | {
        "request_p50_us": result["request_p50_us"] <= REQUEST_P50_US_MAX,
        "request_p99_us": result["request_p99_us"] <= REQUEST_P99_US_MAX,
        "connect_to_resume_ms": max(result["connect_to_resume_ms"].values()) <= RESUME_MS_MAX,
        "endpoint_memory_mb": memory_mb <= ENDPOINT_MB_MAX,
    }
    return result


def report_lines(result: dict[str, Any]) -> list[str]:
    """The table for people."""
    rows = [
        (name, f"{pair['gbps']:.2f} GB/s", f"{pair['qemu_gbps']:.2f} GB/s", f"{pair['ratio']:.2f}")
        for name, pair in result["pairs"].items()
    ]
    lines = [*table(("WHAT", "VMFERRY", "QEMU", "RATIO"), rows), ""]
    lines.append(
        f"page on demand: read to written in {result['request_p50_us']:.0f} µs (median), "
        f"{result['request_p99_us']:.0f} µs (99 of 100); goals {REQUEST_P50_US_MAX:.0f} and {REQUEST_P99_US_MAX:.0f}"
    )
    ceilings = ", ".join(f"{pair['ceiling_ratio']:.2f}" for pair in result["pairs"].values() if "ceiling_ratio" in pair)
    lines.append(f"incoming, for a reader that keeps nothing: {ceilings} of QEMU")
    sizes = ", ".join(f"{size} MiB {ms:.1f} ms" for size, ms in result["connect_to_resume_ms"].items())
    lines.append(f"connect to RESUME: {sizes}; goal {RESUME_MS_MAX:.0f} ms, flat")
    lines.append(f"memory beside the image: {result['endpoint_memory_mb']:.0f} MB; goal {ENDPOINT_MB_MAX:.0f}")
    missed = [name for name, is_met in result["goals_met"].items() if not is_met]
    lines.append("every goal is met" if not missed else f"missed: {', '.join(missed)}")
    lines.append(f"QEMU {result['qemu']}, medians of {result['rounds']}; the load was {result['load_average']:.1f}")
    return lines


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
