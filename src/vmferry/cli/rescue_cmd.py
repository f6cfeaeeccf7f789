"""`vmferry rescue`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from vmferry.cli import client as agent_client
from vmferry.errors import UsageError
from vmferry.qmp.codec import Event
from vmferry.units import format_size

RESCUE_S = 3600.0
"""Longer than the agent allows a rescue to take: the agent's own word is the better one."""


def rescue(arguments: Namespace) -> int:
    """Carries one tool out and shows how far it is. 0: the guest is out of its trouble, as the sentence says."""
    wish: dict[str, Any] = {"vm": arguments.vm}
    if arguments.tool != "feed":
        wish |= {"run": arguments.then_run, "never-ran": arguments.never_ran}
    elif arguments.then_run or arguments.never_ran:
        raise UsageError("feed takes neither --run nor --never-ran: the guest runs on its destination already")
    with agent_client.connect(arguments.socket) as client:
        shown = False

        def show(event: Event) -> None:
            nonlocal shown
            if event.name == "RESCUE" and event.data.get("vm") == arguments.vm and not arguments.json:
                shown = True
                sys.stderr.write(f"\r{arguments.vm}: {arguments.tool}, {format_size(event.data['bytes'])} ")
                sys.stderr.flush()

        wire = agent_client.execute(client, f"rescue-{arguments.tool}", wish, deadline_s=RESCUE_S, on_event=show)
        if shown:
            sys.stderr.write("\n")
    print(json.dumps(wire) if arguments.json else _sentence(wire))
    return 0


def _sentence(wire: dict[str, Any]) -> str:
    moved = f"{format_size(wire['bytes'])} in {wire['ms']:.0f} ms"
    match wire["tool"]:
        case "feed":
            return f"{wire['vm']}: its destination has every page now ({wire['pages']} were missing, {moved})"
        case "bring-back":
            return (
                f"{wire['vm']} is here again, with all of its memory ({wire['ms']:.0f} ms); it is {wire['run_state']}"
            )
        case _:
            return f"{wire['vm']} can be started again ({moved}); it is {wire['run_state']}"
