"""The funnel out of the destination's side: one match over `DestinationEffect`."""

from __future__ import annotations

import asyncio
import logging
from typing import assert_never

from vmferry.agent import destination_disks, knock, recovery, standing
from vmferry.agent.channel import ChannelDoor
from vmferry.agent.destination import DestinationAttempt
from vmferry.agent.directories import make_directory
from vmferry.agent.machine import Machine
from vmferry.agent.machine_options import set_options
from vmferry.agent.source_act import CHANNEL_NAME
from vmferry.agent.vms import VmDefinition
from vmferry.core.effects import DestinationEffect
from vmferry.core.facts import Fact
from vmferry.core.table import Outcome
from vmferry.errors import HostUnreachable, QemuError, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.pki import job_credentials
from vmferry.qmp.errors import QmpCommandError, QmpTimeout
from vmferry.vm import hardware

log = logging.getLogger("vmferry.agent")

FREEZE_TRIES = 5
FREEZE_ANSWER_S = 0.25
"""QMP answers within a millisecond where nothing holds it up."""
CONT_S = 10.0
"""`cont` opens and locks every disk; network storage may take seconds."""
GIVE_BACK_S = 2.0
"""The source waits for the answer to its grant meanwhile."""
GIVES_BACK_SINCE = (10, 0)
"""QEMU's blockdev-set-active."""


async def act(attempt: DestinationAttempt, effect: DestinationEffect) -> None:
    """Carries one effect out."""
    match effect:
        case DestinationEffect.SPAWN:
            await _spawn(attempt)
        case DestinationEffect.CLOSE_EXPORTS:
            await destination_disks.close_exports(attempt)
        case DestinationEffect.START_CPUS:
            await _start_cpus(attempt)
        case DestinationEffect.REPORT_RAN:
            await _report_ran(attempt)
        case DestinationEffect.RENOUNCE:
            await _renounce(attempt)
        case DestinationEffect.FREEZE:
            await _freeze(attempt)
        case DestinationEffect.THAW:
            await _thaw(attempt)
        case DestinationEffect.REPORT_DIED:
            await _report_died(attempt)
        case _:
            assert_never(effect)


async def _spawn(attempt: DestinationAttempt) -> None:
    """Raises when QEMU cannot be started or refuses an option; RENOUNCE then cleans up."""
    context, place = attempt.context, attempt.place
    definition = VmDefinition.from_wire(place.definition)
    argv = definition.incoming_argv(attempt.runtime, context.config.qemu)
    make_directory(attempt.runtime.directory)
    await destination_disks.make_images(attempt)
    launching = asyncio.create_task(context.host.launch(attempt.vm, argv, attempt.runtime, clock=context.clock))
    try:
        await asyncio.sleep(0)  # the process is there; what does not need it is made while it starts
        credentials = _make_credentials(attempt)
    except BaseException:
        launching.cancel()
        await asyncio.gather(launching, return_exceptions=True)
        raise
    machine = await launching
    attempt.use(machine)
    offer: dict[str, object] = {"qemu": machine.version_text, "pid": machine.pid, "token": "", "uri": ""}
    commands = list(place.commands)
    if credentials is not None:
        priority = job_credentials.tls_priority(machine.version)
        creds = job_credentials.tls_creds_object(attempt.job, "destination", context.job_directory, priority=priority)
        commands.insert(0, ("object-add", creds))
        offer["ca_pem"] = credentials.ca_pem_own.decode()
    # Side by side: QEMU answers one after another, and the agent need not wait between two questions.
    seen, _ = await asyncio.gather(hardware.look(machine.execute), set_options(machine, commands, place.expected))
    offer["hardware"] = [list(part) for part in seen.parts]
    ports = knock.ports_of(attempt.job, *context.config.migration_ports)
    if place.recovery_token and ports:
        offer["recovery"] = {"token": place.recovery_token, "hosts": context.config.data_addresses, "ports": ports}
    if place.disks:
        offer["disks"] = await destination_disks.serve(attempt)  # the door is opened when they are there: `open_door`
    else:
        offer |= await open_door(attempt)
    attempt.note(Fact.LISTENING)
    if not attempt.offer.done():
        attempt.offer.set_result(offer)


async def open_door(attempt: DestinationAttempt) -> dict[str, object]:
    """Where the source may come with memory now. Raises Unfit or QemuError; nothing waits for it then."""
    context, machine = attempt.context, attempt.machine
    assert machine is not None
    if attempt.place.multifd:
        info = await machine.migration()
        if info.get("socket-address"):  # asked for again: QEMU listens already
            return {"addresses": [], "uri": recovery.uri_of(info)}
        return {"addresses": [], "uri": await recovery.listen_inside(attempt)}
    first, last = context.config.migration_ports
    listener = await context.host.open_channels(attempt.job, context.config.data_addresses, range(first, last + 1))
    if attempt.listener is not None:
        await attempt.listener.close()
    attempt.listener = listener
    token = listener.expect("main").token.hex()
    context.keep_task(asyncio.create_task(_accept(attempt, listener), name=f"accept-{attempt.job}"))
    return {"addresses": [list(address) for address in listener.addresses], "token": token}


def _make_credentials(attempt: DestinationAttempt) -> job_credentials.JobCredentials | None:
    """This side's half of the job's certificates, on disk for QEMU; None in clear text. Raises NotTrusted, Unfit."""
    if attempt.peer_ca is None:
        return None
    context = attempt.context
    credentials = job_credentials.make(attempt.job, "destination", context.job_directory, now=context.utc_now())
    attempt.credentials = credentials
    credentials.accept_peer(attempt.peer_ca)
    return credentials


async def _accept(attempt: DestinationAttempt, listener: ChannelDoor) -> None:
    """Waits for the source's connection and hands it to QEMU."""
    machine = attempt.machine
    assert machine is not None
    try:
        channel = await listener.arrived("main", deadline_s=recovery.ARRIVE_S)
        attempt.heard_source_s = attempt.clock.now_s()
        await recovery.hand_over(attempt, channel, CHANNEL_NAME)
        arguments: dict[str, object] = {"uri": f"fd:{CHANNEL_NAME}"}
        if machine.version >= (9, 1):
            arguments["exit-on-error"] = False  # keep the process, so that its words can be read
        await machine.execute("migrate-incoming", arguments)
        await listener.close()
    except (HostUnreachable, QemuError) as error:
        if attempt.listener is listener:  # else it was asked for anew meanwhile
            attempt.fail(error)


async def _start_cpus(attempt: DestinationAttempt) -> None:
    """`cont`: takes the disks' locks and starts. A refusal means that it never ran."""
    machine = attempt.machine
    assert machine is not None
    if not attempt.place.run_after:
        await machine.run_state()  # it lives: from here on the source's copy is old
        attempt.note(Fact.TARGET_RAN, text="taken over; it stays paused as it was before", by="agent")
        return
    tries = attempt.facts.last_round(Fact.START_SENT) + 1
    attempt.note(Fact.START_SENT, round_no=tries)
    try:
        await machine.execute("cont", deadline_s=CONT_S)
    except QmpCommandError as error:
        await _give_locks_back(machine)
        attempt.note(Fact.START_REFUSED, round_no=tries, text=error.desc, by="destination QEMU")
        return
    except QmpTimeout:
        attempt.unanswered = machine.client
        raise
    if await machine.run_state() == "running":
        attempt.note(Fact.TARGET_RAN, text="cont", by="destination QEMU")
    else:
        # cont said yes and the guest does not run: as good as a refusal, and told as one.
        attempt.note(Fact.START_REFUSED, round_no=tries, text="cont had no effect", by="destination QEMU")


async def _give_locks_back(machine: Machine) -> None:
    """Of several disks a refused start may have taken some. A guest that does not run keeps nobody from them, where its
    QEMU can give them back; an older one keeps them until it ends. Trouble is a line in the log: nothing depends on it.
    """
    if machine.version < GIVES_BACK_SINCE:
        return
    try:
        await machine.execute("blockdev-set-active", {"active": False}, deadline_s=GIVE_BACK_S)
    except QemuError as error:
        log.warning("vm=%s command=blockdev-set-active result=%s", machine.vm, error)


async def _report_ran(attempt: DestinationAttempt) -> None:
    """The guest is this host's own from here on. Ends the attempt once no page is missing."""
    if Fact.RUN_ACKED not in attempt.facts:
        await attempt.context.adopt_arrived(attempt)
        attempt.note(Fact.RUN_ACKED, by="agent")
    if attempt.policy.pauses and not attempt.cpu_threads:
        await _learn_threads(attempt)
    if Fact.ALL_SENT in attempt.facts:
        await _finish(attempt, Outcome.DESTINATION)


async def _learn_threads(attempt: DestinationAttempt) -> None:
    """While QEMU answers: when it is to be frozen it may not. Trouble is a line in the log."""
    assert attempt.machine is not None
    try:
        cpus = await attempt.machine.execute("query-cpus-fast", deadline_s=1.0)
    except QemuError as error:
        log.warning("job=%s vm=%s command=query-cpus-fast result=%s", attempt.job, attempt.vm, error)
        return
    attempt.cpu_threads = tuple(sorted({int(cpu["thread-id"]) for cpu in cpus}))


async def _freeze(attempt: DestinationAttempt) -> None:
    """Stops the guest's CPUs, now, whatever QEMU's main loop does. Raises QemuError; they run on then, and it is tried
    again.

    1. a CPU is stopped while it holds QEMU's big lock  2. QMP is silent, and a recovery could not begin: so it is let
    go for a moment and stopped again. A QEMU that was silent before is left stopped: a CPU that waits for a page with
    the lock in its hands is such a case."""
    machine = attempt.machine
    assert machine is not None
    answered = await _answers(attempt)
    if answered and not attempt.cpu_threads:
        await _learn_threads(attempt)
    if not attempt.cpu_threads:
        raise QemuError(f"{attempt.vm}: which threads are its CPUs is not known", guest="running-on-destination")
    freezer = attempt.context.host.freezer(machine.pid)
    for _ in range(FREEZE_TRIES):
        await freezer.freeze(attempt.cpu_threads)
        if not answered or await _answers(attempt):
            break
        await freezer.thaw()
    else:
        await freezer.close()
        raise QemuError(f"{attempt.vm}: its QEMU does not answer while its CPUs are stopped", side="destination")
    attempt.freezer = freezer
    attempt.note(Fact.FROZEN, round_no=attempt.facts.last_round(Fact.FROZEN) + 1, text="policy: pause", by="agent")


async def _answers(attempt: DestinationAttempt) -> bool:
    assert attempt.machine is not None
    try:
        await attempt.machine.run_state(deadline_s=FREEZE_ANSWER_S)
    except QemuError:
        return False
    return True


async def _thaw(attempt: DestinationAttempt) -> None:
    freezer, attempt.freezer = attempt.freezer, None
    if freezer is not None:
        await freezer.close()
        attempt.note(Fact.THAWED, round_no=attempt.facts.last_round(Fact.FROZEN), by="agent")


async def _renounce(attempt: DestinationAttempt) -> None:
    """Makes durable that the QEMU, which never ran, never will, and kills it. Only then is it said.

    Durable first: 1. an order to start is in the journal, and was refused  2. the QEMU is killed  3. the agent dies
    4. the next one finds an order and no QEMU, and must take the guest for one that ran and died.

    With the reason: 1. QEMU is asked something  2. it dies  3. the table hears of that, not of a question without an
    answer, and nobody has looked why."""
    attempt.note_exit()
    if not attempt.is_renounced:
        await attempt.context.journal.append(Entry.RENOUNCED, attempt.job, {"text": attempt.error_text})
        attempt.is_renounced = True
    if attempt.machine is not None and not await attempt.machine.kill():
        raise QemuError(f"{attempt.vm}: process {attempt.machine.pid} does not end", side="destination")
    kept = await destination_disks.keep_for_next_try(attempt)
    destination_disks.remove_images(attempt, but=kept)
    attempt.note(Fact.TARGET_GONE, text=attempt.error_text, by="agent")
    await _finish(attempt, Outcome.SOURCE)


async def _report_died(attempt: DestinationAttempt) -> None:
    attempt.note(Fact.TARGET_DIED, text=attempt.context.tail_log(attempt.runtime), by="kernel")
    await _finish(attempt, Outcome.LOST)


async def _finish(attempt: DestinationAttempt, outcome: Outcome) -> None:
    """Gives back sockets and credentials; the runtime directory too unless the guest lives there now."""
    await _thaw(attempt)
    await standing.close(attempt)
    if attempt.listener is not None:
        await attempt.listener.close()
    for channel in attempt.channels:
        channel.close()
    if not attempt.place.clear_text:
        await _drop_credentials(attempt)
    await attempt.context.journal.append(Entry.ENDED, attempt.job, attempt.result_wire(outcome))
    attempt.note(Fact.CLEANUP)
    attempt.ended.set()
    await attempt.context.place_ended(attempt, outcome)


async def _drop_credentials(attempt: DestinationAttempt) -> None:
    job_credentials.remove_job(attempt.job, attempt.context.job_directory)
    if attempt.machine is None or attempt.machine.is_gone:
        return
    creds = job_credentials.tls_creds_object(attempt.job, "destination", attempt.context.job_directory)
    unset = ("migrate-set-parameters", {"tls-creds": "", "tls-hostname": ""})
    # Each is sent whatever becomes of the other: a QEMU that does not answer in time carries them out later.
    for command, arguments in (unset, ("object-del", {"id": creds["id"]})):
        try:
            await attempt.machine.execute(command, arguments)
        except VmferryError as error:
            log.info("job=%s vm=%s command=%s result=%s", attempt.job, attempt.vm, command, error)
