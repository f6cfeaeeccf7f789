"""The real QEMUs keep the contract that the fake imitates."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from vmferry.testing import contract, contract_pairs
from vmferry.testing.qemus import available

pytestmark = pytest.mark.real

QEMUS = available()
PAIRS = [(source, destination) for source in QEMUS for destination in QEMUS]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(("source", "destination"), PAIRS)
@pytest.mark.proves("S4", "S24", "S28", "S37", "S38")
async def test_a_real_qemu_keeps_the_contract(source: str, destination: str, check: str) -> None:
    with tempfile.TemporaryDirectory(prefix="vf") as directory:
        async with contract_pairs.pair_of(QEMUS[source], QEMUS[destination], Path(directory)) as pair:
            await contract.CHECKS[check](pair)
