"""`vmferry save`, `snapshots`, `forget`, `repository-init`."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from vmferry.cli import client as agent_client
from vmferry.cli import ending
from vmferry.cli.render import ProgressLine, table, timeline_lines
from vmferry.qmp.blocking import BlockingClient
from vmferry.units import format_size

POLL_S = 0.5
"""If no event came for so long the agent is asked: those of another host are not heard here."""


def save(arguments: Namespace) -> int:
    """Saves a VM and waits for the end. 0: the snapshot is there."""
    wish = {
        "vm": arguments.vm,
        "name": arguments.name,
        "job": os.urandom(16).hex(),
        "way": arguments.way,
        "pause": arguments.pause,
        "disks": arguments.disks,
        "disks-dir": arguments.disks_dir,
        "auto-finalize": not arguments.no_auto_finalize,
        "auto-dismiss": not arguments.no_auto_dismiss,
    }
    with agent_client.connect(arguments.socket) as client:
        wire = agent_client.execute(client, "vm-save", wish)
        if arguments.detach:
            print(json.dumps(wire) if arguments.json else f"{arguments.vm}: job {wire['job']} has begun")
            return 0
        wire = _follow(client, arguments.vm, wish["job"], quiet=arguments.json)
    return ending.show_end(wire, _end_lines(wire), as_json=arguments.json)


def _follow(client: BlockingClient, vm: str, job: str, *, quiet: bool) -> dict[str, Any]:
    """Shows progress until the job is over. If the agent goes away meanwhile, AgentUnreachable says what that means."""
    line = ProgressLine(vm, enabled=not quiet)
    gone = ending.without_agent(
        "if it does not come back the guest goes on, and nothing is kept",
        guest="unharmed",
        hint=f"'vmferry status {vm}' shows how it stands",
    )
    with closing(line), gone:
        while True:
            wire: dict[str, Any] = agent_client.execute(client, "job-status", {"job": job, "vm": vm})
            if wire["over"]:
                return wire
            line.show({**wire, **wire["progress"]})
            for event in client.events(POLL_S):
                if event.data.get("id") == job:
                    break


def _end_lines(wire: dict[str, Any]) -> Iterator[str]:
    yield from timeline_lines(wire)
    yield from ending.notes_of(wire)
    for path, overlay in wire.get("goes_on_in", {}).items():
        yield f"  {path} stays as it is; the guest goes on in {overlay}"
        yield f'  in its spec write from now on: path = "{overlay}", format = "qcow2"'
    for path, copy in wire.get("copies", {}).items():
        yield f"  {path} was copied to {copy}; the guest goes on in {path}"
    if not wire.get("error"):
        yield f"  {format_size(wire['pages'] * 4096)} of memory, {format_size(wire['stored_bytes'])} stored"


def snapshots(arguments: Namespace) -> int:
    """Every snapshot of the agent's repository."""
    wire = agent_client.once(arguments.socket, "snapshots")
    if arguments.json:
        print(json.dumps(wire))
        return 0
    rows = []
    for each in wire["snapshots"]:
        if each["damage"] is not None:
            rows.append((each["snapshot"][:12], "", "", "", "", "", f"damaged: {each['damage']}"))
            continue
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["created_s"]))
        sizes = (format_size(each["memory_bytes"]), format_size(each["stored_bytes"]))
        rows.append((each["snapshot"][:12], each["name"], each["vm"] or "", when, *sizes, each["machine"] or ""))
    if not rows:
        print(f"no snapshots in {wire['repository']}")
        return 0
    for line in table(("ID", "NAME", "VM", "SAVED", "MEMORY", "STORED", "MACHINE"), rows):
        print(line)
    for pin in wire["pins"]:
        print(f"  {pin['vm']} on {pin['host']} still has memory in {pin['snapshot'][:12]} (job {pin['job']})")
    return 0


def init(arguments: Namespace) -> int:
    """Makes the repository that the agent is configured with."""
    wire = agent_client.once(arguments.socket, "repository-init")
    if arguments.json:
        print(json.dumps(wire))
        return 0
    is_new, is_open = wire["created"], "encrypted" if wire["encrypted"] else "not encrypted"
    print(f"{wire['repository']} {'is' if is_new else 'was already'} a repository ({wire['id'][:12]}, {is_open})")
    return 0


def forget(arguments: Namespace) -> int:
    """Takes a snapshot out of the list."""
    wire = agent_client.once(arguments.socket, "snapshot-forget", {"name": arguments.name})
    print(json.dumps(wire) if arguments.json else f"{arguments.name} is forgotten; 'vmferry prune' frees its room")
    return 0
