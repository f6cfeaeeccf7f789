"""Pairs of hosts with a real agent each, guests to put on them, and the check that nothing was left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmferry.testing.hosts import OLDEST, QEMUS, Guests, MakePair, TwoAgents, run_cli
from vmferry.testing.qemus import with_second_monitor


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates for host-a and host-b, made by the command that people use."""
    folder = tmp_path_factory.mktemp("pki") / "pki"
    done = run_cli("pki", str(folder), "host-a=10.0.0.1", "host-b=10.0.0.2")
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def facts_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What agents found out about each QEMU, so that only the first agent has to ask it."""
    return tmp_path_factory.mktemp("facts")


@pytest.fixture
def make_pair(pki: Path, facts_cache: Path) -> Iterator[MakePair]:
    """`make_pair("7.2", "11.1")` gives two ready agents. At the end nothing may be left behind by the test, unless
    it says why in the pair's `may_leave`. `monitors`: a folder in which each QEMU has a second monitor."""
    yield from _pairs(pki, facts_cache)


@pytest.fixture(scope="module")
def make_module_pair(pki: Path, facts_cache: Path) -> Iterator[MakePair]:
    """The same for pairs that many tests share."""
    yield from _pairs(pki, facts_cache)


def _pairs(pki: Path, facts_cache: Path) -> Iterator[MakePair]:
    made: list[TwoAgents] = []

    def make(
        source: str = OLDEST,
        destination: str = "",
        *,
        clear_text: bool = False,
        monitors: Path | None = None,
        **more: Any,
    ) -> TwoAgents:
        programs = [QEMUS[source], QEMUS[destination or source]]
        if monitors is not None:
            programs = [
                with_second_monitor(program, monitors / f"qemu-{number}", monitors)
                for number, program in enumerate(programs)
            ]
        pair = TwoAgents(*programs, pki=None if clear_text else pki, cache=facts_cache, **more)
        made.append(pair)
        pair.start()
        return pair

    left: list[str] = []
    try:
        yield make
        for pair in made:
            left += [] if pair.may_leave else pair.left_behind()
    finally:
        for pair in made:
            pair.close()
            left += pair.options_left()
            left += pair.remove()
    assert not left, left


@pytest.fixture
def guests(tmp_path: Path) -> Guests:
    """Specs in this test's folder."""
    return Guests(tmp_path)
