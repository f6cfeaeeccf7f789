"""`vmferry restore`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import Any

from vmferry.cli import client as agent_client
from vmferry.cli import ending
from vmferry.qmp.blocking import BlockingClient

POLL_S = 1.0
"""If no event came for so long the agent is asked: events of another host may be lost with its link."""


def restore(arguments: Namespace) -> int:
    """Brings a guest back, and waits until it runs, or is whole. 0: it does."""
    wish: dict[str, Any] = {
        "name": arguments.snapshot,
        "rename": arguments.rename,
        "host": arguments.host,
        "lazy": arguments.lazy,
        "paused": arguments.paused,
        "accept": arguments.accept,
        "trust-definition": arguments.trust_definition,
        "job": os.urandom(16).hex(),
        "auto-dismiss": not arguments.no_auto_dismiss,
    }
    if arguments.spec:
        wish["spec-path"] = os.path.abspath(arguments.spec)
    with agent_client.connect(arguments.socket) as client:
        wire = agent_client.execute(client, "vm-restore", wish)
        if not arguments.detach:
            is_enough_to_run = arguments.lazy and not arguments.wait
            wire = _follow(client, wire, host=arguments.host, until_runs=is_enough_to_run, quiet=arguments.json)
    return ending.show_end(wire, ending.notes_of(wire), as_json=arguments.json)


def _is_there(wire: dict[str, Any]) -> bool:
    """The guest runs, or stands paused as it was to."""
    return wire["resume_ms"] is not None or (wire["paused"] and wire["detail"] in ("running-lazily", "completed"))


def _follow(
    client: BlockingClient, wire: dict[str, Any], *, host: str, until_runs: bool, quiet: bool
) -> dict[str, Any]:
    """Until the restore is over, or its guest runs. If the agent goes away meanwhile AgentUnreachable says so."""
    told = ""
    wish = {"job": wire["job"], "host": host}
    gone = ending.without_agent(
        "if the guest runs it goes on, and the next agent brings what it lacks",
        guest="unknown",
        hint="'vmferry jobs' shows how it stands",
    )
    with gone:
        while not wire["over"] and not (until_runs and _is_there(wire)):
            for event in client.events(POLL_S):
                if event.name == "RESTORE" and event.data.get("job") == wire["job"]:
                    break
            wire = agent_client.execute(client, "restore-status", wish)
            if wire["reason"] != told and not quiet:
                told = wire["reason"]
                sys.stderr.write(f"{wire['sentence']}\n")
    return wire
