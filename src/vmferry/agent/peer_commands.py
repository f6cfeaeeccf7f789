"""Commands of other agents. Who asks is known by the certificate; what is asked is an offer, a question, or an
order that carries the job's generation.

Rule 1: an order for a job that is not known here is answered with what that proves, never with a guess.
Rule 2: the answer to everything about a place is `facts_wire`, whole.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry.agent import control, destination_act, destination_disks, inspection, knock, recovery, restores
from vmferry.agent.destination import DestinationAttempt
from vmferry.agent.peers import PROTOCOL, PROTOCOLS_SPOKEN
from vmferry.agent.wants import Place, PlacedDisk
from vmferry.core.facts import Fact
from vmferry.core.policy import FailurePolicy
from vmferry.core.table import Outcome
from vmferry.core.view import Incoming
from vmferry.errors import Busy, HostUnreachable, NotTrusted, QemuError, UsageError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.pki import tls
from vmferry.qmp.server import CommandNotFound, Session

if TYPE_CHECKING:
    from vmferry.agent.agent import Agent

log = logging.getLogger("vmferry.agent")

FORWARDED = frozenset({"vm-restore", "restore-status"})
"""Commands without a VM that another host's agent may ask for a person there."""
GRANT_WAIT_S = 4.0
RELEASE_WAIT_S = 4.0
WHY_WAIT_S = 0.3
DIGESTS_S = 3600.0
"""Nobody waits for checksums of disks longer than that: a guest is paused for them."""
"""A QEMU that dies or refuses a stream is seen here within milliseconds; the guest may be paused meanwhile."""


async def handle(agent: Agent, session: Session, name: str, arguments: dict[str, Any]) -> Any:
    """One command of another agent. Raises the command's own error."""
    who = caller(agent, session)
    body = COMMANDS.get(name)
    if body is None:
        raise CommandNotFound(name)
    return await body(agent, who, arguments)


def caller(agent: Agent, session: Session) -> str | None:
    """The calling agent's name by its certificate; None over clear text. Raises NotTrusted for a stranger."""
    certificate = session.peer.certificate
    if not certificate:
        return None

    name = tls.name_in(certificate)
    if name not in agent.config.peers:
        raise NotTrusted(f"{name} is not among the peers of {agent.config.name}", side="client")
    return name


async def _hello(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    spoken = int(arguments.get("protocol", 0))
    if spoken not in PROTOCOLS_SPOKEN:
        raise NotTrusted(
            f"{agent.config.name} speaks protocol {PROTOCOL} and was spoken to in {spoken}",
            hint="upgrade the older agent; guests that run are not concerned",
        )
    return {"name": agent.config.name, "time": agent.clock.wall_s(), "protocol": PROTOCOL}


async def _has(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Whether a VM of this name is here, is sent from here, is awaited here, or is being brought here by a command at
    this moment."""
    vm = str(arguments["vm"])
    kept, place, current = agent.vms.get(vm), agent.place_of(vm), agent.attempts.get(vm)
    return {
        "has": kept is not None,
        "generation": kept.generation if kept else 0,
        "awaits": place is not None and not place.ended.is_set(),
        "sends": current is not None and not current.ended.is_set(),
        "doing": agent.claims.doing(vm) or ("restored" if agent.restores.active(vm) is not None else ""),
    }


async def _runs(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Whether this host keeps the VM, and its guest runs now. Raises QemuError when its QEMU does not say."""
    kept = agent.vms.get(str(arguments["vm"]))
    if kept is None or kept.machine is None or kept.machine.is_gone:
        return {"runs": False, "known": kept is not None}
    return {"runs": await kept.machine.run_state() == "running", "known": True}


async def _identities(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the VMs of this host could clash with, and which images disks of this host lie on."""
    found = [*restores.local_identities(agent), *await agent.restores.disks.bases()]
    return {"identities": [each.to_wire() for each in found]}


async def _list(agent: Agent, who: str | None, arguments: dict[str, Any]) -> Any:
    return await control.handle(agent, "vm-list", {"local": True}, forward=False)


async def _forward(agent: Agent, who: str | None, arguments: dict[str, Any]) -> Any:
    """What a person at another host asks of a VM here. Nothing else: files of this host are read and written for people
    of this host only."""
    name = str(arguments["command"])
    row = control.COMMANDS.get(name)
    if row is None or not (row.at_vm or name in FORWARDED):
        raise CommandNotFound(name)
    return await control.handle(agent, name, dict(arguments["arguments"]), forward=False)


async def _report(agent: Agent, who: str | None, arguments: dict[str, Any]) -> Any:
    return await agent.planner.report_wire(arguments)


async def _prepare(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Makes a place. Idempotent by job; the answer is the offer. Raises what makes it impossible."""
    vm, place = str(arguments["vm"]), agent.places.get(str(arguments["job"]))
    _refuse_other(agent, who, arguments, place)
    if place is None:
        with agent.claims.hold(vm, "awaited", side="destination"):
            place = await _new_place(agent, who, arguments)
    try:
        return await place.offer
    except VmferryError:
        # The refusal is told when nothing is left of the place: who hears it may ask for another one at once.
        await place.until(Fact.CLEANUP, deadline_s=RELEASE_WAIT_S)
        raise


def _refuse_other(agent: Agent, who: str | None, arguments: dict[str, Any], place: DestinationAttempt | None) -> None:
    """What one place says is never said of another: its guest would be taken for one that ran here."""
    if place is None:
        return
    vm, source = str(arguments["vm"]), who or str(arguments.get("source", place.place.source))
    if (place.vm, place.place.source) != (vm, source):
        raise Busy(
            f"{agent.config.name} has job {place.job} for {place.vm} from {place.place.source}, and none for {vm} from "
            f"{source}",
            side="source",
            retry="no",
            hint="begin the migration anew, without an id of your own",
        )


async def _new_place(agent: Agent, who: str | None, arguments: dict[str, Any]) -> DestinationAttempt:
    """Checks, journals, registers. Raises Busy or NotTrusted; nothing was done then."""
    vm, job = str(arguments["vm"]), str(arguments["job"])
    _refuse_given_up(agent, job)
    if vm in agent.vms:
        raise Busy(f"{agent.config.name} keeps a VM named {vm} already", side="destination")
    if agent.restores.active(vm) is not None:
        raise Busy(f"{agent.config.name} is restoring a VM named {vm}", side="destination")
    other = agent.place_of(vm)
    if other is not None and not await other.is_given_up(deadline_s=RELEASE_WAIT_S):
        raise Busy(f"{agent.config.name} has a place for {vm} from job {other.job}", side="destination")
    ca_pem = arguments.get("ca_pem")
    if ca_pem is None:
        _agree_to_clear_text(agent, arguments)
    wanted = Place(
        job=job,
        vm=vm,
        source=who or str(arguments["source"]),
        generation=int(arguments["generation"]),
        definition=dict(arguments["definition"]),
        run_after=bool(arguments.get("run_after", True)),
        commands=tuple((str(name), dict(args)) for name, args in arguments["commands"]),
        expected=dict(arguments["expected"]),
        multifd=bool(arguments.get("multifd")),
        clear_text=ca_pem is None,
        policy=msgspec.convert(arguments.get("policy") or {}, FailurePolicy),
        disks=msgspec.convert(arguments.get("disks") or (), tuple[PlacedDisk, ...]),
        recovery_token=secrets.token_hex(knock.TOKEN_BYTES),
        auto_dismiss=bool(arguments.get("auto_dismiss", True)),
        blockers=tuple(dict(blocker) for blocker in arguments.get("blockers", ())),
        directory=str(agent.vm_directory / f"{vm}-{job[:8]}"),
    )
    place = DestinationAttempt(agent, wanted)
    place.peer_ca = None if ca_pem is None else str(ca_pem).encode()
    await agent.journal.append(Entry.PLACE_WANTED, job, msgspec.to_builtins(wanted))
    # 1. that is being written  2. a release of the job comes, finds no place and renounces it  3. it would be made all
    # the same, and wait for a source that has heard that it is gone.
    _refuse_given_up(agent, job)
    agent.run_place(place)
    return place


def _refuse_given_up(agent: Agent, job: str) -> None:
    if job in agent.known_jobs:
        raise Busy(f"{agent.config.name} gave the place of job {job} up for good", side="destination")


def _agree_to_clear_text(agent: Agent, arguments: dict[str, Any]) -> None:
    """A person who names it on the command line has asked by name; the source's agent says so over its own link. Raises
    NotTrusted where nobody did, or where this agent was told to have no part in it."""
    if agent.config.tls_only:
        raise NotTrusted(
            f"{agent.config.name} takes no guest's memory in clear text (tls_only)",
            side="destination",
            hint="leave out --clear-text, or take tls_only out of that agent's settings",
        )
    if not (arguments.get("clear_text") or agent.config.clear_text):
        raise NotTrusted(
            f"job {arguments['job']} came to {agent.config.name} without credentials, and nobody asked for clear text",
            side="source",
            hint="upgrade the source's agent; for clear text say --clear-text",
        )


def _place(agent: Agent, arguments: dict[str, Any]) -> DestinationAttempt | None:
    place = agent.places.get(str(arguments["job"]))
    if place is not None:
        place.heard_source_s = agent.clock.now_s()
    return place


async def _unknown_place(agent: Agent, arguments: dict[str, Any]) -> dict[str, Any]:
    """A job that this agent knows nothing of: its journal has no place for it, so nothing of it ever ran here,
    and it is written down that nothing ever will. Raises UsageError while the journal says otherwise."""
    job = str(arguments["job"])
    if job in agent.known_jobs:
        raise UsageError(f"job {job} ended on {agent.config.name}", side="destination")
    if arguments.get("granted"):
        # A journal may be lost or shortened: that nothing is known proves nothing once an order to start was sent.
        raise HostUnreachable(
            f"{agent.config.name} knows nothing of job {job} any more; whether the guest ran there is not known",
            side="destination",
            guest="unknown",
            retry="no",
            hint=f"look on {agent.config.name} whether the guest runs there before anything is started",
        )
    place = Place(job=job, vm="", source="", generation=int(arguments["generation"]), definition={})
    await agent.journal.append(Entry.PLACE_WANTED, job, msgspec.to_builtins(place))
    await agent.journal.append(Entry.RENOUNCED, job, {"text": "no place was ever made"})
    agent.known_jobs[job] = {"gone": True, "text": "no place was ever made", "job": job}
    return agent.known_jobs[job]


async def _target(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """What is known of the place. With `why` the source's QEMU has just given up: is this side the reason?"""
    place = _place(agent, arguments)
    if place is not None:
        if arguments.get("why"):
            await place.look_for_error(deadline_s=WHY_WAIT_S)
        return place.facts_wire()
    known = agent.known_jobs.get(str(arguments["job"]))
    return known if known is not None else await _unknown_place(agent, arguments)


async def _door(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The disks are there: where the source may come with memory. Asked again, it is another door. Raises QemuError
    or Unfit; nothing waits for the source then."""
    place = _place(agent, arguments)
    if place is None or place.machine is None or place.machine.is_gone:
        raise QemuError(f"{agent.config.name} has no QEMU for job {arguments['job']} any more", side="destination")
    place.has_whole_copies = bool(arguments.get("disks_ready"))
    return await destination_act.open_door(place)


async def _forget_copies(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The job was cancelled: nobody means to try again, and whole copies of its disks are not kept."""
    place = _place(agent, arguments)
    if place is not None:
        await place.until(Fact.CLEANUP, deadline_s=RELEASE_WAIT_S)
    await agent.left_images.forget_tries(str(arguments["job"]))
    return {}


async def _digests(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the copies of the disks hold now, one checksum each. Raises QemuError, or Unfit when one cannot be read."""
    place = _place(agent, arguments)
    if place is None or place.machine is None or place.machine.is_gone:
        raise QemuError(f"{agent.config.name} has no QEMU for job {arguments['job']} any more", side="destination")
    reading = asyncio.create_task(destination_disks.digests(place), name=f"digests-{place.job}")
    over = asyncio.create_task(
        place.until(Fact.RELEASE, Fact.CLEANUP, deadline_s=DIGESTS_S), name=f"digests-over-{place.job}"
    )
    try:
        await asyncio.wait({reading, over}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise QemuError(f"the place of job {place.job} on {agent.config.name} was given up", side="destination")
        return reading.result()
    finally:
        for task in (reading, over):
            task.cancel()
        await asyncio.gather(reading, over, return_exceptions=True)


async def _ready(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """During the source's pause: is the QEMU here and loading? Facts say so; a dead one is in them too."""
    place = _place(agent, arguments)
    if place is None:
        return await _target(agent, who, arguments)
    if place.machine is None or place.machine.is_gone:
        place.wake()
        await place.until(Fact.TARGET_GONE, deadline_s=RELEASE_WAIT_S)
    return place.facts_wire()


async def _grant(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The right to run. Answers when the guest runs, was refused by QEMU, or after a while with what is so."""
    place = _place(agent, arguments)
    if place is None:
        return await _target(agent, who, arguments)
    refused = place.facts.last_round(Fact.START_REFUSED)
    await place.grant(int(arguments["generation"]))
    deadline_s = agent.clock.now_s() + GRANT_WAIT_S
    while agent.clock.now_s() < deadline_s and not place.ended.is_set():
        if Fact.RUN_ACKED in place.facts or place.facts.last_round(Fact.START_REFUSED) > refused:
            break
        await place.until_change(deadline_s=deadline_s - agent.clock.now_s())
    return place.facts_wire()


async def _release(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The source wants the guest back. Answers when this side renounced, or with what keeps it from that."""
    place = _place(agent, arguments)
    if place is None:
        return await _target(agent, who, arguments)
    if arguments.get("source_gone"):
        # 1. the source's QEMU sends the last byte and dies  2. its agent wants the place released, and has not heard
        # 3. that this side has loaded: what would be given up is the only copy.
        await place.look_for_error(deadline_s=WHY_WAIT_S)
        if Fact.LOADED in place.facts or place.incoming() is Incoming.UNKNOWN:
            return place.facts_wire()
    if Fact.TARGET_RAN not in place.facts:
        place.note(Fact.RELEASE, by=who or "source agent")
        await place.until(Fact.TARGET_GONE, Fact.RUN_ACKED, deadline_s=RELEASE_WAIT_S)
    return place.facts_wire()


async def _reconnect(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Postcopy lost its channel: make this side ready for a new one. The answer is where to connect."""
    place = _place(agent, arguments)
    if place is None or place.machine is None or place.machine.is_gone:
        raise QemuError(f"{agent.config.name} has no QEMU for job {arguments['job']} any more", side="destination")
    after = arguments.get("after")
    return await recovery.reconnect(place, after=None if after is None else int(after))


async def _recovering(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Answers when the channel to recover on is here and QEMU waits for it. Raises what kept it from that."""
    place = _place(agent, arguments)
    if place is None or place.machine is None or place.machine.is_gone:
        raise QemuError(f"{agent.config.name} has no QEMU for job {arguments['job']} any more", side="destination")
    await asyncio.shield(place.recovering)
    return place.facts_wire()


async def _inspect(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """This host's side of a job, for a person at the other one."""
    return await inspection.here(agent, str(arguments["vm"]), str(arguments["job"]))


async def _policy(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The job's policies were changed at the source. Durable before the answer."""
    place = _place(agent, arguments)
    if place is None:
        return await _target(agent, who, arguments)
    await place.change_policy(dict(arguments["policy"]))
    return place.facts_wire()


async def _wanted(agent: Agent, who: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """A destination asks whether its place is still wanted. The answer is no only where the job ended with the guest
    here: of a job that is not known, or whose guest was lost with its process, the place may have the only copy. That
    the job is over is said beside it, for a place that knows that nothing of the guest ever came to it."""
    found = agent.outcome_of(str(arguments["job"]))
    outcome = None if found is None else Outcome(found)
    return {"wanted": outcome is not Outcome.SOURCE, "over": outcome in (Outcome.SOURCE, Outcome.LOST)}


COMMANDS: dict[str, Callable[[Agent, str | None, dict[str, Any]], Awaitable[Any]]] = {
    "peer-hello": _hello,
    "peer-has": _has,
    "peer-runs": _runs,
    "peer-list": _list,
    "peer-identities": _identities,
    "peer-forward": _forward,
    "peer-report": _report,
    "peer-prepare": _prepare,
    "peer-door": _door,
    "peer-forget-copies": _forget_copies,
    "peer-digests": _digests,
    "peer-ready": _ready,
    "peer-grant": _grant,
    "peer-target": _target,
    "peer-release": _release,
    "peer-reconnect": _reconnect,
    "peer-recovering": _recovering,
    "peer-policy": _policy,
    "peer-inspect": _inspect,
    "peer-wanted": _wanted,
}
