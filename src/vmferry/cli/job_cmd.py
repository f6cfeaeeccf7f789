"""`vmferry jobs`, `vmferry job`, `vmferry block`, `vmferry unblock`."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from vmferry.cli import client as agent_client
from vmferry.cli.render import table, time_left
from vmferry.errors import UsageError
from vmferry.units import format_size

SHOWN_ID = 12
"""So much of an id tells jobs apart; any beginning that only one job has is understood. Of the job of a disk its end is
shown and said too: '-disk-0'."""
_DISK = "-disk-"


def jobs(arguments: Namespace) -> int:
    """Every job of this host's agent that is not dismissed."""
    listed = agent_client.once(arguments.socket, "query-jobs")
    if arguments.json:
        print(json.dumps({"jobs": listed}))
        return 0
    if not listed:
        print("no jobs")
        return 0
    heads = ("JOB", "VM", "TYPE", "STATE", "DETAIL", "PROGRESS", "LEFT", "TAKES")
    rows = [
        (
            short(job["id"]),
            job["vm"],
            job["type"],
            job["status"],
            job["detail"],
            _progress(job),
            _left(job),
            ", ".join(job["verbs"]),
        )
        for job in listed
    ]
    for line in table(heads, rows):
        print(line)
    for job in listed:
        for word in ("reason", "error"):
            if job.get(word):
                print(f"{short(job['id'])}: {job[word]}")
    return 0


def short(job: str) -> str:
    """An id as it is shown."""
    whole, disk, number = job.partition(_DISK)
    return whole[:SHOWN_ID] + disk + number


def _begins(job: str, word: str) -> bool:
    """Whether a person may mean this job: the beginning of its id, and the end of it if it is a disk's."""
    (whole, _, number), (said, _, wanted) = job.partition(_DISK), word.partition(_DISK)
    return len(said) >= 4 and whole.startswith(said) and number == wanted


def _progress(job: dict[str, Any]) -> str:
    if not job["total-progress"]:
        return ""
    if job.get("percent") is None:
        is_disk = _DISK in job["id"]
        return f"{format_size(job['current-progress'])} of {format_size(job['total-progress'])}" if is_disk else ""
    wrong = f" ± {job['percent-error']}" if job.get("percent-error") else ""
    return f"{job['percent']}{wrong} % of {format_size(job['total-progress'])}"


def _left(job: dict[str, Any]) -> str:
    if job["status"] == "concluded":
        return ""
    return time_left(job.get("left-ms-min"), job.get("left-ms-max")).removeprefix(", ")


def find(listed: list[dict[str, Any]], word: str) -> str:
    """The id of the job that a person means: by its id, the beginning of it, or its VM (then not a disk's). Raises
    UsageError if that is more than one; a word that fits none is left to the agent to refuse."""
    for fits in (
        [job for job in listed if job["id"] == word],
        [job for job in listed if job["vm"] == word and _DISK not in job["id"]],
        [job for job in listed if _begins(job["id"], word)],
    ):
        ids = sorted({job["id"] for job in fits})
        if len(ids) > 1:
            raise UsageError(f"{word!r} may be any of {len(ids)} jobs: {', '.join(ids)}")
        if ids:
            return str(ids[0])
    return word


def act(arguments: Namespace) -> int:
    """One verb on one job. 0: it is done, or nothing was left to do."""
    changes = list(arguments.settings)
    if (arguments.verb == "change") != bool(changes):
        raise UsageError("'vmferry job change JOB' takes NAME=VALUE, and no other verb does")
    with agent_client.connect(arguments.socket) as client:
        job = find(agent_client.execute(client, "query-jobs"), arguments.job)
        wish: dict[str, Any] = {"id": job}
        if changes:
            modes = [text.partition("=")[2] for text in changes if text.startswith("mode=")]
            wish |= {"type": "mirror"} if _DISK in job else {}
            wish |= {"settings": [text for text in changes if not text.startswith("mode=")]}
            wish |= {"mode": modes[-1]} if modes else {}
        wire = agent_client.execute(client, f"job-{arguments.verb}", wish)
    print(json.dumps(wire) if arguments.json else f"job {job}: {wire['status']}")
    return 0


def block(arguments: Namespace) -> int:
    """Holds a blocker."""
    wish = {"vm": arguments.vm, "operation": arguments.operation, "name": arguments.name, "reason": arguments.reason}
    wire = agent_client.once(arguments.socket, "blocker-add", wish)
    print(json.dumps(wire) if arguments.json else blocker_line(wire))
    return 0


def unblock(arguments: Namespace) -> int:
    """Removes one."""
    wire = agent_client.once(arguments.socket, "blocker-remove", {"vm": arguments.vm, "name": arguments.name})
    print(json.dumps(wire) if arguments.json else f"{arguments.vm}: {arguments.name} blocks nothing any more")
    return 0


def blocker_line(wire: dict[str, Any]) -> str:
    """One blocker for people."""
    return f"{wire['operation']} is blocked by {wire['name']}: {wire['reason']} (until {wire['until']})"
