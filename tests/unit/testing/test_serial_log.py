"""The judge must be right before anybody is judged: joins, counts, gaps, and the reading thread."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vmferry.testing.guest_report import LineCutter, read_line, tick_of
from vmferry.testing.serial_log import Chunk, SerialReader, SerialTimeoutError, analyse

TICK_S = 0.010


def line(words: str) -> bytes:
    raw = words.encode()
    return raw + b" %02x\n" % (sum(raw) % 256)


def tick(seq: int, errors: int = 0) -> bytes:
    return line(f"T {seq} {seq * 10_000} {errors}")


def log(first: int, last: int, *, from_s: float, head: bytes = b"") -> list[Chunk]:
    """Ticks `first`..`last`, one chunk per tick, the first of them at `from_s`."""
    ticks = [Chunk(from_s + (seq - first) * TICK_S, tick(seq)) for seq in range(first, last + 1)]
    return [Chunk(from_s, head), *ticks] if head else ticks


READY = line("READY 1 0000-11 tick_ms=10")


def test_a_clean_migration_has_no_complaints() -> None:
    report = analyse(log(1, 300, from_s=0, head=READY), log(301, 600, from_s=3.05))
    assert report.complaints() == []
    assert report.ticks == 600
    assert report.ticks_per_side == (300, 300)
    assert report.switch_gap_ms == pytest.approx(60, abs=0.01)
    assert report.guest_gap_ms == pytest.approx(60, abs=0.01)
    assert report.max_gap_elsewhere_ms == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize("cut", range(len(tick(301)) + 1))
def test_a_line_that_is_cut_anywhere_by_the_switch_is_whole_again(cut: int) -> None:
    whole = tick(301)
    source = [*log(1, 300, from_s=0, head=READY), Chunk(3.0, whole[:cut])]
    destination = [Chunk(3.2, whole[cut:]), *log(302, 310, from_s=3.21)]
    report = analyse(source, destination)
    assert report.complaints() == []
    assert report.ticks == 310
    assert report.overlap is False


def test_bytes_lost_at_the_switch_are_told_as_a_strange_line_and_a_lost_tick() -> None:
    source = [*log(1, 300, from_s=0, head=READY), Chunk(3.0, tick(301)[:7])]
    report = analyse(source, log(302, 310, from_s=3.21))
    assert report.ticks_lost == 1
    assert len(report.strange_lines) == 1


def test_a_guest_that_went_on_at_the_source_has_run_twice() -> None:
    report = analyse(log(1, 320, from_s=0), log(301, 600, from_s=3.05))
    assert report.overlap is True
    assert report.ticks_duplicated == 20
    assert report.guest_clock_went_back is True


def test_a_late_log_alone_is_no_second_life() -> None:
    """The source's reader was delayed by 500 ms; the numbers are in order all the same."""
    report = analyse(log(1, 300, from_s=0.5), log(301, 600, from_s=3.05))
    assert report.overlap is False
    assert report.complaints() == []


def test_ticks_that_are_missing_between_the_logs_are_lost() -> None:
    report = analyse(log(1, 300, from_s=0), log(305, 600, from_s=3.05))
    assert report.ticks_lost == 4


def test_a_guest_that_booted_again_is_found() -> None:
    report = analyse(log(1, 300, from_s=0, head=READY), log(1, 50, from_s=3, head=READY))
    assert report.boots == 2
    assert report.overlap is True


def test_a_destination_that_never_ran_leaves_no_switch() -> None:
    report = analyse(log(1, 300, from_s=0, head=READY), [])
    assert report.complaints() == []
    assert report.switch_gap_ms is None
    assert report.ticks_per_side == (300, 0)


def test_a_stall_after_the_switch_counts_as_the_guests_gap() -> None:
    destination = [*log(301, 310, from_s=3.05), *log(311, 700, from_s=3.64)]
    report = analyse(log(1, 300, from_s=0), destination)
    assert report.switch_gap_ms == pytest.approx(60, abs=0.01)
    assert report.guest_gap_ms == pytest.approx(500, abs=0.01)


def test_errors_are_counted_by_kind_and_walks_by_side() -> None:
    said = [
        line("E memory region=a page=7 word=1 want=3 got=2 generation=3"),
        line("E disk slot=5 word=0 want=5 got=0 number=5"),
        line("E guest module virtio errno=2"),
        line("W memory 8"),
        line("W memory 9"),
        line("W disk 3"),
        tick(302, errors=3),
    ]
    source = [*log(1, 300, from_s=0, head=READY), Chunk(3.0, line("W memory 7"))]
    destination = [*log(301, 301, from_s=3.1), Chunk(3.2, b"".join(said))]
    report = analyse(source, destination)
    assert (report.memory_errors, report.disk_errors, report.other_errors) == (1, 1, 1)
    assert report.errors_counted_by_guest == 3
    assert (report.walks_after, report.disk_walks_after) == (2, 1)
    assert len(report.error_lines) == 3
    assert report.complaints()


def test_a_kernel_panic_is_seen_and_boot_text_is_not_strange() -> None:
    source = log(1, 9, from_s=1, head=b"SeaBIOS (version 1.16)\r\n\r\n" + READY)
    assert analyse(source, []).complaints() == []
    source.append(Chunk(2, b"[   3.0] Kernel panic - not syncing: Attempted to kill init!\r\n"))
    report = analyse(source, [])
    assert report.panicked is True
    assert len(report.strange_lines) == 1


def test_a_line_with_a_wrong_sum_is_not_a_tick() -> None:
    good = tick(5).rstrip(b"\n")
    assert tick_of(read_line(good, 0.0)) is not None
    assert tick_of(read_line(good.replace(b"T 5 ", b"T 6 "), 0.0)) is None
    assert read_line(b"", 0.0).kind == ""


def test_the_cutter_gives_the_same_lines_for_any_cut() -> None:
    data = READY + tick(1) + tick(2)
    for size in range(1, len(data) + 1):
        cutter = LineCutter()
        pieces = [Chunk(0.0, data[at : at + size]) for at in range(0, len(data), size)]
        kinds = [found.kind for piece in pieces for found in cutter.feed(piece)]
        assert kinds == ["READY", "T", "T"]


def test_a_reader_follows_a_file_that_does_not_exist_yet(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    with SerialReader.follow(path) as reader, path.open("ab", buffering=0) as guest:
        guest.write(READY + tick(1)[:3])
        after = reader.wait_ready(timeout_s=5)
        guest.write(tick(1)[3:] + tick(2))
        reader.wait_ticks(2, timeout_s=5, after=after)
        guest.write(tick(3))
    assert [found.seq for found in reader.ticks()] == [1, 2, 3]
    assert analyse(reader.chunks(), []).complaints() == []


def test_a_reader_begins_anew_when_the_file_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    path.write_bytes(READY + tick(1))
    with SerialReader.follow(path) as reader:
        after = reader.wait_ticks(1, timeout_s=5)
        path.write_bytes(tick(2))
        reader.wait_ticks(1, timeout_s=5, after=after)
    assert [found.seq for found in reader.ticks()] == [1, 2]


def test_a_reader_listens_and_outlives_its_peer(tmp_path: Path) -> None:
    path = tmp_path / "serial.sock"
    with SerialReader.listen(path) as reader:
        for seq in (1, 2):
            with socket.socket(socket.AF_UNIX) as guest:
                guest.connect(str(path))
                guest.sendall(tick(seq))
            reader.wait_for(lambda found, n=seq: found.words[:2] == ("T", str(n)), timeout_s=5)  # type: ignore[misc]
    assert not path.exists()


def test_a_wait_that_fails_says_what_came_last(tmp_path: Path) -> None:
    with SerialReader.follow(tmp_path / "serial.log") as reader:
        (tmp_path / "serial.log").write_bytes(tick(41))
        reader.wait_ticks(1, timeout_s=5)
        with pytest.raises(SerialTimeoutError, match="T 41"):
            reader.wait_ready(timeout_s=0.05)
