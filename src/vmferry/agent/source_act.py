"""The funnel out of the source's side: one match over `Effect`. The loop has checked the guard just before.

Each hand does one thing and records what it proved. A hand that raises has the effect described in its
docstring; `SourceAttempt.on_trouble` turns the exception into a fact or a reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, Literal, assert_never

import msgspec

from vmferry import limits
from vmferry.agent import channel as channels
from vmferry.agent import fences, mirror_jobs, plan_disks, reconnect, source_disks, way_back
from vmferry.agent.machine_options import remember_options, set_options
from vmferry.agent.plan import Plan
from vmferry.agent.source import SourceAttempt
from vmferry.agent.wants import RecoveryWay
from vmferry.core import hazards
from vmferry.core.blockers import Operation
from vmferry.core.effects import Effect
from vmferry.core.facts import Fact
from vmferry.core.option_table import OPTIONS, Kind, Role
from vmferry.core.options import Mode
from vmferry.core.table import Outcome
from vmferry.core.view import Source, is_fenced, source_view
from vmferry.errors import HostUnreachable, MigrationFailed, PlanRefused, QemuError, Unfit, VmferryError
from vmferry.jobs.journal import Entry
from vmferry.pki import job_credentials
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout
from vmferry.vm import hardware
from vmferry.vm.runtime import RuntimePaths

log = logging.getLogger("vmferry.agent")

PREPARE_S = 30.0
"""The destination starts a QEMU; one that preallocates much memory takes seconds."""
PLACE_ASK_S = 6.0
"""Most places are there within a second or two: a word that was lost is said again."""
DIAL_S = 5.0
DOOR_S = 5.0
READY_S = 1.5
GRANT_S = 5.0
"""The destination writes its journal and starts the CPUs; longer than this and it is asked again."""
RELEASE_S = 2.0
CANCEL_S = 0.5
"""How long an in-band cancel may take before the channel is cut; QMP may hang in a switchover."""
CONT_S = 10.0
CHANNEL_NAME = "vmferry-main"
SETTLE_S = 2.0
DYING_S = 2.0
"""A QEMU whose session has just ended is most likely dying, for as long as giving its memory back takes."""
AT_ONCE_BYTES_PER_S: Final = 100_000
"""10 kB in QEMU's rate window of 100 ms, which is 4 MiB of empty pages: no guest is sent whole in it."""
_Command = tuple[str, dict[str, Any]]


async def act(attempt: SourceAttempt, effect: Effect) -> None:
    """Carries one effect out."""
    match effect:
        case Effect.CHECK_PLAN:
            await _check_plan(attempt)
        case Effect.PREPARE:
            await _prepare(attempt)
        case Effect.CONFIGURE:
            await _configure(attempt)
        case Effect.START_MIRRORS | Effect.DRAIN_MIRRORS | Effect.DROP_MIRRORS | Effect.NOTE_DISK_ERROR:
            await _mirror(attempt, effect)
        case Effect.START:
            await _start(attempt)
        case Effect.START_POSTCOPY:
            await _start_postcopy(attempt)
        case Effect.LET_PAGES_GO:
            await way_back.let_pages_go(attempt)
        case Effect.PAUSE_PAGES:
            await attempt.machine.execute("migrate-pause", oob=True)
            attempt.refresh()
        case Effect.MAKE_SURE:
            attempt.hear_target(await attempt.ask_facts("peer-ready", deadline_s=READY_S))
            attempt.note(Fact.TARGET_READY, by="destination agent")
        case Effect.CONTINUE:
            await _continue(attempt)
        case Effect.COMMIT:
            await _commit(attempt)
        case Effect.SEND_GRANT:
            if Fact.GRANT_SENT not in attempt.facts and attempt.plan is not None:
                attempt.stamps = fences.stamps(attempt.plan.fence_paths)
            source_disks.stamp_images(attempt)
            attempt.note(Fact.GRANT_SENT)  # before the send: from here on it may have arrived
            attempt.set_readings(target_answers=False)  # and until it is answered nobody knows what is so there
            attempt.hear_target(await attempt.ask_facts("peer-grant", deadline_s=GRANT_S))
        case Effect.ASK_TARGET:
            attempt.hear_target(await attempt.ask_facts("peer-target", deadline_s=READY_S))
        case Effect.RELEASE_TARGET:
            gone = attempt.machine.is_gone
            await way_back.keep_pages_left(attempt)
            attempt.hear_target(await attempt.ask_facts("peer-release", deadline_s=RELEASE_S, source_gone=gone))
        case Effect.RECONNECT:
            await reconnect.reconnect(attempt)
        case Effect.CANCEL_SOURCE:
            await _cancel_source(attempt)
        case Effect.RESUME_SOURCE:
            await _resume(attempt)
        case Effect.BRING_BACK:
            await way_back.bring_back(attempt)
        case Effect.THROW_AWAY:
            await way_back.throw_away(attempt)
        case Effect.FENCE_TARGET:
            await way_back.fence(attempt)
        case Effect.STOP_SOURCE:
            await attempt.machine.execute("stop", deadline_s=CONT_S)
            attempt.refresh()
        case Effect.RETIRE_SOURCE:
            await _retire(attempt)
        case Effect.NOTE_TARGET_LOST:
            _note_target_lost(attempt)
        case Effect.NOTE_TIMEOUT:
            row = attempt.row()
            attempt.fail(MigrationFailed(f"no progress within {row.limit_ms} ms ({row.label})", side="both"))
        case Effect.NOTE_QEMU_ERROR:
            await _note_qemu_error(attempt)
        case Effect.CLEAN_UP:
            await _clean_up(attempt)
        case _:
            assert_never(effect)


async def _continue(attempt: SourceAttempt) -> None:
    """The guest is paused, and goes on from here on disks that the destination has opened: it must write to those
    still.

    1. the guest is on its way  2. its QEMU is told to let it write to another image: by who has a monitor of their own,
    or a job of before the move ends so  3. the destination has the image of the plan, without what came since 2"""
    if attempt.media is not None:
        wrong = plan_disks.exchanged(attempt.media, await plan_disks.media(attempt.machine))
    else:  # the plan was another agent's
        wrong = await plan_disks.other_disks(attempt.kept)
    if wrong:
        text = f"the guest's disks are not those that the destination has opened: {'; '.join(wrong)}"
        hint = "wait until nobody changes the guest's disks (query-block-jobs), and migrate again"
        attempt.fail(MigrationFailed(text, side="source", hint=hint))
        return
    await attempt.machine.execute("migrate-continue", {"state": "pre-switchover"})
    attempt.note(Fact.CONTINUE)
    attempt.set_readings(source=Source.SWITCHING)


async def _commit(attempt: SourceAttempt) -> None:
    await attempt.context.journal.append(Entry.COMMITTED, attempt.job, {"generation": attempt.wanted.generation})
    attempt.note(Fact.COMMITTED)


async def _mirror(
    attempt: SourceAttempt,
    effect: Literal[Effect.START_MIRRORS, Effect.DRAIN_MIRRORS, Effect.DROP_MIRRORS, Effect.NOTE_DISK_ERROR],
) -> None:
    """What concerns local disks (`source_disks`)."""
    match effect:
        case Effect.START_MIRRORS:
            await source_disks.start(attempt)
        case Effect.DRAIN_MIRRORS:
            await source_disks.drain(attempt)
        case Effect.DROP_MIRRORS:
            await source_disks.drop(attempt)
        case Effect.NOTE_DISK_ERROR:
            source_disks.note_error(attempt)


async def _resume(attempt: SourceAttempt) -> None:
    """`cont`. QEMU takes the disks' locks itself or refuses; what a fence holds is given back just before.

    1. the commit is in the journal, and not sent  2. the guest goes back and runs here  3. the agent dies  4. the next
    one reads the commit, and finds a QEMU that has completed: it would send the grant. So the turning back is durable
    before the guest runs."""
    await _turn_back(attempt, must=Fact.COMMITTED in attempt.facts)
    if not attempt.allows(Effect.RESUME_SOURCE):
        return  # the world went on while the disk was written
    fence, attempt.locks = attempt.locks, None
    if fence is not None:
        fence.release()
    try:
        await attempt.machine.execute("cont", deadline_s=CONT_S)
    except QmpCommandError:
        if fence is not None:
            await way_back.fence_again(attempt, fence)
        raise
    attempt.trouble = ""
    attempt.locked_images = frozenset()  # `cont` takes them all back, or is refused
    attempt.refresh()


async def _turn_back(attempt: SourceAttempt, *, must: bool) -> None:
    """The guest is about to run here again, so what the destination holds by then is of the past: nobody starts that
    any more, not even when this QEMU dies next. Durable first; raises Unfit when it cannot be and `must`.

    Before the switchover was let go on, the destination holds nothing that could be started."""
    if Fact.CONTINUE not in attempt.facts:
        return
    if not attempt.has_turned_back:
        try:
            await attempt.context.journal.append(Entry.TURNED_BACK, attempt.job)
            attempt.has_turned_back = True
        except Unfit as error:
            if must:
                raise
            log.warning("job=%s vm=%s journal=turned-back result=%s", attempt.job, attempt.vm, error)
    attempt.note(Fact.SOURCE_RESUMED)


async def _check_plan(attempt: SourceAttempt) -> None:
    """Raises PlanRefused with every blocker; nothing was changed anywhere."""
    media = await plan_disks.media(attempt.machine)  # first: what the plan looks at is not older
    plan = await attempt.context.make_plan(attempt)
    if plan.objections:
        first = plan.objections[0]
        sentence = "; ".join(objection.message for objection in plan.objections)
        hints = "; ".join(objection.fix for objection in plan.objections if objection.fix)
        raise PlanRefused(sentence, side=first.side, hint=hints, retry="after-fix")
    attempt.plan, attempt.media = plan, media
    if plan.copies:
        attempt.note(Fact.DISKS_WANTED, text=", ".join(disk.id for disk in plan.copies))
    attempt.note(Fact.PLANNED, text=plan.why)
    attempt.note(Fact.PAUSE_CAP)
    if plan.options.source_capabilities.get("switchover-ack"):
        attempt.note(Fact.SWITCHOVER_ACK)


async def _prepare(attempt: SourceAttempt) -> None:
    """Raises the destination's error; it has then cleaned up, unless it did not answer at all."""
    plan = attempt.plan
    assert plan is not None, "a plan comes before the place"
    context, wanted = attempt.context, attempt.wanted
    more: dict[str, Any] = {}
    if not wanted.clear_text:
        attempt.credentials = job_credentials.make(attempt.job, "source", context.job_directory, now=context.utc_now())
        more["ca_pem"] = attempt.credentials.ca_pem_own.decode()
    attempt.note(Fact.PREPARE)
    beside = asyncio.create_task(_look_and_set(attempt, plan), name=f"configure-{attempt.job}")
    try:
        attempt.offer = await _ask_for_place(
            attempt,
            source=context.config.name,
            vm=attempt.vm,
            definition=attempt.kept.definition.moved(plan.image_paths).to_wire(),
            commands=[list(step) for step in plan.options.commands(Role.DESTINATION)],
            expected=plan.options.expected(Role.DESTINATION),
            multifd=plan.multifd,
            run_after=wanted.running_before,
            policy=msgspec.to_builtins(attempt.policy),
            auto_dismiss=wanted.auto_dismiss,
            blockers=context.blockers.wire(attempt.vm),
            clear_text=wanted.clear_text,
            disks=msgspec.to_builtins(plan.placed_disks()),
            **more,
        )
    except HostUnreachable:
        raise
    except VmferryError as error:
        # The destination answered: it refused and left nothing behind. Its own words first: they give the exit code.
        attempt.fail(error)
        attempt.note(Fact.TARGET_GONE, text=str(error), by="destination agent")
        with contextlib.suppress(VmferryError):  # unless what refused was something in between: then there is a place
            await attempt.ask("peer-release", deadline_s=READY_S)
        raise
    finally:
        await asyncio.gather(beside, return_exceptions=True)
    there = hardware.HardwareView(tuple((str(k), str(v)) for k, v in attempt.offer["hardware"]))
    wrong = hardware.differences(beside.result(), there)
    if wrong:
        raise PlanRefused(
            f"{wanted.destination} would build another machine than {attempt.vm} is: {'; '.join(wrong)}",
            hint="unplug what was plugged in since the start, or start it anew from a spec that has it",
        )
    if attempt.credentials is not None:
        attempt.credentials.accept_peer(str(attempt.offer["ca_pem"]).encode())
    if plan.options.source_capabilities.get("postcopy-ram"):
        await _remember_way(attempt)
    attempt.note(Fact.PREPARED, text=f"QEMU {attempt.offer.get('qemu')}", by="destination agent")


async def _ask_for_place(attempt: SourceAttempt, **what: Any) -> dict[str, Any]:
    """The destination's offer. Asked again it is the same place: the question or its answer may have been lost, and a
    QEMU may take long to start. Raises HostUnreachable, or what the destination says against it."""
    end_s = attempt.clock.now_s() + PREPARE_S
    while True:
        deadline_s = min(PLACE_ASK_S, end_s - attempt.clock.now_s())
        try:
            return await attempt.ask("peer-prepare", deadline_s=deadline_s, **what)
        except HostUnreachable as error:
            if not isinstance(error.__cause__, QmpTimeout) or attempt.clock.now_s() >= end_s:
                raise


async def _remember_way(attempt: SourceAttempt) -> None:
    """Where the destination may be called if a postcopy breaks while the agents cannot talk: durable, as an agent that
    is started then has nobody to ask. One that tells no way is called nowhere. Raises Unfit; nothing has started."""
    told = attempt.offer.get("recovery")
    if not told:
        return
    way = RecoveryWay(
        token=str(told["token"]),
        hosts=tuple(str(host) for host in told["hosts"]),
        ports=tuple(int(port) for port in told["ports"])[: limits.RECOVERY_PORTS_MAX],
    )
    await attempt.context.journal.append(Entry.RECOVERY_WAY, attempt.job, msgspec.to_builtins(way))
    attempt.recovery_way = way


async def _look_and_set(attempt: SourceAttempt, plan: Plan) -> hardware.HardwareView:
    """This side's part of the set-up, done while the destination starts its QEMU: look at the machine, set every
    option, read back, compare. Raises when QEMU refuses an option or reads back another value."""
    machine = attempt.machine
    await remember_options(attempt, (*plan.options.source_capabilities, *plan.options.source_parameters))
    await set_options(machine, plan.options.commands(Role.SOURCE), plan.options.expected(Role.SOURCE))
    return await hardware.look(machine.execute)


async def _configure(attempt: SourceAttempt) -> None:
    """Options are set and read back already (`_look_and_set`); what is left needs the destination's certificate.
    Raises when QEMU refuses it; nothing has started."""
    context = attempt.context
    if attempt.credentials is not None:
        priority = job_credentials.tls_priority(attempt.machine.version)
        creds = job_credentials.tls_creds_object(attempt.job, "source", context.job_directory, priority=priority)
        await attempt.machine.execute("object-add", creds)
    attempt.note(Fact.CONFIGURED)


async def _start(attempt: SourceAttempt) -> None:
    """Raises when the channel cannot be opened or QEMU refuses; the guest runs as before."""
    machine, offer = attempt.machine, attempt.offer
    attempt.context.blockers.require(attempt.vm, Operation.MIGRATE)  # somebody may have come to hold one since the plan
    if attempt.mirrors:  # that took its time: the door is opened now
        offer = await attempt.ask("peer-door", deadline_s=DOOR_S, disks_ready=Fact.DISKS_READY in attempt.facts)
    addresses = [(str(host), int(port)) for host, port in offer["addresses"]]
    if offer.get("uri"):
        uri = str(offer["uri"])  # multifd: QEMU connects by itself, yank is the cut
    else:
        ticket = channels.Ticket(attempt.job, "main", bytes.fromhex(offer["token"]))
        channel = await attempt.context.host.dial_channel(addresses, ticket, deadline_s=DIAL_S)
        attempt.channels.append(channel)
        attempt.fd_given = True  # before it is known: a QEMU that does not answer in time may take it later
        await machine.execute("getfd", {"fdname": CHANNEL_NAME}, fds=(channel.fileno(),))
        channel.entrust(machine.pid)
        uri = f"fd:{CHANNEL_NAME}"
    clear = "in clear text, as it was asked for by name" if attempt.wanted.clear_text else ""
    attempt.locked_images = await attempt.context.host.write_locks(
        machine.pid, attempt.kept.definition.writable_paths()
    )
    attempt.note(Fact.STARTED, text=clear)  # from here on a guest that stands still is started again, whatever happens
    plan = attempt.plan
    assert plan is not None, "a plan comes before the start"
    migrate = ("migrate", {"uri": uri})
    await source_disks.share_with_memory(attempt)
    if plan.stops_first or (plan.mode is Mode.POSTCOPY and attempt.wanted.postcopy.get("after_passes") == 0):
        wanted = (await machine.execute("query-migrate-parameters"))["max-bandwidth"]  # while the guest still runs
        if plan.stops_first:
            await machine.execute("stop", deadline_s=CONT_S)
        # At once: a poll later a small guest would have arrived without it. And slowly until then: a QEMU that finds
        # nothing left to send at the switch tells the destination to discard nothing, and that one refuses to run.
        why = "the guest was stopped first" if plan.stops_first else "at once, as it was asked for"
        attempt.note(Fact.START_POSTCOPY, text=why, by="policy")
        slow, fast = (("migrate-set-parameters", {"max-bandwidth": rate}) for rate in (AT_ONCE_BYTES_PER_S, wanted))
        await _start_postcopy(attempt, before=[slow, migrate], after=[fast])
    else:
        await machine.execute(*migrate)
    attempt.refresh()


async def _start_postcopy(
    attempt: SourceAttempt, *, before: Sequence[_Command] = (), after: Sequence[_Command] = ()
) -> None:
    """The switch, between the commands `before` and `after`. Raises QemuError; the guest then runs as before, or is
    started again as one that stands still."""
    machine = attempt.machine
    stops = hazards.goes_back_after_grant(machine.version)
    if stops:
        await machine.execute("stop", deadline_s=CONT_S)  # of one that stands still already it changes nothing
    try:
        if hazards.waits_for_ever_after_last_page(machine.version):
            await machine.execute("migrate-set-parameters", {way_back.PACE: way_back.SLOWEST})
            attempt.note(Fact.SLOWED)
        await machine.execute_all([*before, ("migrate-start-postcopy", {}), *after])
    except QmpCommandError:
        if stops and attempt.wanted.running_before and not (attempt.plan and attempt.plan.stops_first):
            await machine.execute("cont", deadline_s=CONT_S)  # memory goes on moving without the switch
        raise
    attempt.note(Fact.POSTCOPY_TOLD)


async def _cancel_source(attempt: SourceAttempt) -> None:
    """First the polite way; a QEMU that hangs, or is still at it when asked again, loses its channel.

    A refusal may be right, and then a cut would do harm:

    1. the package is on its way, a cancel is accepted  2. the destination's proof arrives: postcopy-active
    3. migrate_cancel is refused  4. a cut would leave the source in postcopy-paused, and if the last page had just
    arrived, with a destination that takes no recovery. Without it the source completes, and goes on from there.
    """
    await _turn_back(attempt, must=False)  # QEMU starts the guest again by itself
    if not attempt.allows(Effect.CANCEL_SOURCE):
        return
    attempt.cancel_tries += 1
    machine = attempt.machine
    polite = attempt.cancel_tries == 1
    try:
        await machine.execute("migrate_cancel", deadline_s=CANCEL_S)
    except QmpTimeout:
        polite = False
    except QmpCommandError as error:
        log.warning("job=%s vm=%s command=migrate_cancel result=%s", attempt.job, attempt.vm, error)
        polite = False
        await attempt.ask_word()
    if not polite and attempt.allows(Effect.CANCEL_SOURCE):
        await cut(attempt)
    attempt.refresh()


async def cut(attempt: SourceAttempt) -> None:
    """Ends the stream for both QEMUs: our own handle on the channel, and QEMU's yank out of band."""
    for channel in attempt.channels:
        channel.cut()
    attempt.measured.marks.append((attempt.clock.wall_s(), "channel cut"))
    await source_disks.cut(attempt)
    try:
        await attempt.machine.execute("yank", {"instances": [{"type": "migration"}]}, oob=True, deadline_s=CANCEL_S)
    except QemuError as error:
        log.info("job=%s vm=%s command=yank result=%s", attempt.job, attempt.vm, error)


async def _retire(attempt: SourceAttempt) -> None:
    """Ends the source's QEMU: the destination runs the guest. Journalled first, so that a restart agrees."""
    await _forget(attempt)
    attempt.measured.ended_s = attempt.clock.wall_s()
    try:
        attempt.count(await attempt.machine.migration())  # the last word on bytes and times
    except QemuError as error:
        log.info("job=%s vm=%s command=query-migrate result=%s", attempt.job, attempt.vm, error)
    was_there = not attempt.machine.is_gone
    await attempt.machine.quit()
    if attempt.mirrors and was_there:
        await attempt.context.keep_left_images(attempt)
    attempt.note(Fact.SOURCE_RETIRED)
    attempt.note(Fact.SOURCE_GONE, by="kernel")


async def _forget(attempt: SourceAttempt) -> None:
    """This host does not keep the guest any more. Durable when this returns; raises Unfit."""
    await attempt.context.journal.append(
        Entry.FORGOTTEN, attempt.vm, {"job": attempt.job, "identity": asdict(attempt.machine.identity)}
    )
    attempt.kept.is_leaving = True


def _note_target_lost(attempt: SourceAttempt) -> None:
    refused = attempt.facts.entry(Fact.START_REFUSED, attempt.facts.last_round(Fact.START_REFUSED))
    gone = attempt.facts.entry(Fact.TARGET_GONE)
    host = attempt.wanted.destination
    if refused is not None:
        text = f"{host} could not start the guest: {refused.text}"
    elif gone is not None and gone.text:
        text = f"{host} gave up before it ran the guest: {gone.text}"
    else:
        text = f"{host} is gone before it ran the guest"
    attempt.fail(MigrationFailed(text, side="destination"))


async def _note_qemu_error(attempt: SourceAttempt) -> None:
    """The source QEMU's words, and the destination's if it has better ones (it knows the device's name)."""
    text, side = "the source's QEMU is gone", "source"
    if attempt.machine.is_gone and attempt.kept.directory:
        words = attempt.context.tail_log(RuntimePaths(attempt.kept.directory))
        text = f"{text}: {words}" if words else text
    if not attempt.machine.is_gone:
        info = await attempt.machine.migration()
        text = str(info.get("error-desc") or f"the source's QEMU ended the migration ({info.get('status')})")
    cause = None
    try:
        facts = await attempt.ask_facts("peer-target", deadline_s=READY_S, why=True)
        if facts.get("text"):
            cause, side = str(facts["text"]), "destination"
    except VmferryError as error:
        log.info("job=%s vm=%s command=peer-target result=%s", attempt.job, attempt.vm, error)
    attempt.fail(MigrationFailed(text, side="destination" if side == "destination" else "source", cause=cause))


async def _clean_up(attempt: SourceAttempt) -> None:
    """Gives back everything of the attempt and journals its end. A trouble here keeps nobody from ending."""
    outcome = attempt.row().outcome
    view = source_view(attempt.facts, attempt.readings)
    if outcome is Outcome.DESTINATION and not attempt.kept.is_leaving:
        await _forget(attempt)  # its QEMU ended before anybody retired it
    for channel in attempt.channels:
        channel.cut()
        channel.close()
    attempt.channels.clear()
    if view.source not in (Source.GONE, Source.RETIRED) and not attempt.machine.is_gone:
        try:
            await _restore_source(attempt)
        except QmpDisconnected:
            await attempt.machine.wait_gone(deadline_s=DYING_S)
        except QemuError as error:
            log.warning("job=%s vm=%s effect=clean-up result=%s", attempt.job, attempt.vm, error)
        if not attempt.allows(Effect.CLEAN_UP):
            return
        outcome = attempt.row().outcome  # its QEMU may have died meanwhile: then it is not told that the guest runs
    is_back = outcome is not Outcome.DESTINATION
    if is_back and Fact.DISKS_READY in attempt.facts and not source_disks.are_copies_of_use(attempt):
        with contextlib.suppress(VmferryError):  # they are let go in time all the same
            await attempt.ask("peer-forget-copies", deadline_s=READY_S)
    job_credentials.remove_job(attempt.job, attempt.context.job_directory)
    if attempt.measured.ended_s is None:
        attempt.measured.ended_s = attempt.clock.wall_s()
    attempt.outcome_at_end = outcome
    if is_fenced(attempt.facts) and Fact.ERROR not in attempt.facts:
        fence = attempt.facts.entry(Fact.FENCED, attempt.facts.last_round(Fact.FENCED))
        assert fence is not None, "a fence that holds was recorded"
        attempt.fail(
            MigrationFailed(
                f"{attempt.wanted.destination} was silent after it had been told to start, and was fenced off: "
                f"{fence.text}",
                side="destination",
            )
        )
    if outcome is Outcome.DESTINATION:
        attempt.tracking.finish()
    attempt.note(Fact.CLEANUP)
    attempt.ended.set()
    mirror_jobs.tell_ended(attempt)
    try:
        await attempt.context.journal.append(Entry.ENDED, attempt.job, attempt.wire())
    except Unfit as error:
        # After a restart the job is looked at again and ends the same way.
        log.error("job=%s vm=%s effect=clean-up result=%s", attempt.job, attempt.vm, error)
    attempt.context.attempt_ended(attempt)


async def _restore_source(attempt: SourceAttempt) -> None:
    """The options that QEMU had before, and no credentials object."""
    machine = attempt.machine
    if attempt.mirrors:
        await source_disks.forget(attempt)
    if attempt.plan is None or attempt.fd_given:
        # Without a plan the attempt was taken over from an agent that may have died before it said `migrate`. After
        # `migrate` QEMU has no descriptor of that name any more, and says so.
        with contextlib.suppress(QmpCommandError):
            await machine.execute("closefd", {"fdname": CHANNEL_NAME})
    deadline_s = attempt.clock.now_s() + SETTLE_S
    while (await machine.migration()).get("status") in ("failing", "cancelling"):
        if attempt.clock.now_s() > deadline_s:
            raise QemuError(f"{attempt.vm}: QEMU is still ending its migration", side="source")
        await asyncio.sleep(0.02)
    before = attempt.saved_options
    if before:
        capabilities = [(name, state) for name, state in before.items() if OPTIONS[name].kind is Kind.CAPABILITY]
        states = [{"capability": name, "state": state} for name, state in capabilities]
        await machine.execute("migrate-set-capabilities", {"capabilities": states})
        values = {name: value for name, value in before.items() if OPTIONS[name].kind is Kind.PARAMETER}
        await machine.execute("migrate-set-parameters", values)
    if Fact.PREPARE in attempt.facts and not attempt.wanted.clear_text:
        creds = job_credentials.tls_creds_object(attempt.job, "source", attempt.context.job_directory)
        try:
            await machine.execute("object-del", {"id": creds["id"]})
        except QmpCommandError as error:
            log.info("job=%s vm=%s command=object-del result=%s", attempt.job, attempt.vm, error)
