"""`vmferry migrate`, `plan`, `fail-back`, `watch`, `cancel`, `set`, `postcopy`."""

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
from vmferry.cli.render import ProgressLine, objection_lines, timeline_lines
from vmferry.errors import (
    Busy,
    CancelRefused,
    PlanRefused,
    UnknownVm,
    UsageError,
    VmferryError,
    from_wire,
)
from vmferry.qmp.blocking import BlockingClient
from vmferry.units import parse_time_ms

POLL_S = 1.0
"""If no event came for so long the agent is asked: events of another host may be lost with its link."""
UNSETTLED = frozenset({"uncertain", "held", "degraded", "lost"})


def _time_ms(text: str, flag: str) -> int:
    try:
        return parse_time_ms(text, bare_unit="s")
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def _wish(arguments: Namespace) -> dict[str, Any]:
    wish: dict[str, Any] = {
        "vm": arguments.vm,
        "destination": arguments.destination,
        "mode": arguments.mode,
        "settings": arguments.settings,
        "multifd": arguments.multifd,
        "clear-text": arguments.clear_text,
        "accept": arguments.accept,
        "disks": arguments.disks,
        "disk": arguments.disk,
        "verify-disks": arguments.verify_disks,
        "only-changes": getattr(arguments, "only_changes", False),
    }
    policies = {
        "on-storage-error": getattr(arguments, "on_storage_error", None),
        "on-postcopy-failure": getattr(arguments, "on_postcopy_failure", None),
        "retry-for": getattr(arguments, "retry_for", None),
    }
    if getattr(arguments, "source_disks", "keep") == "remove":
        wish["keep-images-ms"] = _time_ms(arguments.grace, "--grace")
    if getattr(arguments, "no_auto_finalize", False):
        wish["auto-finalize"] = False
    if getattr(arguments, "no_auto_dismiss", False):
        wish["auto-dismiss"] = False
    wish["policy"] = {name: value for name, value in policies.items() if value is not None}
    if arguments.postcopy_after_passes is not None:
        wish["postcopy-after-passes"] = arguments.postcopy_after_passes
    if arguments.postcopy_after is not None:
        wish["postcopy-after-ms"] = _time_ms(arguments.postcopy_after, "--postcopy-after")
    return wish


def migrate(arguments: Namespace) -> int:
    """Moves a VM and waits for the end. 0: it runs where it was asked to run."""
    patience_s = _time_ms(arguments.patience, "--patience") / 1000
    wish = _wish(arguments) | {"job": os.urandom(16).hex()}
    with agent_client.connect(arguments.socket) as client:
        brief = agent_client.execute(client, "vm-migrate", wish)
        if arguments.detach:
            print(json.dumps(brief) if arguments.json else f"{arguments.vm}: job {brief['job']} has begun")
            return 0
        wire = follow(client, arguments.vm, wish["job"], patience_s=patience_s, quiet=arguments.json)
    return show_end(wire, as_json=arguments.json)


def fail_back(arguments: Namespace) -> int:
    """Moves a VM back to where it came from with its disks: what changed since goes, no more. As `migrate` else."""
    found = agent_client.once(arguments.socket, "vm-origin", {"vm": arguments.vm})
    arguments.destination, arguments.disks, arguments.only_changes = found["host"], None, True
    arguments.disk = [f"{disk['id']}=copy" for disk in found["disks"]]
    if arguments.plan:
        return plan(arguments)
    return migrate(arguments)


def watch(arguments: Namespace) -> int:
    """Follows the VM's newest migration."""
    patience_s = _time_ms(arguments.patience, "--patience") / 1000
    with agent_client.connect(arguments.socket) as client:
        wire = agent_client.execute(client, "job-status", {"vm": arguments.vm})
        if wire.get("job") is None:
            print(json.dumps(wire) if arguments.json else f"{arguments.vm} has no migration")
            return 0
        if not wire["over"]:
            wire = follow(client, arguments.vm, wire["job"], patience_s=patience_s, quiet=arguments.json)
    return show_end(wire, as_json=arguments.json)


def follow(client: BlockingClient, vm: str, job: str, *, patience_s: float, quiet: bool) -> dict[str, Any]:
    """Shows progress until the job is over, or unsettled for longer than `patience_s`. Returns its wire form.

    If the agent goes away meanwhile, the migration goes on without us: AgentUnreachable says so."""
    line = ProgressLine(vm, enabled=not quiet)
    unsettled_since_s: float | None = None
    gone = ending.without_agent(
        "the migration goes on without it",
        guest="unknown",
        hint=f"'vmferry status {vm}' on either host shows how it stands",
    )
    with closing(line), gone:
        while True:
            brief: dict[str, Any] | None = None
            for event in client.events(POLL_S):
                if event.data.get("job") != job:
                    continue
                if event.name == "JOB_ENDED":
                    return dict(event.data)
                if event.name in ("JOB_CHANGE", "JOB_PROGRESS") and event.data.get("role") != "destination":
                    brief = dict(event.data)
                    break
            if brief is None:
                try:
                    brief = agent_client.execute(client, "job-status", {"job": job, "vm": vm})
                except UnknownVm:
                    continue  # the VM has just left this host and its news are on their way
                if brief["over"]:
                    return brief
            line.show(brief)
            if brief["outcome"] not in UNSETTLED:
                unsettled_since_s = None
            elif unsettled_since_s is None:
                unsettled_since_s = time.monotonic()
            elif time.monotonic() - unsettled_since_s > patience_s:
                return dict(agent_client.execute(client, "job-status", {"job": job, "vm": vm}))


def show_end(wire: dict[str, Any], *, as_json: bool) -> int:
    """Prints how a migration ended (or stands). Returns the exit code."""
    return ending.show_end(wire, _end_lines(wire), as_json=as_json)


def _end_lines(wire: dict[str, Any]) -> Iterator[str]:
    yield from timeline_lines(wire)
    yield from ending.notes_of(wire)
    for path in wire.get("images_left") or ():
        yield f"  left on {wire['source']}: {path}"


def plan(arguments: Namespace) -> int:
    """Asks both hosts; changes nothing. 0: nothing blocks the move."""
    wire = agent_client.once(arguments.socket, "vm-plan", _wish(arguments))
    refused = any(o["weight"] == "blocker" for o in wire["objections"])
    if arguments.json:
        print(json.dumps(wire))
        return PlanRefused.exit_code if refused else 0
    print(wire["sentence"])
    for row in objection_lines(wire["objections"]):
        print(row)
    return PlanRefused.exit_code if refused else 0


def cancel(arguments: Namespace) -> int:
    """Asks for the cancel and waits for the end. 0: cancelled, now or before."""
    with agent_client.connect(arguments.socket) as client:
        brief = agent_client.execute(client, "vm-cancel", {"vm": arguments.vm})
        wire = (
            agent_client.execute(client, "job-status", {"job": brief["job"], "vm": arguments.vm})
            if brief["over"]
            else follow(client, arguments.vm, brief["job"], patience_s=5.0, quiet=arguments.json)
        )
    error = None if (wire["status"], wire["outcome"]) == ("cancelled", "source") else _why_not_cancelled(wire)
    if arguments.json:
        print(json.dumps(wire if error is None else {**wire, "error": error.to_wire()}))
        return 0 if error is None else error.exit_code
    print(wire["sentence"])
    if error is None:
        return 0
    sys.stdout.flush()
    report_error(error, as_json=False)
    return error.exit_code


def _why_not_cancelled(wire: dict[str, Any]) -> VmferryError:
    """What the migration ended with, or that it ended well, or that it has not ended yet."""
    if wire.get("error"):
        return from_wire(wire["error"])
    if wire["over"]:
        return CancelRefused(f"nothing is left to cancel: {wire['sentence']}", guest="running-on-destination")
    return Busy(f"the cancel is not over yet: {wire['sentence']}", guest="unknown")


def change(arguments: Namespace) -> int:
    """Changes options of the running migration."""
    wire = agent_client.once(arguments.socket, "vm-set", {"vm": arguments.vm, "settings": arguments.settings})
    print(json.dumps(wire) if arguments.json else f"{arguments.vm}: {', '.join(arguments.settings)}")
    return 0


def postcopy(arguments: Namespace) -> int:
    """Asks for the switch to postcopy."""
    wire = agent_client.once(arguments.socket, "vm-start-postcopy", {"vm": arguments.vm})
    print(json.dumps(wire) if arguments.json else f"{arguments.vm}: switching to postcopy")
    return 0
