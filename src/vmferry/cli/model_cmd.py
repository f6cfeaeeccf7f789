"""`vmferry model`: the model checker. It asks no agent and touches no guest."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

from vmferry.agent.observe import arrival, destination_findings, source_findings
from vmferry.model import campaign
from vmferry.model.mutants import MUTANTS
from vmferry.model.rules import Rules

FAILED = 1
SCHEDULES_SHOWN = 10


def model(arguments: Namespace) -> int:
    """Explores. 0: nothing broke, and every mutant was caught; 1 otherwise."""
    settings = [s for s in campaign.SETTINGS if arguments.only in s.name]
    mutants = [] if arguments.no_mutants else [m for m in MUTANTS if arguments.only in m.name]
    report = campaign.run(
        Rules(source_findings, destination_findings, arrival),
        settings=settings,
        mutants=mutants,
        processes=arguments.processes,
        faults=arguments.faults,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    wire = report.to_wire()
    good = not wire["violations"] and not wire["mutants_missed"]
    if arguments.json:
        print(json.dumps(wire))
        return 0 if good else FAILED
    for found in wire["schedules"][:SCHEDULES_SHOWN]:
        print(f"\n{found['what']} ({found['setting']}), the shortest schedule:")
        for number, step in enumerate(found["schedule"], 1):
            print(f"  {number:3} {step}")
    if len(wire["schedules"]) > SCHEDULES_SHOWN:
        print(f"\nand {len(wire['schedules']) - SCHEDULES_SHOWN} more violations: --json has all schedules")
    print(
        f"{wire['states']} states, {wire['transitions']} transitions, depth {wire['depth']}, "
        f"{wire['violations']} violations; {wire['mutants_caught']} of {wire['mutants']} mutants caught; "
        f"{wire['seconds']} s"
    )
    return 0 if good else FAILED
