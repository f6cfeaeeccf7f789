"""An incoming endpoint and its owner: the two commits, orders at any time, strangers, the end in every state."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import time
from pathlib import Path

import pytest

from tests.incoming_peer import WAIT_S, Rig, Source, package_bytes, page_run, rest_of_postcopy, rig, to_postcopy
from tests.wire_streams import BLOCK, SIZE, join, multifd, opening, pages, part, precopy
from vmferry import limits
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.image import Image
from vmferry.engine.incoming import Incoming
from vmferry.testing.stream_peers import TlsPair, unix_listener
from vmferry.wire.events import (
    AskBitmap,
    BitmapEnd,
    EndOfSections,
    MultifdInit,
    OpenReturnPath,
    Ping,
    Pong,
    PostcopyResume,
    RequestPages,
    ResumeAck,
    Shut,
)

PROOF = Pong(0x42)
ALL_BITMAPS = join([AskBitmap("pc.ram"), AskBitmap("pc.rom"), PostcopyResume()])


def says_nothing_more(source: Source) -> bool:
    """Nothing is on its way from the endpoint; asked after something that comes behind it would have come."""
    try:
        return not source.sock.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True


# --- the commit of a precopy --------------------------------------------------------------------------------


@pytest.mark.conforms("18")
@pytest.mark.proves("S2", "S19")
def test_a_precopy_is_told_only_when_the_owner_says_so() -> None:
    with rig(hold_result=True) as rigged:
        source = rigged.connect(join(precopy()))
        source.hear(Pong(1))
        rigged.wait(Fact.LOADED)
        assert rigged.incoming.ledger.status is S.ACTIVE
        assert source.heard == [Pong(1)]
        assert says_nothing_more(source)
        rigged.incoming.give_result()
        assert source.hear(Shut) == Shut(0)
        assert Fact.ALL_SENT not in rigged.incoming.ledger.log
        source.close()
        rigged.wait(Fact.ALL_SENT)
        assert rigged.facts() == ["prepare", "listening", "header-seen", "setup-done", "switchover", "loaded",
                                  "peer-ack", "all-sent"]  # fmt: skip
        assert rigged.incoming.outcome().error is None


def test_a_result_that_was_ordered_before_it_is_due_is_given_then() -> None:
    with rig(hold_result=True) as rigged:
        rigged.incoming.give_result()
        assert rigged.connect(join(precopy())).hear(Shut) == Shut(0)


@pytest.mark.conforms("29")
def test_a_source_that_goes_while_the_result_is_held_keeps_its_guest() -> None:
    with rig(hold_result=True) as rigged:
        source = rigged.connect(join(precopy()))
        rigged.wait(Fact.LOADED)
        source.close()
        rigged.wait(Fact.ERROR)
        rigged.incoming.give_result()
        assert rigged.stop().status is S.FAILED


def test_a_result_that_cannot_leave_was_not_told() -> None:
    with rig(hold_result=True) as rigged:
        source = rigged.connect(join(precopy()))
        rigged.wait(Fact.LOADED)
        source.hear(Pong(1))
        source.sock.shutdown(socket.SHUT_RD)  # what the endpoint writes from here on breaks the connection
        rigged.incoming.give_result()
        rigged.wait(Fact.ERROR)
        assert Fact.PEER_ACK not in rigged.incoming.ledger.log
        assert rigged.stop().status is S.FAILED


def test_without_return_path_the_last_byte_is_the_commit() -> None:
    events = [each for each in precopy() if not isinstance(each, OpenReturnPath | Ping)]
    with rig(hold_result=True) as rigged:
        source = rigged.connect(join(events))
        source.close()
        rigged.wait(Fact.LOADED)
        assert rigged.stop().status is S.COMPLETED, "the source has let go; what is here is the only copy"


def test_waiting_for_the_owner_behind_a_closed_connection_costs_nothing() -> None:
    events = [each for each in precopy() if not isinstance(each, OpenReturnPath | Ping)]
    with rig(hold_result=True) as rigged:
        rigged.connect(join(events)).close()
        rigged.wait(Fact.LOADED)
        before = resource.getrusage(resource.RUSAGE_SELF)
        assert rigged.incoming.ledger.wait(Fact.ALL_SENT, timeout_s=0.3) is None
        after = resource.getrusage(resource.RUSAGE_SELF)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.15
        rigged.incoming.give_result()
        rigged.wait(Fact.ALL_SENT)


# --- the commit of a postcopy -------------------------------------------------------------------------------


@pytest.mark.conforms("17", "18")
@pytest.mark.proves("S24", "S27", "S31")
def test_the_proof_waits_for_the_owner_and_the_result_for_the_proof() -> None:
    with rig(hold_proof=True) as rigged:
        source = rigged.connect(to_postcopy() + rest_of_postcopy())
        rigged.wait(Fact.LOADED)
        source.hear(Pong(4))
        assert rigged.incoming.ledger.status is S.POSTCOPY_DEVICE
        rigged.until(lambda: rigged.incoming.is_result_due)
        assert [each for each in source.heard if isinstance(each, Pong)] == [Pong(1), Pong(2), Pong(3), Pong(4)]
        assert says_nothing_more(source)
        rigged.incoming.give_proof()
        source.hear(Shut(0))
        assert source.heard[-2:] == [PROOF, Shut(0)]
        source.close()
        rigged.wait(Fact.ALL_SENT)
        assert rigged.numbers() == list(range(64))


@pytest.mark.proves("S30")
def test_before_the_proof_the_source_may_have_its_guest_back() -> None:
    with rig(hold_proof=True) as rigged:
        source = rigged.connect(to_postcopy())
        rigged.wait(Fact.LOADED)
        source.close()
        rigged.wait(Fact.ERROR)
        rigged.incoming.give_proof()
        assert Fact.PACKAGE_LOADED not in rigged.incoming.ledger.log
        assert rigged.stop().status is S.FAILED


@pytest.mark.conforms("19")
@pytest.mark.parametrize("proof", [True, False])
def test_after_the_commit_a_lost_connection_is_a_pause(proof: bool) -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy(proof=proof))
        rigged.wait(Fact.PACKAGE_LOADED)
        source.close()
        rigged.wait(Fact.LINK_LOST)
        assert rigged.incoming.ledger.status is S.POSTCOPY_PAUSED
        assert rigged.incoming.error is None


def test_what_came_before_a_source_died_is_taken_although_it_cannot_be_answered_any_more() -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy())
        source.hear(Pong(4))

        def dies() -> None:  # on the endpoint's thread, between a ping and its answer
            if source.sock.fileno() >= 0:
                source.sock.sendall(join(part(pages(range(8, 24)))))
                source.sock.close()

        rigged.image.on_pages(dies)
        source.send(join([Ping(5)]))
        rigged.wait(Fact.LINK_LOST)
        assert rigged.image.blocks["pc.ram"].have[8:24].all()
        assert rigged.incoming.ledger.status is S.POSTCOPY_PAUSED


@pytest.mark.conforms("19")
@pytest.mark.proves("S31")
def test_after_the_commit_nothing_ever_says_that_it_failed() -> None:
    garbage = [b"\xff" * 100, join(opening()), package_bytes(), join([EndOfSections()]), b"\x08\x00\x63\x00\x00"]
    for each in garbage:
        with rig(stragglers_s=0.05) as rigged:
            source = rigged.connect(to_postcopy())
            rigged.wait(Fact.PACKAGE_LOADED)
            source.send(each)
            rigged.wait(Fact.LINK_LOST)
            assert not any(isinstance(word, Shut) for word in source.listen_to_end())
            assert rigged.incoming.ledger.status is S.POSTCOPY_PAUSED
            assert rigged.incoming.error is not None


def test_the_end_of_a_stream_that_still_owes_pages_is_a_pause() -> None:
    with rig(stragglers_s=0.05) as rigged:
        rigged.connect(to_postcopy() + rest_of_postcopy(first=1))
        rigged.wait(Fact.LINK_LOST)
        assert rigged.image.owed_pages() == 1


def test_a_page_that_comes_twice_in_postcopy_is_stored_once() -> None:
    with rig(hold_result=True) as rigged:
        twice = join([*part(page_run([5], 1)), *part(page_run([5, 6], 2))])
        source = rigged.connect(to_postcopy() + twice + rest_of_postcopy(first=0))
        source.hear(PROOF)
        rigged.until(lambda: rigged.incoming.is_result_due)
        assert rigged.numbers()[4:8] == [4, 1, 2, 7]
        assert rigged.incoming.counters().repeated_pages == 3


# --- requests and recovery ----------------------------------------------------------------------------------


def asked(source: Source) -> list[RequestPages]:
    return [each for each in source.heard if isinstance(each, RequestPages)]


@pytest.mark.conforms("20")
def test_requests_name_their_block_when_it_changes() -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy())
        rigged.wait(Fact.PACKAGE_LOADED)
        ram, rom = rigged.image.blocks["pc.ram"], rigged.image.blocks["pc.rom"]
        for block, first, count in ((ram, 1, 1), (ram, 3, 2), (rom, 0, 1), (ram, 9, 1)):
            rigged.incoming.request(block, first, count)
            source.hear(RequestPages)
        while len(asked(source)) < 4:
            assert source.listen()
        assert asked(source) == [
            RequestPages(1 * SIZE, SIZE, "pc.ram"),
            RequestPages(3 * SIZE, 2 * SIZE),
            RequestPages(0, SIZE, "pc.rom"),
            RequestPages(9 * SIZE, SIZE, "pc.ram"),
        ]


def test_a_request_from_before_the_switchover_is_made_when_it_can_be() -> None:
    with rig() as rigged:
        source = rigged.connect(join(opening(advise=True)))
        rigged.wait(Fact.SETUP_DONE)
        rigged.incoming.request(rigged.image.blocks["pc.ram"], 7)
        source.send(to_postcopy()[len(join(opening(advise=True))) :])
        assert source.hear(RequestPages) == RequestPages(7 * SIZE, SIZE, "pc.ram")


def test_a_request_outside_of_its_block_is_the_owners_mistake() -> None:
    with rig() as rigged:
        rigged.connect(to_postcopy())
        rigged.wait(Fact.PACKAGE_LOADED)
        with pytest.raises(AssertionError):
            rigged.incoming.request(rigged.image.blocks["pc.ram"], 60, 10)


@pytest.mark.conforms("20", "21", "22")
@pytest.mark.proves("S18")
def test_a_recovery_gives_bitmaps_and_asks_again_with_names() -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy() + join(part(pages([5, 6]))))
        rigged.wait(Fact.PACKAGE_LOADED)
        ram = rigged.image.blocks["pc.ram"]
        for page in (5, 9):
            rigged.incoming.request(ram, page)
        source.close()
        rigged.wait(Fact.LINK_LOST)
        rigged.incoming.request(ram, 11, 2)
        again = rigged.connect(ALL_BITMAPS)
        again.hear(ResumeAck(1))
        rigged.wait(Fact.RESUME_ACK, round_no=1)
        assert rigged.incoming.ledger.status is S.POSTCOPY_ACTIVE
        while len(asked(again)) < 2:
            assert again.listen()
        assert asked(again) == [RequestPages(9 * SIZE, SIZE, "pc.ram"), RequestPages(11 * SIZE, 2 * SIZE)]
        kinds = [type(each).__name__ for each in again.heard]
        assert kinds[:7] == ["ReceivedBitmap", "BitmapPiece", "BitmapEnd"] * 2 + ["ResumeAck"]
        again.send(rest_of_postcopy())
        assert again.hear(Shut) == Shut(0)
        again.close()
        rigged.wait(Fact.ALL_SENT)
        assert rigged.numbers() == list(range(64))


@pytest.mark.proves("S18")
def test_a_recovery_that_breaks_can_be_tried_again_and_orders_outlive_it() -> None:
    with rig(hold_result=True) as rigged:
        first = rigged.connect(to_postcopy())
        rigged.wait(Fact.PACKAGE_LOADED)
        first.close()
        rigged.wait(Fact.LINK_LOST, round_no=1)
        rigged.incoming.give_result()
        rigged.connect(join([AskBitmap("pc.ram")])).close()
        rigged.wait(Fact.LINK_LOST, round_no=2)
        rigged.connect(b"\x08\xff\xff\xff\xff")
        rigged.wait(Fact.LINK_LOST, round_no=3)
        last = rigged.connect(ALL_BITMAPS + rest_of_postcopy())
        assert last.hear(Shut) == Shut(0)
        last.close()
        rigged.wait(Fact.ALL_SENT)
        assert rigged.incoming.error is None


def test_a_source_that_lost_the_last_word_says_the_end_again() -> None:
    with rig(hold_result=True) as rigged:
        source = rigged.connect(to_postcopy() + rest_of_postcopy())
        source.hear(PROOF)
        rigged.until(lambda: rigged.incoming.is_result_due)
        source.close()
        rigged.wait(Fact.LINK_LOST)
        again = rigged.connect(ALL_BITMAPS + join([*part(last=True), EndOfSections()]))
        rigged.incoming.give_result()
        assert again.hear(Shut) == Shut(0)


def test_a_recovery_may_come_before_the_loss_is_noticed() -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy())
        rigged.wait(Fact.PACKAGE_LOADED)
        again = rigged.connect(ALL_BITMAPS)
        again.flush()
        source.close()
        assert again.hear(BitmapEnd) == BitmapEnd()
        again.hear(ResumeAck(1))


# --- strangers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00", b"\0\0\0\0", b"\0" * 64, b"QEVM\0\0\0\3", b"\x08\0\x0a\0\x07",
     bytes.fromhex("1122334400000001") + b"\xee" * 56, b"\x11\x22\x33\x44", b""],
)  # fmt: skip
def test_a_stranger_changes_nothing(word: bytes) -> None:
    stream = join(precopy())
    with rig() as rigged:
        source = rigged.connect(stream[:1000])
        rigged.wait(Fact.HEADER_SEEN)
        stranger = rigged.connect(word)
        stranger.close()
        source.send(stream[1000:])
        assert source.hear(Shut) == Shut(0)
        source.close()
        rigged.wait(Fact.ALL_SENT)
        assert rigged.stop().error is None


def test_many_silent_strangers_leave_room_for_the_source() -> None:
    with rig() as rigged:
        for _ in range(3 * limits.ENGINE_CONNECTIONS_MAX):
            rigged.connect()
        assert rigged.connect(join(precopy())).hear(Shut) == Shut(0)


def test_a_stranger_with_garbage_on_what_may_be_the_preempt_channel_is_dropped() -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy())
        rigged.wait(Fact.PACKAGE_LOADED)
        stranger = rigged.connect(b"\0" * 8 + b"\xff" * 100)
        assert stranger.listen_to_end() == []
        preempt = rigged.connect(join([pages([9])]))
        source.send(rest_of_postcopy())
        assert source.hear(Shut) == Shut(0)
        preempt.close()
        assert rigged.incoming.error is None


def test_two_main_channels_are_one_too_many() -> None:
    with rig() as rigged:
        source = rigged.connect(join(opening()))
        rigged.wait(Fact.SETUP_DONE)
        assert rigged.connect(join(precopy())).listen_to_end() == []
        source.send(join(precopy())[len(join(opening())) :])
        assert source.hear(Shut) == Shut(0)


# --- side channels ------------------------------------------------------------------------------------------


def broken_multifd() -> bytes:
    return join([MultifdInit(0)]) + b"\x99" * 2000


@pytest.mark.proves("S87")
def test_garbage_of_a_multifd_channel_fails_a_precopy_and_says_why() -> None:
    with rig(channels=1) as rigged:
        source = rigged.connect(join(opening()))
        rigged.connect(broken_multifd())
        rigged.wait(Fact.ERROR)
        assert "multifd" in str(rigged.incoming.error)
        source.listen_to_end()


def test_a_multifd_channel_that_ends_before_its_barrier_fails_a_precopy() -> None:
    with rig(channels=1) as rigged:
        source = rigged.connect(join(opening()))
        rigged.connect(join([MultifdInit(0)])).close()
        assert source.hear(Shut) == Shut(1)
        rigged.wait(Fact.ERROR)


def test_in_postcopy_a_multifd_channel_means_nothing_any_more() -> None:
    with rig(channels=1) as rigged:
        source = rigged.connect(to_postcopy())
        channel = rigged.connect(join([MultifdInit(0), *multifd()[1:]]))
        rigged.wait(Fact.PACKAGE_LOADED)
        channel.send(b"\x99" * 2000)
        channel.listen_to_end()
        source.send(rest_of_postcopy())
        assert source.hear(Shut) == Shut(0)
        source.close()
        rigged.wait(Fact.ALL_SENT)
        assert rigged.incoming.error is None


@pytest.mark.parametrize("end", ["cut", "stop", "close"])
def test_a_main_channel_that_waits_for_channels_that_never_come_can_be_ended(end: str) -> None:
    with rig(channels=2, stragglers_s=0.05) as rigged:
        source = rigged.connect(join(opening()))
        rigged.wait(Fact.SETUP_DONE)
        match end:
            case "cut":
                rigged.incoming.cut()
            case "close":
                source.close()
            case _:
                assert rigged.stop().status is S.FAILED
        rigged.wait(Fact.ERROR)


@pytest.mark.conforms("26")
@pytest.mark.proves("S88")
def test_the_last_pages_may_come_on_the_preempt_channel_after_the_stream() -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy() + rest_of_postcopy(first=2))
        rigged.wait(Fact.PACKAGE_LOADED)
        rigged.until(lambda: rigged.image.owed_pages() == 2)
        preempt = rigged.connect(join([pages([0])]))
        preempt.send(join([pages([1])]))
        assert source.hear(Shut) == Shut(0)
        assert rigged.numbers() == list(range(64))


@pytest.mark.parametrize("hold", [True, False])
def test_garbage_of_a_proved_preempt_channel(hold: bool) -> None:
    """Before the commit the migration fails, after it both sides pause: requested pages may be lost with it."""
    with rig(hold_proof=hold) as rigged:
        source = rigged.connect(to_postcopy())
        rigged.wait(Fact.LOADED if hold else Fact.PACKAGE_LOADED)
        rigged.connect(join([pages([9])]) + b"\xff" * 100)
        rigged.wait(Fact.ERROR if hold else Fact.LINK_LOST)
        assert (Shut(1) in source.listen_to_end()) is hold
        assert "preempt" in str(rigged.incoming.error)


def test_preempt_in_a_recovery_takes_the_place_of_the_one_before() -> None:
    with rig() as rigged:
        source = rigged.connect(to_postcopy())
        rigged.wait(Fact.PACKAGE_LOADED)
        rigged.connect(join([pages([9])]))
        rigged.until(lambda: bool(rigged.image.blocks["pc.ram"].have[9]))
        source.close()  # the preempt channel's far end stays open: a half of the path is dead
        rigged.wait(Fact.LINK_LOST)
        again = rigged.connect(ALL_BITMAPS)
        preempt = rigged.connect(join([pages([10])]))
        again.send(rest_of_postcopy(first=11) + b"")
        again.hear(ResumeAck(1))
        preempt.send(join([pages(range(9))]))
        assert again.hear(Shut) == Shut(0)


# --- stops, stalls, bounds ----------------------------------------------------------------------------------


@pytest.mark.proves("S12", "S65")
@pytest.mark.parametrize("bytes_sent", [0, 3, 8, 100, 600, 5000, 100_000])
def test_a_stalled_source_never_holds_the_owner(bytes_sent: int) -> None:
    with rig(hold_result=True) as rigged:
        source = rigged.connect(join(precopy())[:bytes_sent])
        source.flush()
        began_s = time.monotonic()
        rigged.incoming.counters()
        rigged.incoming.outcome()
        rigged.incoming.give_proof()
        rigged.incoming.cut()
        assert time.monotonic() - began_s < 0.1
        outcome = rigged.stop()
        assert time.monotonic() - began_s < 2
        assert outcome.status is S.FAILED
        rigged.incoming.give_result()  # orders after the end are taken, and mean nothing
        assert rigged.incoming.stop().status is S.FAILED


def test_a_source_that_does_not_listen_is_not_read_for_ever() -> None:
    with rig() as rigged:
        source = rigged.connect(join(opening()))
        rigged.wait(Fact.SETUP_DONE)
        pings = join([Ping(7)]) * 400_000
        source.send(pings)
        before = rigged.incoming.counters().bytes
        for _ in range(20):
            rigged.incoming.ledger.wait(Fact.ALL_SENT, timeout_s=0.02)
        assert rigged.incoming.counters().bytes - before < len(pings) // 2
        source.sock.shutdown(socket.SHUT_RDWR)
        assert rigged.stop().status is S.FAILED


def test_more_requests_than_are_kept_are_all_made() -> None:
    with rig() as rigged:
        ram_pages = 64
        source = rigged.connect(join(opening(advise=True)))
        rigged.wait(Fact.SETUP_DONE)
        for index in range(2 * limits.ENGINE_REQUESTS_MAX):
            rigged.incoming.request(rigged.image.blocks["pc.ram"], index % ram_pages)
        assert len(rigged.incoming._shared.wants) <= limits.ENGINE_REQUESTS_MAX
        source.send(to_postcopy()[len(join(opening(advise=True))) :])
        assert source.hear(RequestPages) == RequestPages(0, ram_pages * SIZE, "pc.ram")


def test_a_guest_that_is_too_large_is_refused_before_memory_is_taken() -> None:
    with rig(guest_bytes_max=BLOCK.used_length) as rigged:
        source = rigged.connect(join(opening()))
        assert source.hear(Shut) == Shut(1)
        rigged.wait(Fact.ERROR)
        assert "guest-size" in repr(rigged.incoming.error) or "memory" in str(rigged.incoming.error)


def test_an_endpoint_that_stops_before_anybody_came_has_failed() -> None:
    with rig() as rigged:
        assert rigged.stop().status is S.FAILED
        assert rigged.incoming.stop().threads_left == ()


# --- listeners and TLS --------------------------------------------------------------------------------------


def test_a_listener_serves_and_is_closed_at_the_end(tmp_path: Path) -> None:
    with rig() as rigged:
        listener, _ = unix_listener(tmp_path / "socket")
        rigged.incoming.listen(listener)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "socket"))
            source = Source(sock)
            source.send(join(precopy()))
            assert source.hear(Shut) == Shut(0)
        rigged.wait(Fact.ALL_SENT)
        rigged.stop()
        with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
            sock.connect(str(tmp_path / "socket"))


def test_a_connection_after_the_stop_is_closed() -> None:
    with rig() as rigged:
        rigged.stop()
        assert rigged.connect(join(precopy())).listen_to_end() == []


@pytest.mark.conforms("27")
@pytest.mark.parametrize("goodbye", [True, False])
def test_tls_on_every_channel_with_and_without_goodbye(tmp_path: Path, goodbye: bool) -> None:
    tls = TlsPair(tmp_path)
    image, near, far = Image(), *socket.socketpair()
    incoming = Incoming(image, options=Rig(tls=tls.server()).incoming.options)
    incoming.take(near)
    with tls.client().wrap_socket(far, server_hostname=tls.hostname) as client:
        client.settimeout(WAIT_S)
        client.sendall(join(precopy()))
        heard = b""
        while len(heard) < 16:
            heard += client.recv(100)
        assert heard == join([Pong(1), Shut(0)])
        if goodbye:
            with contextlib.suppress(OSError):
                client.unwrap()
    assert incoming.ledger.wait(Fact.ALL_SENT, Fact.ERROR, timeout_s=WAIT_S) is Fact.ALL_SENT
    assert incoming.stop().threads_left == ()
    image.close()


@pytest.mark.parametrize("what", ["silence", "plain text", "no certificate"])
def test_who_fails_the_handshake_is_a_stranger(tmp_path: Path, what: str) -> None:
    with rig(tls=TlsPair(tmp_path).server(), handshake_s=0.1) as rigged:
        source = rigged.connect(join(precopy()) if what == "plain text" else b"")
        if what == "no certificate":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            source.sock.settimeout(WAIT_S)
            with contextlib.suppress(OSError), context.wrap_socket(source.sock) as client:
                client.sendall(join(precopy()))
                client.recv(1)
        else:
            with contextlib.suppress(Exception):
                source.listen_to_end()
        assert Fact.HEADER_SEEN not in rigged.incoming.ledger.log
        assert rigged.stop().status is S.FAILED
