"""`vmferry inspect`, `recover`, `resolve`."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from vmferry.cli import client as agent_client
from vmferry.cli.migrate_cmd import follow, show_end
from vmferry.qmp.blocking import BlockingClient
from vmferry.units import parse_time_ms

RECOVER_S = 3600.0
"""Longer than the agent allows a rescue to take: the agent's own word is the better one."""


def inspect(arguments: Namespace) -> int:
    """Shows both sides. 0: it could be asked how the guest stands."""
    wire = agent_client.once(arguments.socket, "vm-inspect", {"vm": arguments.vm})
    print(json.dumps(wire) if arguments.json else "\n".join(_lines(wire)))
    return 0


def recover(arguments: Namespace) -> int:
    """Takes the named action and waits. 0: the guest runs where it was asked to run."""
    return _act_and_follow(arguments, "vm-recover", {"vm": arguments.vm})


def resolve(arguments: Namespace) -> int:
    """Says a person's word and waits. 0: the guest runs where it was asked to run; 11: on the source."""
    wish = {"vm": arguments.vm, "other-side-is-dead": arguments.other_side_is_dead}
    return _act_and_follow(arguments, "vm-resolve", wish)


def _act_and_follow(arguments: Namespace, command: str, wish: dict[str, Any]) -> int:
    patience_s = parse_time_ms(arguments.patience, bare_unit="s") / 1000
    with agent_client.connect(arguments.socket) as client:
        wire = agent_client.execute(client, command, wish, deadline_s=RECOVER_S)
        if not arguments.json:
            print(f"{arguments.vm}: {wire['did'] or 'nothing has to be done by hand: ' + _action(wire)}")
        return _end(client, arguments, str(wire["job"]), patience_s)


def _action(wire: dict[str, Any]) -> str:
    return str(wire.get("action") or "it goes on by itself").replace("NAME", str(wire["vm"]))


def _end(client: BlockingClient, arguments: Namespace, job: str, patience_s: float) -> int:
    wire = follow(client, arguments.vm, job, patience_s=patience_s, quiet=arguments.json)
    return show_end(wire, as_json=arguments.json)


def _lines(wire: dict[str, Any]) -> list[str]:
    lines = [f"{wire['vm']}: {wire['sentence']}"]
    for role in ("source", "destination"):
        side = wire[role]
        if side is None:
            continue
        said = f"migration {side['status'] or 'not known'}, guest {side['run_state'] or 'not known'}"
        process = f"QEMU {side['process'] or 'not known'}" + (f" (process {side['pid']})" if side["pid"] else "")
        lines.append(f"  {role:<12} {side['host']}: {process}, {said}")
        if side.get("trouble"):
            lines.append(f"  {'':<12} {side['trouble']}")
        lines += [f"  {'':<12} {_disk(disk)}" for disk in side.get("disks", ())]
    if wire["row"]:
        lines.append(f"  {'row':<12} {wire['row']}: {wire['why']}")
    if wire.get("trouble"):
        lines.append(f"  {'trouble':<12} {wire['trouble']}")
    lines.append(f"  {'next':<12} {wire['action']}")
    return lines


def _disk(disk: dict[str, Any]) -> str:
    if disk["writers"] is None:
        return f"disk {disk['path']}: who has it is not known ({disk.get('trouble', 'no answer')})"
    holders = [f"{w['command']} (process {w['pid']}) on {disk['seen_from']}" for w in disk["writers"]]
    if disk["elsewhere"]:
        holders.append("somebody on another host")
    return f"disk {disk['path']}: {'held for writing by ' + ', '.join(holders) if holders else 'nobody writes'}"
