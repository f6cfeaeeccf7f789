"""The main channel's thread with hostile and broken sources: each ends as a real destination would, without harm."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest

from tests.incoming_peer import rest_of_postcopy, rig, to_postcopy
from tests.wire_streams import (
    BLOCK,
    ROM,
    SIZE,
    bitmaps,
    device,
    join,
    multifd,
    opening,
    pages,
    part,
    precopy,
    setup,
    zeros,
)  # fmt: skip
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.machine_types import has_switchover_ack
from vmferry.wire.events import (
    Configuration,
    EndOfSections,
    Header,
    MultifdInit,
    OpenReturnPath,
    Ping,
    Pong,
    SectionFooter,
    SectionStart,
    Shut,
    XbzrlePage,
)

PRECOPY = precopy()
BOUNDARIES = sorted(set(accumulate(len(join([each])) for each in PRECOPY)))[:-1]


@pytest.mark.proves("S30")
@pytest.mark.parametrize("end", BOUNDARIES)
def test_a_precopy_cut_off_at_a_boundary_is_worth_nothing(end: int) -> None:
    with rig() as rigged:
        source = rigged.connect(join(PRECOPY)[:end])
        source.flush()
        source.break_off()
        rigged.wait(Fact.ERROR, Fact.LINK_LOST, Fact.ALL_SENT)
        assert rigged.stop().status is S.FAILED
        assert Fact.PEER_ACK not in rigged.incoming.ledger.log


@pytest.mark.parametrize("at", [0, 5, 30, 80, 150, 300, 4500, 90_000])
def test_garbage_in_the_middle_of_a_precopy_fails_it(at: int) -> None:
    stream = join(PRECOPY)
    with rig() as rigged:
        source = rigged.connect(stream[:at] + b"\xff" * 9000)
        heard = source.listen_to_end()
        if at < 4:  # not even a stranger who looks like one of ours
            assert rigged.stop().status is S.FAILED
            return
        rigged.wait(Fact.ERROR)
        assert rigged.incoming.error is not None
        assert Shut(0) not in heard
        assert (Shut(1) in heard) == (at >= 80), "only an open return path can carry it"


SHARED = Configuration("pc-i440fx-11.1", capabilities=("x-ignore-shared",), order=("configuration/capabilities",))
REFUSED: dict[str, Callable[[], bytes]] = {
    "another version": lambda: b"QEVM\0\0\0\4",
    "the obsolete version": lambda: b"QEVM\0\0\0\2",
    "a ping without return path": lambda: join([Header(), Configuration("pc-i440fx-11.1"), Ping(1)]),
    "an unknown iterable section": lambda: join(opening()) + join([SectionStart(9, "0000:00/vfio", 0, 1)]),
    "an unknown command": lambda: join(opening()) + b"\x08\0\x63\0\0",
    "a resume out of place": lambda: join(opening()) + b"\x08\0\x09\0\0",
    "an unknown flag of RAM": lambda: join(opening()) + b"\x02\0\0\0\2" + bytes.fromhex("0000000000000400"),
    "an unknown tag": lambda: join(opening()) + b"\x55",
    "the footer of another section": lambda: join(opening()) + join([*part()[:-1], SectionFooter(3)]),
    "a page outside of its block": lambda: join([*opening(), *part(pages([64]))]),
    "a difference to nothing": lambda: join([*opening(), *part(XbzrlePage(BLOCK, SIZE, b"\0\1\xf0", named=True))]),
    "x-ignore-shared": lambda: join([Header(), SHARED, *opening()[2:]]),
    "a discard outside of its block": lambda: join(opening(advise=True))
    + bytes.fromhex("0800060019" + "00" + "06") + b"pc.ram" + bytes.fromhex("00" + "00" * 8 + "0000000000100000"),
}  # fmt: skip


@pytest.mark.conforms("1", "4", "13", "15")
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_understood_is_refused_and_nothing_kept(what: str) -> None:
    with rig() as rigged:
        source = rigged.connect(REFUSED[what]())
        heard = source.listen_to_end()
        rigged.wait(Fact.ERROR)
        assert rigged.incoming.error is not None
        assert Shut(0) not in heard
        assert Fact.LOADED not in rigged.incoming.ledger.log


@pytest.mark.conforms("5")
def test_zero_length_parts_cost_little() -> None:
    with rig() as rigged:
        middle = join([*part()]) * 19_000
        source = rigged.connect(join(opening()) + middle + join(PRECOPY)[len(join(opening())) :])
        assert source.hear(Shut) == Shut(0)


@pytest.mark.conforms("8", "14")
def test_early_devices_and_bitmaps_are_kept_in_their_order() -> None:
    with rig() as rigged:
        early = device(50, "virtio-mem-early", b"\1\2\3", early=True)
        start = [Header(), Configuration("pc-i440fx-11.1"), OpenReturnPath(), Ping(1), *early, *setup()]
        source = rigged.connect(join([*start, *bitmaps(), *PRECOPY[len(opening()) :]]))
        assert source.hear(Shut) == Shut(0)
        assert [each.body for each in rigged.image.early] == [b"\1\2\3"]
        kept = rigged.image.bitmaps
        assert kept is not None
        assert len(kept.chunks) > kept.chunks_at_start > 0


@pytest.mark.conforms("16")
def test_pongs_repeat_what_was_asked_whatever_it_is() -> None:
    with rig() as rigged:
        source = rigged.connect(join([*opening(), Ping(2), Ping(0x42), Ping(0xFFFFFFFF)]))
        source.hear(Pong(0xFFFFFFFF))
        assert source.heard == [Pong(1), Pong(2), Pong(0x42), Pong(0xFFFFFFFF)]


@pytest.mark.conforms("21")
def test_a_page_that_was_taken_back_and_comes_as_zeros_is_zero() -> None:
    with rig() as rigged:
        body = [*part(pages([0]), zeros([1, 2])), *part(pages(range(3, 64))), *part(pages(range(4), block=ROM))]
        source = rigged.connect(to_postcopy() + join([*body, *part(last=True), EndOfSections()]))
        assert source.hear(Shut) == Shut(0)
        assert rigged.numbers()[:5] == [0, 0, 0, 3, 4]


@pytest.mark.conforms("23")
def test_multifd_pages_before_a_barrier_are_stored_before_those_after_it() -> None:
    machine = "pc-i440fx-11.1"
    with rig(channels=1) as rigged:
        source = rigged.connect(join(opening(machine)))
        channel = rigged.connect(join([MultifdInit(0), *multifd()[3:]]))
        rigged.wait(Fact.SETUP_DONE)
        run = multifd()
        channel.send(join(run[1:4]))
        source.send(join(PRECOPY)[len(join(opening())) :])
        assert source.hear(Shut) == Shut(0)
        channel.close()
        assert rigged.numbers()[2:5] == [2, 3, 4]


@pytest.mark.conforms("28")
@pytest.mark.parametrize(("machine", "wants"), [("pc-i440fx-7.2", True), ("pc-q35-11.0", True), ("pc-q35-11.1", False)])
def test_who_wants_a_switchover_ack(machine: str, wants: bool) -> None:
    assert has_switchover_ack(machine) is wants


def test_a_whole_postcopy_may_come_at_once() -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy(proof=False) + rest_of_postcopy())
        assert source.hear(Shut) == Shut(0)
        source.close()
        rigged.wait(Fact.ALL_SENT)
        assert rigged.stop().status is S.COMPLETED
