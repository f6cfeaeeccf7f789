"""Which faults the bare script gets, and that each has its counterpart among vmferry's cells."""

from __future__ import annotations

from vmferry.chaos import cells, compare, report

PAIRS = [("7.2", "7.2")]


def test_each_fault_in_each_phase() -> None:
    found = compare.cells(["7.2", "11.1"])
    assert len(set(found)) == len(found)
    assert {cell.fault for cell in found} == set(compare.FAULTS) == set(report.SAME_FAULT)
    for mode, phases in compare.PHASES.items():
        assert {cell.phase for cell in found if cell.mode == mode} == set(phases)
    assert {cell.phase for cell in found} == set(report.SAME_PHASE)


def test_each_has_counterparts() -> None:
    for bare in compare.cells(["7.2"]):
        same = [
            cell
            for cell in cells.matrix(PAIRS, core=True)
            if cell.mode == bare.mode
            and cell.phase in report.SAME_PHASE[bare.phase]
            and cell.fault.name.startswith(report.SAME_FAULT[bare.fault])
        ]
        assert same, bare
