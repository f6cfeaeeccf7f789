"""Recorded streams of real QEMUs through an incoming endpoint, over real sockets: the image is what the oracle says."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from tests.golden.test_samples import EXPECTED, channels
from tests.incoming_peer import Rig, Source, rig
from vmferry.core.facts import Fact
from vmferry.core.migration_status import MigrationStatus
from vmferry.engine.incoming import IncomingOutcome
from vmferry.wire.events import Pong, RequestPages, ResumeAck, Shut, SwitchoverAck

NAMES = sorted(each for each in EXPECTED if each.endswith(".rec.xz"))
RECOVERIES = [each for each in NAMES if each.endswith("-r.rec.xz")]
CUT = [each.replace("-r.rec.xz", ".rec.xz") for each in RECOVERIES]
REFUSED = ["ignore-shared-q111-m111.rec.xz", "nofooter-noconfig-q72-pc22.rec.xz"]
WHOLE = [each for each in NAMES if each not in RECOVERIES + CUT + REFUSED]


def options_of(name: str) -> dict[str, Any]:
    """How the endpoint has to be set up."""
    return {
        "channels": len(EXPECTED[name].get("multifd") or ()),
        "compress": name.startswith("compress"),
        "ack_switchover": name.startswith("switchover-ack"),
        "end": "end-of-input" if name.startswith(("suppress-vmdesc", "nofooter")) else "description",
    }


def play(rigged: Rig, name: str, *, main_last: bool = False) -> Source:
    """All connections of a recording at once; the main one."""
    data = {key[:-1]: value for key, value in channels(name).items() if key.endswith(">")}
    order = sorted(data, reverse=main_last)
    sources = {key: rigged.connect(data[key]) for key in order}
    return sources["0"]


def finish(rigged: Rig, name: str, source: Source) -> IncomingOutcome:
    """To the end of the stream, as a source ends it."""
    if not channels(name).get("0<") or name.startswith("suppress-vmdesc"):
        source.flush()
        source.sock.shutdown(1)
    else:
        assert source.hear(Shut) == Shut(0)
        source.sock.close()
    rigged.wait(Fact.ALL_SENT, Fact.ERROR)
    assert rigged.incoming.error is None
    outcome = rigged.stop()
    assert outcome.status is MigrationStatus.COMPLETED
    return outcome


def check_image(rigged: Rig, name: str) -> None:
    want, image = EXPECTED[name], rigged.image
    assert [[each.name, each.wire.used_length] for each in image] == want["blocks"]
    assert image.has_all_pages
    found = {each.name: hashlib.sha256(each.pages.tobytes()).hexdigest() for each in image}
    assert found == want["ram_sha256"]
    sections = [*image.early, *image.devices]
    assert sorted([each.idstr, each.instance, len(each.body)] for each in sections) == sorted(want["devices"])
    if want["config"]:
        assert image.configuration is not None
        assert f"machine=b'{image.machine}'" in want["config"]
    assert (image.description is not None) == bool(want["vmdesc"])


@pytest.mark.conforms("3", "6", "7", "8", "9", "14", "23", "24", "26")
@pytest.mark.proves("S2", "S65")
@pytest.mark.parametrize("name", [each for each in WHOLE if not each.startswith("suppress")])
def test_a_recorded_stream_fills_the_image(name: str) -> None:
    with rig(**options_of(name)) as rigged:
        source = play(rigged, name)
        outcome = finish(rigged, name, source)
        check_image(rigged, name)
        want = EXPECTED[name]
        multifd = (want.get("multifd") or {}).values()
        pages = want["ram"]["normal"] + want["ram"]["xbzrle"] + want["ram"]["zlibpage"]
        sides = want.get("preempt_pages", 0)
        both = pages + want["ram"]["zero"] + sides + sum(each["normal"] + each["zero"] for each in multifd)
        assert outcome.counters.pages + outcome.counters.zero_pages == both
        assert outcome.counters.repeated_pages == 0
        pongs = [each for each in source.heard if isinstance(each, Pong)]
        assert {f"PING {each.value:#x}" for each in pongs} == {c for c in want["commands"] if c.startswith("PING")}


@pytest.mark.conforms("25")
@pytest.mark.parametrize("name", [each for each in WHOLE if each.startswith("multifd")])
def test_the_channels_of_multifd_may_come_before_the_main_one_and_in_any_order(name: str) -> None:
    with rig(**options_of(name)) as rigged:
        finish(rigged, name, play(rigged, name, main_last=True))
        check_image(rigged, name)


@pytest.mark.conforms("28")
@pytest.mark.parametrize("name", ["switchover-ack-q111-m72.rec.xz"])
def test_the_switchover_is_acknowledged_before_the_first_pong(name: str) -> None:
    with rig(**options_of(name)) as rigged:
        source = play(rigged, name)
        finish(rigged, name, source)
        assert source.heard[:2] == [SwitchoverAck(), Pong(1)]


@pytest.mark.conforms("28")
def test_a_machine_of_11_1_gets_no_switchover_ack_even_if_the_owner_wants_it() -> None:
    with rig(ack_switchover=True) as rigged:
        name = "precopy-rp-q111-m111.rec.xz"
        source = play(rigged, name)
        finish(rigged, name, source)
        assert not any(isinstance(each, SwitchoverAck) for each in source.heard)


@pytest.mark.conforms("12")
def test_a_stream_without_vmdescription_is_taken_at_its_end_if_that_is_allowed() -> None:
    name = "suppress-vmdesc-q72.rec.xz"
    with rig(**options_of(name)) as rigged:
        source = play(rigged, name)
        rigged.wait(Fact.SETUP_DONE)
        source.flush()
        source.sock.shutdown(1)
        # The source has a return path and waits for a result; closing without one means it took its guest back.
        assert rigged.wait(Fact.ERROR, Fact.ALL_SENT) is Fact.ERROR
        assert rigged.stop().status is MigrationStatus.FAILED


@pytest.mark.conforms("12")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_whole_is_refused(name: str) -> None:
    with rig(**options_of(name)) as rigged:
        source = play(rigged, name)
        if name.startswith("nofooter"):
            source.flush()
            source.sock.shutdown(1)
        assert rigged.wait(Fact.ERROR, Fact.ALL_SENT) is Fact.ERROR
        assert rigged.incoming.error is not None


@pytest.mark.conforms("22")
@pytest.mark.proves("S18")
@pytest.mark.parametrize("name", RECOVERIES)
def test_a_recorded_recovery_completes_the_image(name: str) -> None:
    with rig(end="description") as rigged:
        first = play(rigged, name.replace("-r.rec.xz", ".rec.xz"))
        rigged.wait(Fact.PACKAGE_LOADED)
        for each in rigged.sources:
            each.flush()
        block = rigged.image.blocks["pc.ram"]
        first.close()
        rigged.wait(Fact.LINK_LOST)
        assert rigged.incoming.ledger.status is MigrationStatus.POSTCOPY_PAUSED
        for each in rigged.sources:
            each.close()
        missing = int(np.flatnonzero(~block.have)[0])
        rigged.incoming.request(block, missing)
        source = play(rigged, name)
        rigged.wait(Fact.RESUME_ACK, round_no=1)
        outcome = finish(rigged, name, source)
        assert source.hear(ResumeAck) == ResumeAck(1)
        assert outcome.counters.repeated_pages == 0
        # Asked for during the pause, and said with the block's name on the new connection. A page that had come by
        # the time of the resume is not asked for.
        asked = [each for each in source.heard if isinstance(each, RequestPages)]
        assert asked in ([], [RequestPages(missing * 4096, 4096, "pc.ram")])
        assert rigged.image.owed_pages() == 0
        check_tags(rigged)


def check_tags(rigged: Rig) -> None:
    """The guest of the recordings writes the address of a page at its byte 16."""
    pages = rigged.image.blocks["pc.ram"].pages
    numbers = np.arange(256, 12 * 256)
    tagged = numbers[numbers % 4 != 3]
    found = pages[tagged, 16:20].copy().view("<u4")[:, 0]
    assert (found == tagged * 4096).all()
