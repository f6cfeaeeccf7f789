"""`vmferry verify`, `prune`, `export`, `import`: jobs of the agent about its repository, followed to their end.

Rule 1: the job is the agent's: a command that is interrupted leaves it at work, and says so.
Rule 2: nothing is pruned before a person has seen what would be: on a terminal they are asked, a script says --yes, or
        --no-auto-finalize and then 'vmferry job finalize'.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from vmferry import limits
from vmferry.cli import client as agent_client
from vmferry.cli import ending
from vmferry.cli.main import report_error
from vmferry.cli.render import ProgressLine
from vmferry.errors import MigrationCancelled, RepositoryError, UsageError, from_wire
from vmferry.qmp.blocking import BlockingClient
from vmferry.units import format_size

POLL_S = 0.5
"""How often the agent is asked how far it is, when no event says that something changed."""

Wire = dict[str, Any]


def verify(arguments: Namespace) -> int:
    """Reads everything. 0: all of it is whole."""
    wish: Wire = {"name": arguments.name or "", "rebuild-indexes": arguments.rebuild_indexes}
    return _run(arguments, "snapshot-verify", wish, _verify_lines, _damage)


def prune(arguments: Namespace) -> int:
    """Plans, shows the plan, and does it when a person says so. 0: it is done, or a plan was all that was wanted."""
    wish: Wire = {"dry-run": arguments.dry_run, "empty-below": arguments.empty_below,
                  "drop-pins": arguments.drop_pins or ""}  # fmt: skip
    if arguments.yes or arguments.dry_run:
        return _run(arguments, "snapshot-prune", wish, _prune_lines)
    wish["auto-finalize"] = False
    is_asked = not (arguments.json or arguments.no_auto_finalize or arguments.detach) and sys.stdin.isatty()
    if not (is_asked or arguments.no_auto_finalize or arguments.detach):
        raise UsageError(
            "a prune takes objects away for good, and nobody can be asked here",
            hint="say --yes; or --dry-run to see what would be done; or --no-auto-finalize to see the plan, and then "
            "'vmferry job finalize JOB' to have that plan carried out",
        )
    with agent_client.connect(arguments.socket) as client:
        wire = _begin(client, arguments, "snapshot-prune", wish)
        if arguments.detach:
            return _begun({**wire, "next": _leave(wire)}, as_json=arguments.json)
        wire = _follow(client, wire, quiet=arguments.json, until_planned=True)
        if not wire["over"] and is_asked:
            for line in _plan_lines(wire):
                print(line)
            agent_client.execute(client, f"job-{'finalize' if _says_yes() else 'cancel'}", {"id": wire["job"]})
            wire = _follow(client, wire, quiet=False)
            return _end(wire, _done_lines(wire), as_json=False)
    return _end(wire, _prune_lines(wire), as_json=arguments.json)


def export(arguments: Namespace) -> int:
    """Writes a snapshot as a plain stream file of QEMU's."""
    wish = {"name": arguments.name, "file": os.path.abspath(arguments.file)}
    return _run(arguments, "snapshot-export", wish,
                lambda wire: [f"{wire['file']}: {format_size(wire['bytes'])}, {wire['machine']}"])  # fmt: skip


def load(arguments: Namespace) -> int:
    """Keeps a plain stream file of QEMU's as a snapshot."""
    wish = {"name": arguments.name, "file": os.path.abspath(arguments.file)}
    return _run(arguments, "snapshot-import", wish,
                lambda wire: [f"{wire['file']} is kept as {wire['name']} ({wire['machine']})"])  # fmt: skip


# --- a job from its beginning to its end ------------------------------------------------------------------------


def _run(
    arguments: Namespace,
    command: str,
    wish: Wire,
    lines: Callable[[Wire], Iterable[str]],
    finding: Callable[[Wire], RepositoryError | None] = lambda wire: None,
) -> int:
    with agent_client.connect(arguments.socket) as client:
        wire = _begin(client, arguments, command, wish)
        if arguments.detach:
            return _begun(wire, as_json=arguments.json)
        wire = _follow(client, wire, quiet=arguments.json)
    error = None if wire["error"] else finding(wire)
    shown = wire if error is None else {**wire, "error": error.to_wire()}
    return _end(shown, () if wire["error"] else lines(wire), as_json=arguments.json)


def _begin(client: BlockingClient, arguments: Namespace, command: str, wish: Wire) -> Wire:
    wish |= {"job": os.urandom(16).hex(), "auto-dismiss": not arguments.no_auto_dismiss}
    return dict(agent_client.execute(client, command, wish))


def _begun(wire: Wire, *, as_json: bool) -> int:
    """`next`, if there is one: what has to be done yet, or it does nothing."""
    text = f"{wire['kind']}: job {wire['job']} has begun"
    print(json.dumps(wire) if as_json else "; ".join(filter(None, (text, wire.get("next")))))
    return 0


def _leave(wire: Wire) -> str:
    """What a person has to know who does not wait for a plan."""
    job, hold = wire["job"], f"{limits.PRUNE_HOLD_S / 60:.0f} minutes"
    return (
        f"its plan, if there is anything to do, waits for leave for {hold}, and nothing is done before: 'vmferry job "
        f"finalize {job}' gives it, 'vmferry job cancel {job}' gives the plan up"
    )


def _follow(client: BlockingClient, wire: Wire, *, quiet: bool, until_planned: bool = False) -> Wire:
    """Shows progress until the job is over, or waits for leave. If the agent goes away meanwhile, AgentUnreachable says
    what that means; an interrupt leaves the job at work."""
    line = ProgressLine(wire["kind"], enabled=not quiet)
    gone = ending.without_agent(
        "the next one tells the job as failed, with nothing left that is half there",
        guest="unharmed",
        hint="begin it anew when the agent is back",
    )
    with closing(line), gone:
        while not wire["over"] and not (until_planned and wire["status"] == "planned"):
            line.show({**wire, **wire["progress"]})
            for event in client.events(POLL_S):
                if event.data.get("id") == wire["job"]:
                    break
            wire = dict(agent_client.execute(client, "job-status", {"job": wire["job"]}))
    return wire


def _says_yes() -> bool:
    """What a person answers; no answer, or an interrupt, is a no: nothing was done yet."""
    try:
        return input("Carry this plan out? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        print()
        return False


def _end(wire: Wire, lines: Iterable[str], *, as_json: bool) -> int:
    error = from_wire(wire["error"]) if wire["error"] else None
    if as_json:
        print(json.dumps(wire))
        return 0 if error is None else error.exit_code
    for line in lines:
        print(line)
    if error is None:
        return 0
    sys.stdout.flush()
    if isinstance(error, MigrationCancelled):
        print(wire["sentence"])
    else:
        report_error(error, as_json=False)
    return error.exit_code


# --- what people read -------------------------------------------------------------------------------------------


def _verify_lines(wire: Wire) -> Iterable[str]:
    for name in wire["rebuilt_indexes"]:
        yield f"{name}: made again from its packs"
    for each in wire["not_rebuilt"]:
        yield f"{each['object']}: {each['what']}; its index cannot be made again"
    for problem in wire["problems"]:
        whom = ", ".join(problem["snapshots"]) or "no snapshot"
        yield f"{problem['object']}: {problem['what']} (concerns {whom})"
    read = format_size(wire["read_bytes"])
    yield f"{wire['snapshots']} snapshots, {wire['packs']} packs, {wire['pages']} pages, {read} read"


def _damage(wire: Wire) -> RepositoryError | None:
    if wire["whole"]:
        return None
    names = ", ".join(wire["damaged_snapshots"]) or "none"
    hint = "forget these snapshots, prune with --empty-below 1, and save anew"
    if any(problem["object"].startswith("index/") for problem in wire["problems"]):
        hint = f"indexes can be made again: vmferry verify --rebuild-indexes. What is damaged still: {hint}"
    return RepositoryError(
        f"{len(wire['problems'])} objects are damaged; snapshots that cannot be restored whole: {names}",
        retry="no",
        hint=hint,
    )


def _prune_lines(wire: Wire) -> Iterable[str]:
    if wire.get("plan") is None:
        return
    yield from _plan_lines(wire)
    yield from _done_lines(wire)
    if wire["status"] == "planned":
        yield f"nothing was done yet; to have this plan carried out, within an hour: vmferry job finalize {wire['job']}"


def _plan_lines(wire: Wire) -> Iterable[str]:
    plan = wire["plan"]
    for pin in plan["drop_pins"]:
        yield f"plan: {pin['vm']} on {pin['host']} is lost for good, and does not hold {pin['snapshot'][:12]} any more"
    yield (
        f"plan: remove {plan['remove_packs']} packs, {plan['remove_indexes']} indexes and "
        f"{plan['remove_leftovers']} left-overs, write {plan['rewrite_packs']} packs anew: about "
        f"{format_size(plan['freed_bytes'])}"
    )
    if plan["too_young"]:
        yield f"  {plan['too_young']} objects of which nobody needs all are younger than an hour and stay"


def _done_lines(wire: Wire) -> Iterable[str]:
    for pin in wire["dropped_pins"]:
        yield f"dropped: {pin['vm']} on {pin['host']} does not hold {pin['snapshot'][:12]} any more"
    if wire["done"] is not None:
        yield f"done: {wire['done']['removed']} objects removed, {format_size(wire['done']['removed_bytes'])}"
