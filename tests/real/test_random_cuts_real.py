"""Connections cut at random points, with real QEMUs of both generations at the other end of either endpoint.

Whatever the cut, there is one guest afterwards, and it lacks nothing. Each seed is a test of its own; the long form
draws new ones:

    VMFERRY_CUTS_SEED=7 pytest tests/real/test_random_cuts_real.py            from this seed on, instead of from 0
    VMFERRY_CUTS_HOURS=2 pytest -m deep tests/real/test_random_cuts_real.py   new seeds, for so long in each role
    VMFERRY_CUTS=500 pytest -m deep tests/real/test_random_cuts_real.py       so many new ones
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from tests.random_cuts import RAM_MIB, TOUCH_MIB, Network, Plan, draw, network, told
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.image import Image
from vmferry.engine.incoming import Incoming
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.engine.shared import IncomingOptions
from vmferry.engine.stand_in import StandInReceiver
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout
from vmferry.testing.bootsector import count_passes
from vmferry.testing.hosts import OLDEST
from vmferry.testing.stream_peers import QemuPeer, low_ram, unix_listener

pytestmark = pytest.mark.real

WAIT_S: Final = 30.0
STUCK_S: Final = 2.0
FIRST_SEED: Final = int(os.environ.get("VMFERRY_CUTS_SEED", "0"))
SEEDS: Final = range(FIRST_SEED, FIRST_SEED + 20)
GUEST: Final[dict[str, Any]] = {"ram_mib": RAM_MIB, "touch_mib": TOUCH_MIB, "delay_loops": 500}
SOURCE_ENDS: Final = ("failed", "cancelled", "completed", "postcopy-paused")
INCOMING_FACTS: Final = (Fact.HEADER_SEEN, Fact.SETUP_DONE, Fact.LOADED, Fact.PACKAGE_SENT, Fact.PACKAGE_LOADED)
OUTGOING_FACTS: Final = (Fact.SETUP_DONE, Fact.SWITCHOVER, Fact.PACKAGE_SENT, Fact.PACKAGE_LOADED)
INCOMING_ENDS: Final = (Fact.ERROR, Fact.LINK_LOST, Fact.ALL_SENT)
OUTGOING_ENDS: Final = (Fact.ERROR, Fact.LINK_LOST, Fact.PEER_ACK)
ASKS_FOR_PROOF: Final = (10, 2)
"""From this QEMU on a source waits for a proof before it lets go of its guest, and even then only for as long as pages
are missing: when the connection breaks between its last page and the final word it takes it back."""


def capabilities(plan: Plan) -> list[str]:
    """What both sides must have on."""
    return {
        "precopy": [],
        "multifd": ["multifd"],
        "postcopy": ["postcopy-ram"],
        "preempt": ["postcopy-ram", "postcopy-preempt"],
    }[plan.mode]


def set_up(peer: QemuPeer, plan: Plan) -> None:
    channels = {"multifd_channels": plan.channels} if plan.channels else {}
    peer.set_up(*capabilities(plan), **channels)


# --- a QEMU that migrates into an endpoint ------------------------------------------------------------------------


class Arrival:
    """One guest on its way into the endpoint, and what has become of it."""

    def __init__(self, plan: Plan, source: QemuPeer, incoming: Incoming, net: Network) -> None:
        self.plan, self.source, self.incoming, self.net = plan, source, incoming, net
        self.image = incoming.image
        if plan.is_held:
            incoming.ledger.listen(self._on_fact)

    def _on_fact(self, fact: Fact) -> None:
        """The owner: it has stored what came, and gives its words."""
        if fact is Fact.LOADED:
            self.incoming.give_proof()
            self.incoming.give_result()

    @property
    def log(self) -> set[Fact]:
        return {each.fact for each in self.incoming.ledger.log}

    @property
    def is_committed(self) -> bool:
        """Whether this side takes the guest for its own."""
        return bool(self.log & {Fact.PACKAGE_LOADED, Fact.PEER_ACK, Fact.ALL_SENT})

    def begin(self) -> None:
        """Until the cut, or until there is nothing left to cut."""
        set_up(self.source, self.plan)
        if self.plan.bytes_per_s and self.plan.is_postcopy:  # a precopy might never end
            # By itself: a network that is slow takes all pages from it soon, and the cut would not meet any.
            limits = dict.fromkeys(("max-bandwidth", "max-postcopy-bandwidth"), self.plan.bytes_per_s)
            self.source.execute("migrate-set-parameters", limits)
        self.source.migrate(f"unix:{self.net.address}")
        if self.plan.is_postcopy:
            self.source.until(lambda: Fact.SETUP_DONE in self.log or self._has_ended(), "block list", WAIT_S)
            try:
                self.source.execute("migrate-start-postcopy")
            except QmpCommandError:
                self.source.until_status(*SOURCE_ENDS)  # it was cut before, and only that is an excuse
            self._ask(random.Random(self.plan.seed))
        if Fact.SETUP_DONE in self.log or not self._has_ended():
            self.net.cut_at_its_moment(self.incoming.ledger, self.incoming.cut, INCOMING_ENDS)
        self._settle()

    def _has_ended(self) -> bool:
        return self.source.status in SOURCE_ENDS

    def _ask(self, rng: random.Random) -> None:
        ram = self.image.blocks.get("pc.ram")
        for _ in range(8 if ram is not None else 0):
            assert ram is not None
            self.incoming.request(ram, rng.randrange(ram.count))

    def _settle(self) -> None:
        if self.plan.mode == "preempt" and self.source.number > (8, 0):
            self._lead_out()
        ledger = self.incoming.ledger
        if ledger.wait(Fact.HEADER_SEEN, timeout_s=0.5) is None:
            self.source.until_status(*SOURCE_ENDS)
            return  # cut before the first word: nobody ever came
        end = ledger.wait(*INCOMING_ENDS, timeout_s=WAIT_S)
        assert end, (self.log, self.source.status)
        if end is Fact.LINK_LOST and self.source.number < ASKS_FOR_PROOF and self.image.has_all_pages:
            with contextlib.suppress(AssertionError):
                self.source.until_status(*SOURCE_ENDS, timeout_s=STUCK_S)
            return  # or it is stuck: `judge` looks
        self.source.until_status(*SOURCE_ENDS)

    def _lead_out(self) -> None:
        """A source that waits for the first pong, with which it opens the preempt channel, does not notice a cut."""
        is_stuck = False

        def is_settled() -> bool:
            nonlocal is_stuck
            found = self.source.execute("query-migrate")
            is_stuck = found.get("status") == "active" and "error-desc" in found
            return is_stuck or found.get("status") in SOURCE_ENDS

        self.source.until(is_settled, "end", WAIT_S)
        if is_stuck:
            assert self.source.runstate in ("running", "finish-migrate")
            self.source.execute("migrate_cancel")

    def judge(self) -> str:
        """Exactly one guest, which lacks nothing. Returns a word for what had to be done for it."""
        status, mine = self.source.status, self.incoming.outcome().status
        if status in ("failed", "cancelled"):
            return self._source_has_it()
        if status == "completed":
            assert mine is S.COMPLETED, (mine, self.incoming.error)
            return self._image_is_whole("moved")
        if status == "postcopy-active":
            # It sent its last page and waits for the result for ever; nothing leads it out, and nobody runs it there.
            assert self.source.number < ASKS_FOR_PROOF
            assert self.source.runstate != "running"
            return self._image_is_whole("moved, and the source is stuck")
        if mine is S.COMPLETED:  # in postcopy-paused nobody runs it there
            assert self.net.has_swallowed_the_result
            return self._image_is_whole("moved, and the source does not know")
        if mine is S.POSTCOPY_PAUSED:
            return self._recover()
        assert not self.is_committed
        return self._bring_back()

    def _source_has_it(self) -> str:
        self.source.until_runstate("running")
        assert self.source.is_alive()
        if not self.is_committed:
            return "the source has it"
        # The endpoint's last word was lost, or was not heard in time. It cannot know; its owner can, who does not run
        # the image before the source has said that it is over: `completed`, or with an older one postcopy.
        said = set(self.source.statuses())
        assert "completed" not in said, f"two guests: {self.log}"
        if not self.plan.is_postcopy:
            assert self.net.has_swallowed_the_result, f"two guests: {self.log}"
            return "the source has it, and the endpoint's result was lost"
        assert self.source.number >= ASKS_FOR_PROOF, f"two guests: {said}, {self.log}"
        return "the source has it, and the endpoint's word came too late"

    def _image_is_whole(self, word: str) -> str:
        assert self.source.runstate != "running"
        assert self.image.has_all_pages
        assert self.image.is_device_state_whole
        assert self.source.differing_pages(self.image, low_ram(self.source.ram_bytes)) == []
        return word

    def _recover(self) -> str:
        assert self.source.runstate != "running"
        self.net.heal()
        self.source.migrate(f"unix:{self.net.address}", resume=True)
        found = self.incoming.ledger.wait(Fact.ALL_SENT, Fact.ERROR, timeout_s=WAIT_S)
        assert found is Fact.ALL_SENT, (self.log, self.incoming.error)
        self.source.until_status("completed")
        return self._image_is_whole("recovered")

    def _bring_back(self) -> str:
        """An older source lets go with the package, and this one never had it: it has its guest, and is stuck."""
        assert self.source.number < ASKS_FOR_PROOF
        assert self.source.runstate != "running"
        blocks = {each.name: each.wire.used_length for each in self.image}
        listener, uri = unix_listener(self.source.folder / "rescue")
        with listener:
            self.source.migrate(uri, resume=True)
            stand_in = StandInReceiver(listener.accept()[0], blocks)
        stand_in.start()
        try:
            self.source.until_status("completed")
        finally:
            assert stand_in.stop().thread_left == ""
        self.source.execute("cont")
        assert self.source.is_alive()
        return "brought back"


def arrive(seed: int) -> str:
    """One guest, one cut."""
    plan = draw("incoming", seed, INCOMING_FACTS)
    with told(plan), QemuPeer(plan.source, **GUEST) as source:
        image = Image()
        incoming = Incoming(image, options=IncomingOptions(plan.channels, hold_proof=plan.is_held,
                                                           hold_result=plan.is_held))  # fmt: skip
        listener, _ = unix_listener(source.folder / "in")
        incoming.listen(listener)
        try:
            with network(plan, source.folder, str(source.folder / "in")) as net:
                arrival = Arrival(plan, source, incoming, net)
                arrival.begin()
                word = arrival.judge()
        finally:
            left = incoming.stop().threads_left
            image.close()
        assert left == ()
    print(word)
    return word


@pytest.mark.conforms("47")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_source_that_is_cut_off_from_the_endpoint(seed: int) -> None:
    arrive(seed)


# --- an endpoint that migrates into a QEMU ------------------------------------------------------------------------


class Stock:
    """Guests that were stopped and kept, one of each generation and machine type, to be sent again and again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[Image, bytes]] = {}

    def take(self, source: str, machine: str) -> tuple[Image, bytes]:
        """The image, of which nothing is sent yet, and what its guest had written."""
        key = source, machine
        if key not in self._kept:
            self._kept[key] = self._capture(source, machine)
        image, letters = self._kept[key]
        unsend(image)
        return image, letters

    def close(self) -> None:
        for image, _ in self._kept.values():
            image.close()

    @staticmethod
    def _capture(source: str, machine: str) -> tuple[Image, bytes]:
        image = Image()
        incoming = Incoming(image)
        with QemuPeer(source, machine=machine, **GUEST) as peer:
            listener, uri = unix_listener(peer.folder / "out")
            incoming.listen(listener)
            peer.set_up()
            peer.migrate(uri)
            found = incoming.ledger.wait(Fact.ALL_SENT, Fact.ERROR, timeout_s=WAIT_S)
            assert incoming.stop().threads_left == ()
            assert found is Fact.ALL_SENT, incoming.error
            peer.until_runstate("postmigrate")
            return image, (peer.folder / "serial").read_bytes()


def unsend(image: Image) -> None:
    """As if nothing of it had left yet."""
    image.is_device_state_whole = True
    for block in image:
        block.sent[:] = False
        block.dirty[:] = True


@pytest.fixture(scope="module")
def stock() -> Iterator[Stock]:
    kept = Stock()
    yield kept
    kept.close()


def connect(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


@contextmanager
def destination(plan: Plan, machine: str) -> Iterator[QemuPeer]:
    """A QEMU that waits for the guest, and does not start it by itself."""
    with QemuPeer(plan.there, machine=machine, incoming=True, more=["-S"], **GUEST) as peer:
        set_up(peer, plan)
        peer.migrate_incoming(f"unix:{peer.folder}/in")
        yield peer


class Departure:
    """One image on its way to a QEMU, and what has become of it."""

    def __init__(self, plan: Plan, peer: QemuPeer, kept: tuple[Image, bytes], postcopy: Any) -> None:
        self.plan, self.peer = plan, peer
        self.image, self._letters = kept
        options = OutgoingOptions(postcopy, plan.mode == "preempt", plan.channels)
        self.outgoing = Outgoing(self.image, options=options)
        self._is_continued = False

    @property
    def log(self) -> set[Fact]:
        return {each.fact for each in self.outgoing.ledger.log}

    def begin(self, net: Network) -> None:
        """Until the cut, or until there is nothing left to cut."""
        ledger = self.outgoing.ledger
        is_on_order = self.outgoing.options.postcopy == "on-order"
        self.image.is_device_state_whole = not is_on_order  # so that it is a postcopy for sure
        self.outgoing.start(lambda: connect(net.address))
        if is_on_order and ledger.wait(Fact.SETUP_DONE, Fact.ERROR, timeout_s=WAIT_S) is Fact.SETUP_DONE:
            self.outgoing.start_postcopy()
            self.image.is_device_state_whole = True
            self.image.announce_pages()
        if self.plan.is_postcopy and self.plan.is_held:
            proof = ledger.wait(Fact.PACKAGE_LOADED, Fact.ERROR, timeout_s=WAIT_S)
            if proof is Fact.PACKAGE_LOADED:
                self._cont()
        net.cut_at_its_moment(ledger, self.outgoing.cut, OUTGOING_ENDS)
        if self.plan.way == "channel" and ledger.wait(*OUTGOING_ENDS, timeout_s=STUCK_S) is None:
            # The destination waits for what this channel lost in the network, and says nothing: the owner gives up.
            self.outgoing.cut()
        assert ledger.wait(*OUTGOING_ENDS, timeout_s=WAIT_S), self.log
        self.image.is_device_state_whole = True

    def _cont(self) -> None:
        self._is_continued = True
        self.peer.execute("cont")

    def judge(self, net: Network) -> str:
        """Exactly one guest, which lacks nothing. Returns a word for what had to be done for it, "" = send it again."""
        if Fact.PEER_ACK in self.log:
            return self._goes_on("moved")
        if Fact.LINK_LOST in self.log:
            assert Fact.PACKAGE_LOADED in self.log
            assert self.outgoing.outcome().status is S.POSTCOPY_PAUSED
            if self.peer.until_status("postcopy-paused", "completed") == "completed":
                # The result was lost in the network, or lay unread before this side when it was cut.
                assert net.has_swallowed_the_result or self.plan.way == "owner"
                return self._goes_on("moved, and the endpoint does not know")
            return self._recover()
        assert self.outgoing.outcome().status is S.FAILED
        assert not self.log & {Fact.PACKAGE_LOADED, Fact.PEER_ACK}
        assert not self._is_continued
        assert self.image.has_all_pages
        assert self.never_ran()
        return ""

    def never_ran(self) -> bool:
        """Nobody told it to, so it is somewhere before, or gone."""
        try:
            state = self.peer.execute("query-status", deadline_s=STUCK_S)["status"]
        except QmpDisconnected:
            return True
        except QmpTimeout:
            # Its main thread waits for ever, for a page or a channel of the migration that broke: its owner ends it.
            state = "inmigrate"
        assert state in ("paused", "inmigrate", "prelaunch", "internal-error", "shutdown"), state
        return not (self.peer.folder / "serial").exists() or not (self.peer.folder / "serial").read_bytes()

    def _recover(self) -> str:
        path = self.peer.folder / "again"
        self.peer.execute("migrate-recover", {"uri": f"unix:{path}"})
        self.outgoing.recover(lambda: connect(str(path)))
        found = self.outgoing.ledger.wait(Fact.PEER_ACK, Fact.ERROR, timeout_s=WAIT_S)
        assert found is Fact.PEER_ACK, (self.log, self.outgoing.error, self.peer._brief())
        return self._goes_on("recovered")

    def _goes_on(self, word: str) -> str:
        """It completes, has every page, and the guest writes the next letter, and the one after it."""
        self.peer.until_status("completed")
        if not self._is_continued:
            assert self.peer.until_runstate("paused") == "paused"
            assert self.peer.differing_pages(self.image, low_ram(self.peer.ram_bytes)) == []
            self._cont()
        serial = self.peer.folder / "serial"
        wanted = count_passes(self._letters) + 2
        self.peer.until(lambda: count_passes(self._letters + serial.read_bytes()) >= wanted, f"{wanted} passes", WAIT_S)
        return word


def depart(seed: int, stock: Stock) -> str:
    """One image, one cut."""
    plan = draw("outgoing", seed, OUTGOING_FACTS)
    machine = "pc-i440fx-7.2" if OLDEST in (plan.source, plan.there) else "pc"
    kept = stock.take(plan.source, machine)
    rng = random.Random(plan.seed)
    postcopy = rng.choice(("at-once", "on-order")) if plan.is_postcopy else "never"
    with told(plan):
        with (
            destination(plan, machine) as peer,
            network(plan, peer.folder, str(peer.folder / "in"), throttles=True) as net,
        ):
            word = send(Departure(plan, peer, kept, postcopy), net)
        if not word:
            unsend(kept[0])
            with destination(plan, machine) as again:
                word = send_unharmed(Departure(plan, again, kept, postcopy))
    print(word)
    return word


def send(departure: Departure, net: Network) -> str:
    try:
        departure.begin(net)
        return departure.judge(net)
    finally:
        assert departure.outgoing.stop().threads_left == ()


def send_unharmed(departure: Departure) -> str:
    """What is left after a failure is as good as it was."""
    try:
        departure.outgoing.start(lambda: connect(str(departure.peer.folder / "in")))
        if departure.outgoing.options.postcopy == "on-order":
            departure.outgoing.start_postcopy()
        found = departure.outgoing.ledger.wait(Fact.PEER_ACK, Fact.ERROR, timeout_s=WAIT_S)
        assert found is Fact.PEER_ACK, departure.outgoing.error
        return departure._goes_on("sent again")
    finally:
        assert departure.outgoing.stop().threads_left == ()


@pytest.mark.conforms("47")
@pytest.mark.proves("S26")
@pytest.mark.parametrize("seed", SEEDS)
def test_an_endpoint_that_is_cut_off_from_its_destination(seed: int, stock: Stock) -> None:
    depart(seed, stock)


# --- for long -----------------------------------------------------------------------------------------------------


@pytest.mark.conforms("47")
@pytest.mark.deep
@pytest.mark.timeout(0)
@pytest.mark.parametrize("role", ["incoming", "outgoing"])
def test_cuts_for_long(role: str, stock: Stock) -> None:
    """Every way that a guest can go is gone, each seed new and printed."""
    seed = FIRST_SEED or random.SystemRandom().randrange(1 << 40)
    hours, count = float(os.environ.get("VMFERRY_CUTS_HOURS", "0")), int(os.environ.get("VMFERRY_CUTS", "200"))
    until_s = time.monotonic() + hours * 3600
    go: Callable[[int], str] = arrive if role == "incoming" else lambda each: depart(each, stock)
    words: dict[str, int] = {}
    done = 0
    while time.monotonic() < until_s if hours else done < count:
        word = go(seed + done)
        words[word] = words.get(word, 0) + 1
        done += 1
    print(words)
    assert words.keys() - {"moved"}, "cuts that change nothing prove nothing"
