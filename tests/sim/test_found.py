"""What the simulator has found, each as the shortest scenario that shows it and that no lower ring can."""

from __future__ import annotations

from dataclasses import replace

from vmferry.testing.sim.run import run_scenario
from vmferry.testing.sim.scenario import CALM, Fault, Trigger

OLD_TO_NEW = replace(CALM, profiles={"a": "7.2", "b": "11.1"})


def test_a_descriptor_that_a_frozen_qemu_took_too_late_is_taken_back() -> None:
    """1. `getfd` is sent  2. QEMU is frozen and the command's time is over: the migration is given up  3. QEMU thaws
    and takes the descriptor, which nobody knew it had."""
    frozen = Fault("freeze-qemu", Trigger(text="fact=configured"), host="a", for_s=8.0)
    verdict = run_scenario(replace(OLD_TO_NEW, faults=(frozen,)))
    assert verdict.faults == [str(frozen)]
    assert (verdict.outcome, verdict.violations) == ("a", [])


def test_a_destination_that_freezes_at_its_start_keeps_no_credentials() -> None:
    """The first command that takes them away was not answered in time, and the second one not sent."""
    frozen = Fault("freeze-qemu", Trigger(text="fact=run-acked", host="b"), host="b", for_s=8.0)
    verdict = run_scenario(replace(OLD_TO_NEW, faults=(frozen,)))
    assert verdict.faults == [str(frozen)]
    assert (verdict.outcome, verdict.violations) == ("b", [])
