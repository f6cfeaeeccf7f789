"""`vmferry demo`: boots a real guest, moves it while it works, and lets the guest itself be the judge."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vmferry.demo import guest as guests
from vmferry.demo.guest import GuestWish, Moved
from vmferry.demo.setup import TwoAgents, choose_qemu, find_guest
from vmferry.errors import UsageError, VmferryError, from_wire
from vmferry.testing.guest_report import GuestReport
from vmferry.testing.serial_log import SerialReader, SerialTimeoutError, analyse
from vmferry.units import MIB, format_ms, parse_size_bytes

VM = "demo"
BOOT_S = 60.0
CHECK_S = 60.0
TICKS_BEFORE = 50
"""Half a second of an undisturbed guest, so that there is something to compare with."""
WALKS = 2
"""The first check that is reported at the destination may have begun at the source; the second did not."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoWish:
    """The options of the command."""

    mode: str
    memory: str
    dirty_mib_per_s: int
    clear_text: bool
    as_json: bool

    def words(self) -> list[str]:
        """What follows on the command line of the migration."""
        words = ["--clear-text"] if self.clear_text else []
        match self.mode:
            case "postcopy":
                # The guest is so small that its first pass would leave nothing for afterwards, and be a precopy.
                return ["--mode", "postcopy", "--set", "downtime-limit=1ms", *words]
            case "auto":
                return words
            case mode:
                return ["--mode", mode, *words]

    def guest(self) -> GuestWish:
        """Raises UsageError."""
        try:
            memory_bytes = parse_size_bytes(self.memory)
        except ValueError as error:
            raise UsageError(f"--memory: {error}") from error
        if self.dirty_mib_per_s < 0:
            raise UsageError("--dirty: a rate cannot be below 0")
        wish = GuestWish(name=VM, memory_mib=memory_bytes // MIB, dirty_mib_per_s=self.dirty_mib_per_s)
        assert wish.regions_mib, "it raises where there is no room"
        return wish


def run_demo(wish: DemoWish) -> tuple[dict[str, Any], int]:
    """The result as one JSON object, and the exit code. Raises VmferryError when it could not even begin."""
    say: Say = _be_quiet if wish.as_json else _tell
    guest, qemu, files = wish.guest(), choose_qemu(), find_guest()
    with TwoAgents(qemu, clear_text=wish.clear_text) as pair:
        secured = "in clear text, as you asked" if wish.clear_text else "everything between them under TLS"
        say(f"host-a and host-b are {pair.kind}; each runs a vmferry agent, {secured}.")
        spec = guests.write_spec(guest, files, pair.folder)
        say(f"$ vmferry run {spec.name}")
        before, here = guests.start(pair.a, spec)
        with here:
            say(
                f"A Linux guest of {guest.memory_mib} MiB boots on host-a, under QEMU {before['qemu']} "
                f"({before['accel'].upper()}) …"
            )
            _wait_working(here)
            say(
                f"It works: a tick every {guest.tick_ms} ms, {guest.dirty_mib_per_s} MiB of memory rewritten per "
                f"second, and blocks written to its disk. It checks all of them over and over.\n\n"
                f"$ {' '.join(['vmferry migrate', VM, 'host-b', *wish.words()])}"
            )
            moved = guests.move(pair, pair.a, VM, *wish.words(), show=not wish.as_json)
            return _verdict(pair, guest, before, here, moved, say)


def _wait_working(console: SerialReader) -> None:
    """Until memory is filled, the disk is being written, and some ticks have come."""
    with _told("the guest does not boot"):
        console.wait_ready(timeout_s=BOOT_S)
        console.wait_for(lambda line: line.words[:2] == ("W", "memory"), timeout_s=BOOT_S)
        console.wait_ticks(TICKS_BEFORE, timeout_s=BOOT_S, after=len(console.lines()))


def _verdict(
    pair: TwoAgents, guest: GuestWish, before: dict[str, Any], here: SerialReader, moved: Moved, say: Say
) -> tuple[dict[str, Any], int]:
    """Waits for the guest's own checks and judges."""
    wire, console = moved.wire, moved.console
    if moved.code != 0 or console is None:
        if console is not None:
            console.close()
        error = from_wire(wire["error"]) if wire.get("error") else VmferryError("the migration did not begin")
        say("\nThe demo ends here: the guest was not moved.")
        return {"result": "failed", "error": error.to_wire(), **_times(wire)}, moved.code or error.exit_code
    with console:
        after = guests.status(pair.b, VM)
        say("\nThe guest goes on on host-b and checks all of its memory and its disk there …")
        complaints = _wait_checked(console)
        found = analyse(here.chunks(), console.chunks())
    complaints += found.complaints()
    if not found.ticks_per_side[1]:
        complaints.append("no tick came from the destination")
    _say_verdict(found, guest, wire, complaints, say)
    result = {
        "result": "broken" if complaints else "ok",
        "complaints": complaints,
        **_times(wire),
        "guest_gap_ms": round(found.switch_gap_ms or found.guest_gap_ms, 3),
        "tick_ms": guest.tick_ms,
        "ticks": found.ticks,
        "ticks_lost": found.ticks_lost,
        "ticks_doubled": found.ticks_duplicated,
        "memory_errors": found.memory_errors,
        "disk_errors": found.disk_errors,
        "memory_checks_after": found.walks_after,
        "disk_checks_after": found.disk_walks_after,
        "qemu_source": before["qemu"],
        "qemu_target": after["qemu"],
        "accel": after["accel"],
        "wall_ms": round(moved.wall_ms, 3),
    }
    return result, VmferryError.exit_code if complaints else 0


def _times(wire: dict[str, Any]) -> dict[str, Any]:
    keys = ("job", "status", "outcome", "mode", "total_ms", "downtime_ms", "transferred_bytes", "timeline")
    return {key: wire.get(key) for key in keys}


def _wait_checked(console: SerialReader) -> list[str]:
    """Until the guest has checked everything at the destination once from start to end; else a complaint."""
    complaints = []
    for region in ("memory", "disk"):
        try:
            console.wait_walks(WALKS, timeout_s=CHECK_S, region=region)
        except SerialTimeoutError:
            complaints.append(f"the guest did not check its {region} within {CHECK_S:g} s after the move")
    return complaints


def _say_verdict(found: GuestReport, guest: GuestWish, wire: dict[str, Any], complaints: list[str], say: Say) -> None:
    if complaints:
        say("\nIT IS BROKEN: " + "; ".join(complaints) + ".")
        return
    gap_ms = found.switch_gap_ms or found.guest_gap_ms
    paused = "" if wire.get("downtime_ms") is None else f"Its CPUs stood still for {format_ms(wire['downtime_ms'])}; "
    checked = sum(guest.regions_mib)
    say(
        f"\nOK: the guest did not notice more than a pause. {found.ticks} ticks, none lost, none twice. "
        f"{paused}between its last tick on host-a and its first on host-b passed {format_ms(gap_ms)} "
        f"(a normal tick is {guest.tick_ms} ms).\n"
        f"Afterwards it checked all {checked} MiB that it works with, and its disk: not a byte is wrong."
    )


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Waiting in vain, as an error of ours."""
    try:
        yield
    except SerialTimeoutError as error:
        raise VmferryError(what, side="source", cause=error) from error


def _tell(text: str) -> None:
    print(text)
    sys.stdout.flush()


def _be_quiet(text: str) -> None:
    """With --json there is one object and nothing else."""
