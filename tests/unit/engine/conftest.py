"""An outgoing endpoint and its scripted destination."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine_conversations import BLOCKS, Start
from vmferry.engine.image import Image
from vmferry.engine.outgoing import Outgoing
from vmferry.engine.sender import OutgoingOptions
from vmferry.testing.scripted_destination import ScriptedDestination, make_image


@pytest.fixture
def peer() -> Iterator[ScriptedDestination]:
    with ScriptedDestination() as made:
        yield made


@pytest.fixture
def start(peer: ScriptedDestination) -> Iterator[Start]:
    """Starts an endpoint towards `peer` and takes its main channel; at the end nothing of it may be left."""
    made: list[Outgoing] = []

    def make(image: Image | None = None, options: OutgoingOptions | None = None, **more: Any) -> Outgoing:
        outgoing = Outgoing(image or make_image(BLOCKS), options=options, **more)
        made.append(outgoing)
        outgoing.start(peer.dial)
        peer.begin()
        return outgoing

    yield make
    for outgoing in made:
        outcome = outgoing.stop()
        assert outcome.threads_left == ()
        outgoing.image.close()
