"""`vmferry save`, `snapshots`, `verify`, `forget`, `prune`, `export`, `import`."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from vmferry.cli import client as agent_client
from vmferry.cli import ending
from vmferry.cli.main import report_error
from vmferry.cli.render import ProgressLine, table, timeline_lines
from vmferry.errors import RepositoryError
from vmferry.qmp.blocking import BlockingClient
from vmferry.units import format_size

POLL_S = 0.5
"""If no event came for so long the agent is asked: those of another host are not heard here."""
LONG_S = 6 * 3600.0
"""Verifying, pruning, writing files: as long as the repository is large."""


def save(arguments: Namespace) -> int:
    """Saves a VM and waits for the end. 0: the snapshot is there."""
    wish = {
        "vm": arguments.vm,
        "name": arguments.name,
        "job": os.urandom(16).hex(),
        "way": arguments.way,
        "pause": arguments.pause,
        "disks": arguments.disks,
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
    for disk in wire["disks"]:
        if disk["overlay"]:
            yield f"  {disk['path']} stays as it is; the guest goes on in {disk['overlay']}"
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


def verify(arguments: Namespace) -> int:
    """Reads everything. 0: all of it is whole."""
    wire = _long(arguments, "snapshot-verify", {"name": arguments.name or ""})
    error = None
    if not wire["whole"]:
        names = ", ".join(wire["damaged_snapshots"]) or "none"
        error = RepositoryError(
            f"{len(wire['problems'])} objects are damaged; snapshots that cannot be restored whole: {names}",
            retry="no",
            hint="forget these snapshots, prune with --empty-below 1, and save anew",
        )
    if arguments.json:
        print(json.dumps(wire if error is None else {**wire, "error": error.to_wire()}))
        return 0 if error is None else error.exit_code
    for problem in wire["problems"]:
        whom = ", ".join(problem["snapshots"]) or "no snapshot"
        print(f"{problem['object']}: {problem['what']} (concerns {whom})")
    read = format_size(wire["read_bytes"])
    print(f"{wire['snapshots']} snapshots, {wire['packs']} packs, {wire['pages']} pages, {read} read")
    if error is None:
        return 0
    sys.stdout.flush()
    report_error(error, as_json=False)
    return error.exit_code


def forget(arguments: Namespace) -> int:
    """Takes a snapshot out of the list."""
    wire = agent_client.once(arguments.socket, "snapshot-forget", {"name": arguments.name})
    print(json.dumps(wire) if arguments.json else f"{arguments.name} is forgotten; 'vmferry prune' frees its room")
    return 0


def prune(arguments: Namespace) -> int:
    """Plans, and does it unless it is a dry run."""
    wish = {"dry-run": arguments.dry_run, "empty-below": arguments.empty_below,
            "drop-pins": arguments.drop_pins or ""}  # fmt: skip
    wire = _long(arguments, "snapshot-prune", wish)
    if arguments.json:
        print(json.dumps(wire))
        return 0
    plan, done = wire["plan"], wire["done"]
    for pin in wire["dropped_pins"]:
        print(f"dropped: {pin['vm']} on {pin['host']} does not hold {pin['snapshot'][:12]} any more")
    print(
        f"plan: remove {plan['remove_packs']} packs, {plan['remove_indexes']} indexes and "
        f"{plan['remove_leftovers']} left-overs, write {plan['rewrite_packs']} packs anew: about "
        f"{format_size(plan['freed_bytes'])}"
    )
    if plan["too_young"]:
        print(f"  {plan['too_young']} objects that nobody needs are younger than an hour and stay")
    if done is not None:
        print(f"done: {done['removed']} objects removed, {format_size(done['removed_bytes'])}")
    return 0


def export(arguments: Namespace) -> int:
    """Writes a snapshot as a plain stream file of QEMU's."""
    wish = {"name": arguments.name, "file": os.path.abspath(arguments.file)}
    wire = _long(arguments, "snapshot-export", wish)
    print(json.dumps(wire) if arguments.json else f"{wire['file']}: {format_size(wire['bytes'])}, {wire['machine']}")
    return 0


def load(arguments: Namespace) -> int:
    """Keeps a plain stream file of QEMU's as a snapshot."""
    wish = {"name": arguments.name, "file": os.path.abspath(arguments.file)}
    wire = _long(arguments, "snapshot-import", wish)
    print(json.dumps(wire) if arguments.json else f"{wire['file']} is kept as {wire['name']} ({wire['machine']})")
    return 0


def _long(arguments: Namespace, command: str, wish: dict[str, Any]) -> dict[str, Any]:
    with agent_client.connect(arguments.socket) as client:
        return dict(agent_client.execute(client, command, wish, deadline_s=LONG_S))
