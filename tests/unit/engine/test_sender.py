"""The outgoing endpoint in conversation with a destination that says what the test wants."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from tests.engine_conversations import (
    AT_ONCE,
    BLOCKS,
    NEW,
    OLD,
    OrderOfPages,
    Start,
    complete,
    failed,
    kinds,
    paused,
    switch_over,
)
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.image import PAGE_BYTES, ImageBlock, KeptBitmaps
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.testing.scripted_destination import PROOF_PING, WAIT_S, ScriptedDestination, make_image
from vmferry.wire.errors import WireError
from vmferry.wire.events import (
    BitmapChunk,
    Configuration,
    Description,
    Discard,
    EndOfRam,
    EndOfSections,
    Event,
    MultifdFlush,
    PackageEnd,
    Ping,
    Pong,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamBlock,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    SectionStart,
    Shut,
    SwitchoverAck,
    SwitchoverStart,
)

# --- precopy ------------------------------------------------------------------------------------------------------


@pytest.mark.conforms("33")
@pytest.mark.proves("S19")
@pytest.mark.parametrize("machine", [OLD, NEW])
def test_a_precopy(peer: ScriptedDestination, start: Start, machine: str) -> None:
    image = make_image(BLOCKS, machine=machine, uuid=bytes(range(16)))
    outgoing = start(image)
    assert peer.read_until(Configuration).machine == machine
    peer.read_until(Description)
    assert peer.events[-1] == Description(image.description or b"")
    assert (SwitchoverStart in kinds(peer)) is (machine == NEW)
    assert not {PostcopyAdvise, Discard, PostcopyListen, MultifdFlush} & set(kinds(peer))
    complete(peer, outgoing)
    assert outgoing.outcome().bytes > 60 * PAGE_BYTES


@pytest.mark.conforms("32")
def test_without_a_description_an_empty_one_is_sent(peer: ScriptedDestination, start: Start) -> None:
    """After a postcopy there is none; QEMU reads one and looks at nothing in it."""
    image = make_image(BLOCKS)
    image.description = None
    outgoing = start(image)
    assert outgoing.ledger.wait(Fact.SETUP_DONE, timeout_s=WAIT_S)
    data = bytearray()
    while not data.endswith(b"\x00\x06\x00\x00\x00\x02{}"):
        data += peer.sock.recv(1 << 20)
    assert outgoing.ledger.wait(Fact.ALL_SENT, timeout_s=WAIT_S)
    peer.say(Shut(0))
    assert outgoing.ledger.wait(Fact.PEER_ACK, timeout_s=WAIT_S)


@pytest.mark.parametrize("said", [(Shut(1),), (Shut(0),), (Pong(1), RequestPages(1, 4096, "pc.ram")), None])
def test_a_destination_that_fails_lies_or_goes_in_precopy(
    peer: ScriptedDestination, start: Start, said: tuple[Event, ...] | None
) -> None:
    """A result that comes before everything was sent is a lie: the image stays the guest's home."""
    outgoing = start(make_image({"pc.ram": 4000}))
    peer.read_until(Ping(1))
    if said is None:
        peer.close()
    else:
        peer.say(*said)
    failed(outgoing)
    assert Fact.ALL_SENT not in outgoing.ledger.log


@pytest.mark.parametrize("said", [Shut(1), None])
def test_a_destination_that_fails_after_everything_was_sent(
    peer: ScriptedDestination, start: Start, said: Event | None
) -> None:
    outgoing = start()
    peer.read_until(Description)
    if said is None:
        peer.close()
    else:
        peer.say(said)
    failed(outgoing)


def test_a_destination_that_never_says_its_final_word_is_given_up(peer: ScriptedDestination, start: Start) -> None:
    """As one does that waits at a barrier for what a multifd channel lost."""
    outgoing = start(options=OutgoingOptions(result_s=0.05))
    peer.read_until(Description)
    assert "has not said" in str(failed(outgoing).error)
    assert Fact.ALL_SENT in outgoing.ledger.log


def test_after_the_final_word_nothing_is_read(peer: ScriptedDestination, start: Start) -> None:
    outgoing = start()
    peer.read_until(Description)
    assert outgoing.ledger.wait(Fact.ALL_SENT, timeout_s=WAIT_S)
    peer.say(Shut(0), Shut(1), Pong(PROOF_PING), RequestPages(1, 1, "nothing"))
    assert outgoing.ledger.wait(Fact.PEER_ACK, timeout_s=WAIT_S)
    outgoing.saw_running()
    assert outgoing.stop().error is None
    assert outgoing.outcome().status is S.COMPLETED
    assert not {Fact.LINK_LOST, Fact.ERROR} & {entry.fact for entry in outgoing.ledger.log}


def test_harmless_words_in_precopy(peer: ScriptedDestination, start: Start) -> None:
    outgoing = start()
    peer.say(SwitchoverAck(), Pong(7), RequestPages(0, PAGE_BYTES, "pc.ram"))
    peer.read_until(Description)
    complete(peer, outgoing)
    assert outgoing.outcome().requests == 0


def test_an_order_that_comes_with_the_last_round_is_too_late(peer: ScriptedDestination, start: Start) -> None:
    """The end of RAM is on its way: whatever is left out of this round, the destination would never get."""
    image = make_image(BLOCKS)
    outgoing = Outgoing(image, options=OutgoingOptions(postcopy="on-order"))
    outgoing.ledger.listen(lambda fact: outgoing.start_postcopy() if fact is Fact.SWITCHOVER else None)
    outgoing.start(peer.dial)
    peer.begin()
    peer.read_until(Description)
    assert Discard not in kinds(peer)
    complete(peer, outgoing)
    outgoing.stop()


def test_what_holds_only_for_the_images_own_source_is_left_out(peer: ScriptedDestination, start: Start) -> None:
    image = make_image({"pc.ram": (1024, 512), "pc.rom": 4})
    assert image.configuration is not None
    image.configuration = Configuration(NEW, None, ("x-ignore-shared",), None, ("configuration/capabilities",))
    for block in image:
        block.wire = RamBlock(block.name, block.wire.used_length, block.wire.page_size, address=0x1000)
    outgoing = start(image)
    assert peer.read_until(Configuration) == Configuration(NEW, None, None, None, ())
    assert [peer.read_until(RamBlock) for _ in range(2)] == [
        RamBlock("pc.ram", 1024 * PAGE_BYTES), RamBlock("pc.rom", 4 * PAGE_BYTES)
    ]  # fmt: skip
    peer.read_until(Description)
    complete(peer, outgoing)


def test_dirty_bitmaps_that_come_after_the_beginning(peer: ScriptedDestination, start: Start) -> None:
    """A relay's own source tells of them behind the block list."""
    image = make_image(BLOCKS, whole=False)
    outgoing = start(image)
    assert outgoing.ledger.wait(Fact.SETUP_DONE, timeout_s=WAIT_S)
    first = BitmapChunk(0x04 | 0x08 | 0x10, "disk", "b", granularity=65536)
    image.bitmaps = KeptBitmaps(17, [first, BitmapChunk(0x01), BitmapChunk(0x01)], chunks_at_start=2)
    for block in image:
        block.assume_zeros()
    image.is_device_state_whole = True
    image.announce_pages()
    peer.read_until(Description)
    section = [event for event in peer.events if isinstance(event, SectionStart) and event.section_id == 17]
    assert len(section) == 1
    assert [event for event in peer.events if isinstance(event, BitmapChunk)][1:] == [BitmapChunk(0x01)] * 2
    complete(peer, outgoing)


def test_an_image_that_is_being_filled_goes_out_as_it_comes(peer: ScriptedDestination, start: Start) -> None:
    image = make_image({"pc.ram": 60}, whole=False)
    block = image.blocks["pc.ram"]
    outgoing = start(image)
    for turn in range(3):
        numbers = np.arange(20 * turn, 20 * turn + 20)
        content = np.full((20, PAGE_BYTES), 1 + turn, np.uint8)
        block.write(numbers.astype(np.uint64) * np.uint64(PAGE_BYTES), content)
        image.announce_pages()
        while not peer.have.get("pc.ram", np.zeros(60, np.bool_))[numbers].all():
            peer.read_until(EndOfRam)
    block.write(np.array([0], np.uint64), np.full((1, PAGE_BYTES), 99, np.uint8))
    image.is_device_state_whole = True
    image.announce_pages()
    peer.read_until(Description)
    assert peer.memory["pc.ram"][0, 0] == 99
    complete(peer, outgoing)


# --- postcopy -----------------------------------------------------------------------------------------------------


@pytest.mark.conforms("33", "34", "37", "39")
@pytest.mark.proves("S25", "S27", "S63")
@pytest.mark.parametrize("machine", [OLD, NEW])
def test_a_postcopy_at_once(peer: ScriptedDestination, start: Start, machine: str) -> None:
    outgoing = start(make_image(BLOCKS, machine=machine), AT_ONCE)
    peer.read_until(Ping(1))
    assert peer.read_until(PostcopyAdvise) == PostcopyAdvise(PAGE_BYTES, PAGE_BYTES)
    peer.read_until(PostcopyListen)
    assert not any(marks.any() for marks in peer.have.values())
    assert {each.block: each.ranges for each in peer.discarded} == {
        name: ((0, pages * PAGE_BYTES),) for name, pages in BLOCKS.items()
    }
    assert (SwitchoverStart in kinds(peer)) is (machine == NEW)
    peer.read_until(PackageEnd)
    assert PostcopyRun in kinds(peer)
    assert outgoing.ledger.wait(Fact.PACKAGE_SENT, timeout_s=WAIT_S)
    assert outgoing.outcome().status is S.POSTCOPY_DEVICE
    peer.say(Pong(1), Pong(2), Pong(4), RequestPages(0, PAGE_BYTES, "pc.rom"), Pong(3))
    assert outgoing.ledger.wait(Fact.PACKAGE_LOADED, timeout_s=0) is None
    peer.say(Pong(PROOF_PING))
    assert outgoing.ledger.wait(Fact.POSTCOPY_ANNOUNCED, timeout_s=WAIT_S)
    assert outgoing.outcome().status is S.POSTCOPY_ACTIVE
    peer.read_until(EndOfSections)
    complete(peer, outgoing)
    assert outgoing.outcome().requests == 1


@pytest.mark.proves("S27")
def test_an_answer_to_a_ping_that_was_not_sent_proves_nothing(peer: ScriptedDestination, start: Start) -> None:
    image = make_image(BLOCKS)
    image.is_device_state_whole = False  # so there is no package yet
    outgoing = start(image, AT_ONCE)
    peer.read_until(Ping(1))
    peer.say(Pong(PROOF_PING))
    failed(outgoing)
    assert Fact.PACKAGE_LOADED not in outgoing.ledger.log


@pytest.mark.conforms("39", "41")
@pytest.mark.proves("S30", "S31")
@pytest.mark.parametrize("has_proof", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        None,
        Shut(1),
        Shut(0),
        ResumeAck(),
        ReceivedBitmap("pc.ram", 16),
        RequestPages(1, PAGE_BYTES, "pc.ram"),
        RequestPages(0, 100, "pc.ram"),
        RequestPages(90 * PAGE_BYTES, PAGE_BYTES, "pc.ram"),
        RequestPages(89 * PAGE_BYTES, 2 * PAGE_BYTES, "pc.ram"),
        RequestPages(0, PAGE_BYTES, "pc.bios"),
        RequestPages(0, PAGE_BYTES, None),
        b"\x00\x63\x00\x00",
        b"\x00\x02\xff\xff",
    ],
    ids=str,
)
def test_what_ends_a_postcopy_fails_before_the_proof_and_pauses_after_it(
    peer: ScriptedDestination, start: Start, said: Event | bytes | None, has_proof: bool
) -> None:
    image = make_image({"pc.ram": 90, "pc.rom": 4})
    image.blocks["pc.ram"].have[50] = False  # so that it is not over before it ends
    outgoing = start(image, AT_ONCE)
    peer.read_until(PackageEnd)
    if has_proof:
        peer.say(Pong(PROOF_PING))
        assert outgoing.ledger.wait(Fact.PACKAGE_LOADED, timeout_s=WAIT_S)
    if said is None:
        peer.close()
    elif isinstance(said, bytes):
        peer.sock.sendall(said)
    else:
        peer.say(said)
    outcome = paused(outgoing) if has_proof else failed(outgoing)
    assert isinstance(outcome.error, WireError) is (said is not None and said != Shut(1))
    assert image.missing_pages() == 1


@pytest.mark.conforms("36", "38")
def test_requests_go_first_and_each_page_once(peer: ScriptedDestination, start: Start) -> None:
    """Requests of every kind while the background runs; the destination judges that no page comes twice."""
    outgoing = start(make_image({"pc.ram": 6000, "pc.rom": 4}), AT_ONCE)
    switch_over(peer)
    random = np.random.default_rng(4)
    order = OrderOfPages(peer)
    for turn in range(40):
        pages = random.integers(0, 6000, 25).tolist()
        peer.say(RequestPages(pages[0] * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
        peer.say(*(RequestPages(page * PAGE_BYTES, PAGE_BYTES) for page in pages * 2))
        peer.say(RequestPages(0, 4 * PAGE_BYTES, "pc.rom"), RequestPages(PAGE_BYTES, PAGE_BYTES))
        if turn == 20:
            peer.say(RequestPages(0, 6000 * PAGE_BYTES, "pc.ram"))
        enough = min(len(order.found) + 50, 6004)
        peer.read_while(lambda enough=enough: len(order.found) < enough, bytes_at_once=1 << 16)  # type: ignore[misc]
    peer.read_until(EndOfSections)
    assert outgoing.ledger.wait(Fact.ALL_SENT, timeout_s=WAIT_S)
    complete(peer, outgoing)


def test_a_request_is_answered_before_what_was_not_asked_for(peer: ScriptedDestination, start: Start) -> None:
    image = make_image({"pc.ram": 60_000})
    outgoing = start(image, AT_ONCE)
    switch_over(peer)  # nothing more is read: the socket is full, the background waits
    peer.say(RequestPages(59_000 * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
    order = OrderOfPages(peer)
    peer.read_while(lambda: not peer.have["pc.ram"][59_000], bytes_at_once=4096)
    assert len(order.found) < 1000  # what the socket and one chunk hold
    peer.read_until(EndOfSections)
    complete(peer, outgoing)
    assert outgoing.outcome().request_p50_us is not None


def test_a_request_finds_room_that_the_background_left(peer: ScriptedDestination, start: Start) -> None:
    """The destination reads nothing at all, and yet what it asks for is written, one after the other."""
    outgoing = start(make_image({"pc.ram": 60_000}), AT_ONCE)
    switch_over(peer)
    for number in range(1, 11):
        page = 60_000 - 100 * number
        peer.say(RequestPages(page * PAGE_BYTES, PAGE_BYTES, "pc.ram"))
        until_s = time.monotonic() + WAIT_S
        while outgoing.outcome().requests_served < number:
            assert time.monotonic() < until_s, f"request {number} waits for room"
            os.sched_yield()
    peer.read_until(EndOfSections)
    complete(peer, outgoing)


@pytest.mark.conforms("42")
@pytest.mark.parametrize("machine", [OLD, NEW])
def test_the_preempt_channel(peer: ScriptedDestination, start: Start, machine: str) -> None:
    image = make_image({"pc.ram": 3000, "pc.rom": 4}, machine=machine)
    image.blocks["pc.ram"].have[100:] = False  # the background waits, so that requests decide the way
    outgoing = start(image, OutgoingOptions(postcopy="at-once", preempt=True, near_pages=0))
    if machine == OLD:
        urgent = peer.accept()  # before any answer: a destination of 7.2 reads nothing without it
        peer.read_until(Ping(1))
    else:
        peer.read_until(EndOfRam)
        assert not peer.has_connection
        peer.say(Pong(1))
        urgent = peer.accept()
    peer.read_until(PackageEnd)
    peer.say(Pong(PROOF_PING), RequestPages(500 * PAGE_BYTES, 60 * PAGE_BYTES, "pc.ram"))
    image.blocks["pc.ram"].have[500:560] = True
    image.announce_pages()
    peer.read_preempt(urgent, 60)
    image.blocks["pc.ram"].have[:] = True
    peer.say(RequestPages(2000 * PAGE_BYTES, 900 * PAGE_BYTES))
    image.announce_pages()
    reader = threading.Thread(target=peer.read_preempt, args=(urgent, 900))
    peer_done = peer.read_until
    reader.start()
    reader.join(WAIT_S)
    peer_done(EndOfSections)
    if machine == OLD:
        assert peer.read_preempt(urgent, 1)  # its own end mark
    else:
        assert outgoing.ledger.wait(Fact.ALL_SENT, timeout_s=WAIT_S)
    complete(peer, outgoing)


@pytest.mark.conforms("42")
def test_a_destination_that_does_not_wait_for_the_end_of_the_preempt_channel(
    peer: ScriptedDestination, start: Start
) -> None:
    """QEMU 11 with an old machine type: it has everything, says so, and closes before the end mark."""
    outgoing = start(make_image(BLOCKS, machine=OLD), OutgoingOptions(postcopy="at-once", preempt=True))
    urgent = peer.accept()
    switch_over(peer)
    urgent.close()
    peer.read_until(EndOfSections)
    complete(peer, outgoing)
    assert Fact.LINK_LOST not in outgoing.ledger.log


@pytest.mark.conforms("34", "44")
def test_huge_pages_travel_whole(peer: ScriptedDestination, start: Start) -> None:
    outgoing = start(make_image({"pc.ram": (4 * 512, 512), "pc.rom": 4}), AT_ONCE)
    assert peer.read_until(PostcopyAdvise).page_sizes == 2 << 20 | PAGE_BYTES
    assert peer.read_until(RamBlock).page_size == 2 << 20
    peer.read_until(PackageEnd)
    peer.say(Pong(PROOF_PING))
    assert all(
        start % (2 << 20) == length % (2 << 20) == 0
        for each in peer.discarded
        if each.block == "pc.ram"
        for start, length in each.ranges
    )
    peer.say(RequestPages(3 * (2 << 20), 2 << 20, "pc.ram"), RequestPages(0, PAGE_BYTES, "pc.rom"))
    order = OrderOfPages(peer)
    peer.read_until(EndOfSections)
    order.check(512)
    complete(peer, outgoing)


@pytest.mark.proves("S87")
def test_a_relay_in_postcopy_asks_for_what_is_not_here_once(peer: ScriptedDestination, start: Start) -> None:
    absent: list[tuple[str, int, int]] = []
    asked = threading.Event()

    def on_absent(block: ImageBlock, first: int, count: int) -> None:
        absent.append((block.name, first, count))
        asked.set()

    image = make_image({"pc.ram": 90, "pc.rom": 4})
    block = image.blocks["pc.ram"]
    block.have[40:] = False
    outgoing = start(image, AT_ONCE, on_absent=on_absent)
    switch_over(peer)
    peer.say(RequestPages(50 * PAGE_BYTES, PAGE_BYTES, "pc.ram"), *[RequestPages(50 * PAGE_BYTES, PAGE_BYTES)] * 500)
    peer.say(RequestPages(0, PAGE_BYTES, "pc.rom"))
    peer.read_while(lambda: not (peer.have["pc.ram"][:40].all() and peer.have["pc.rom"].all()))
    assert asked.wait(WAIT_S)
    block.have[40:] = True
    image.announce_pages()
    peer.read_until(EndOfSections)
    complete(peer, outgoing)
    assert absent == [("pc.ram", 50, 1)]


def test_what_was_taken_back_upstream_after_it_was_sent_goes_again(peer: ScriptedDestination, start: Start) -> None:
    image = make_image({"pc.ram": 90}, whole=False)
    block = image.blocks["pc.ram"]
    block.write(np.arange(90, dtype=np.uint64) * np.uint64(PAGE_BYTES), np.full((90, PAGE_BYTES), 1, np.uint8))
    outgoing = start(image, OutgoingOptions(postcopy="on-order"))
    peer.read_until(Ping(1))
    peer.say(Pong(1))
    while not peer.have.get("pc.ram", np.zeros(1, np.bool_)).all():
        peer.read_until(EndOfRam)
    block.discard(7 * PAGE_BYTES, PAGE_BYTES)
    image.is_device_state_whole = True
    outgoing.start_postcopy()
    peer.read_until(PackageEnd)
    assert peer.discarded == [Discard("pc.ram", ((7 * PAGE_BYTES, PAGE_BYTES),))]
    peer.say(Pong(PROOF_PING))
    block.write(np.array([7 * PAGE_BYTES], np.uint64), np.full((1, PAGE_BYTES), 2, np.uint8))
    image.announce_pages()
    peer.read_until(EndOfSections)
    assert peer.memory["pc.ram"][7, 0] == 2
    complete(peer, outgoing)
