"""What conversations with an outgoing endpoint have in common: see `vmferry.testing.scripted_destination`."""

from __future__ import annotations

from collections.abc import Callable

from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus as S
from vmferry.engine.image import PAGE_BYTES
from vmferry.engine.outgoing import Outgoing, OutgoingOutcome
from vmferry.engine.sender import OutgoingOptions
from vmferry.testing.scripted_destination import PROOF_PING, WAIT_S, ScriptedDestination
from vmferry.wire.events import (
    Event,
    PackageEnd,
    Ping,
    Pong,
    Shut,
)

BLOCKS = {"pc.ram": 90, "pc.rom": 4}
OLD, NEW = "pc-i440fx-7.2", "pc-i440fx-11.1"
AT_ONCE = OutgoingOptions(postcopy="at-once")
Start = Callable[..., Outgoing]


def failed(outgoing: Outgoing) -> OutgoingOutcome:
    """It ends before the commit: the image is the guest's home."""
    assert outgoing.ledger.wait(Fact.CLEANUP, timeout_s=WAIT_S)
    outcome = outgoing.outcome()
    assert outcome.status is S.FAILED
    assert outcome.error is not None
    assert Fact.LINK_LOST not in outgoing.ledger.log
    return outcome


def paused(outgoing: Outgoing, round_no: int = 1) -> OutgoingOutcome:
    """It ends after the commit: the destination's guest is the only one, and waits."""
    assert outgoing.ledger.wait(Fact.LINK_LOST, timeout_s=WAIT_S, round_no=round_no)
    assert outgoing.outcome().status is S.POSTCOPY_PAUSED
    assert Fact.ERROR not in outgoing.ledger.log
    return outgoing.outcome()


def complete(peer: ScriptedDestination, outgoing: Outgoing) -> None:
    assert peer.differing_pages(outgoing.image) == 0
    assert Fact.PEER_ACK not in outgoing.ledger.log
    peer.say(Shut(0))
    assert outgoing.ledger.wait(Fact.PEER_ACK, timeout_s=WAIT_S)
    assert outgoing.outcome().status is not S.COMPLETED
    outgoing.saw_running()
    assert outgoing.outcome().status is S.COMPLETED


def switch_over(peer: ScriptedDestination) -> None:
    """Up to the proof."""
    peer.read_until(Ping(1))
    peer.say(Pong(1))
    peer.read_until(PackageEnd)
    peer.say(Pong(3), Pong(PROOF_PING))


def kinds(peer: ScriptedDestination) -> list[type]:
    return [type(event) for event in peer.events]


class OrderOfPages:
    """The pages of pc.ram in the order in which they came."""

    def __init__(self, peer: ScriptedDestination) -> None:
        self.found: list[tuple[str, int]] = []
        take = peer.take

        def noting(event: Event) -> None:
            offsets = getattr(event, "offsets", None)
            if offsets is not None:
                self.found += [(event.block.name, int(each) // PAGE_BYTES) for each in offsets]  # type: ignore[union-attr]
            take(event)

        peer.take = noting  # type: ignore[method-assign]

    def check(self, unit: int) -> None:
        rows = [self.found[at : at + unit] for at, (name, page) in enumerate(self.found)
                if name == "pc.ram" and page % unit == 0]  # fmt: skip
        assert len(rows) == 4
        for row in rows:
            first = row[0][1]
            assert row == [("pc.ram", first + each) for each in range(unit)]
