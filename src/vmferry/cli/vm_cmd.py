"""`vmferry run`, `adopt`, `ls`, `status`, `stop`."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from typing import Any

from vmferry.cli import client as agent_client
from vmferry.cli.job_cmd import blocker_line
from vmferry.cli.render import table, timeline_lines
from vmferry.units import format_size


def run_vm(arguments: Namespace) -> int:
    """Starts a VM from a spec."""
    wire = agent_client.once(
        arguments.socket, "vm-run", {"path": os.path.abspath(arguments.spec), "accept": arguments.accept}
    )
    print(json.dumps(wire) if arguments.json else _sentence(wire))
    return 0


def adopt(arguments: Namespace) -> int:
    """Takes a running QEMU over."""
    wire = agent_client.once(
        arguments.socket,
        "vm-adopt",
        {"vm": arguments.vm, "qmp": os.path.abspath(arguments.qmp), "shared": not arguments.local_disks,
         "accept": arguments.accept},
    )  # fmt: skip
    print(json.dumps(wire) if arguments.json else _sentence(wire))
    return 0


def _sentence(wire: dict[str, Any]) -> str:
    return (
        f"{wire['vm']} on {wire['host']}: {wire['run_state']}, {wire['machine']}, {wire['accel']}, "
        f"{format_size(wire['memory_bytes'])}, QEMU {wire['qemu']} (process {wire['pid'] or 'unknown'})"
    )


def list_vms(arguments: Namespace) -> int:
    """Every VM on every known host; hosts that do not answer are named."""
    wire = agent_client.once(arguments.socket, "vm-list")
    if arguments.json:
        print(json.dumps(wire))
        return 0
    rows = []
    for vm in wire["vms"]:
        doing = vm["doing"]
        text = ""
        if doing is not None:
            arrow = f"from {doing['source']}" if doing.get("role") == "destination" else f"to {doing['destination']}"
            text = f"{doing['status']} {arrow}"
            if doing["outcome"] in ("uncertain", "held", "degraded", "lost"):
                text += f" ({doing['outcome']})"
        rows.append((vm["vm"], vm["host"], vm["run_state"], format_size(vm["memory_bytes"]), text))
    for line in table(("VM", "HOST", "STATE", "MEMORY", "DOING"), rows):
        print(line)
    for host in wire["hosts"]:
        if not host["answers"]:
            print(f"{host['host']} does not answer: {host['error']['message']}")
    return 0


def status(arguments: Namespace) -> int:
    """One VM and its newest migration."""
    wire = agent_client.once(arguments.socket, "vm-status", {"vm": arguments.vm})
    if arguments.json:
        print(json.dumps(wire))
        return 0
    print(_sentence(wire))
    for blocker in wire["blockers"]:
        print(f"  {blocker_line(blocker)}")
    if wire["migration"]:
        print(wire["migration"]["sentence"])
        for line in timeline_lines(wire["migration"]):
            print(line)
    return 0


def stop(arguments: Namespace) -> int:
    """Ends a VM."""
    wish = {"vm": arguments.vm, "force": arguments.force, "remove-disks": arguments.remove_disks}
    wire = agent_client.once(arguments.socket, "vm-stop", wish)
    if arguments.json:
        print(json.dumps(wire))
        return 0
    print(f"{arguments.vm} is stopped")
    told = wire.get("disks") or {}
    for what, word in (("removed", "removed"), ("left", "stays")):
        for line in told.get(what, ()):
            print(f"  {word}: {line}")
    return 0


def disks(arguments: Namespace) -> int:
    """The disks that restores and saves made on the agent's host; or one is taken away."""
    if arguments.remove:
        wish = {"path": arguments.remove, "force": arguments.force}
        wire = agent_client.once(arguments.socket, "restored-disk-remove", wish)
        print(json.dumps(wire) if arguments.json else f"{arguments.remove} is removed")
        return 0
    found = agent_client.once(arguments.socket, "restored-disks")
    if arguments.json:
        print(json.dumps({"disks": found}))
        return 0
    if not found:
        print("no restore and no save has left a disk here")
        return 0
    rows = [
        (
            each["path"],
            each["kind"],
            each["vm"],
            each["name"],
            format_size(each["allocated_bytes"]),
            each["needed"] or "nobody",
        )
        for each in found
    ]
    for line in table(("DISK", "KIND", "VM", "SNAPSHOT", "SIZE", "NEEDED"), rows):
        print(line)
    return 0
