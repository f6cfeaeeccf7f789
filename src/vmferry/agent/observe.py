"""The funnel in: what QEMU says becomes facts. Pure; the only place that knows QEMU's status words.

Theory of operation
-------------------
A status word proves everything that must have happened before it, so an agent that comes late (a restart, a
lost event) learns the same facts from one `query-migrate` as from the whole series of events. Facts are
recorded once, so saying more than is new is harmless.

A QEMU before 10.2 calls its source `postcopy-active` as soon as the package is built, before the destination
loaded anything. Its word then proves PACKAGE_SENT only; PACKAGE_LOADED is the destination agent's to say
(`has_proof` False). So it calls itself `postcopy-paused`, too, whether a postcopy broke that runs over there or one
that never began, and only the latter is an error. What it proves of the channel is held back (`holds_back`) until it
is known which of the two it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmferry.core.facts import Fact, FactLog, open_round

Finding = tuple[Fact, int, str]
"""(fact, round, text)."""

PROOF_VERSION = (10, 2)
"""The first QEMU whose source waits for the destination's proof before it says postcopy-active."""

_BROKEN = frozenset({"postcopy-paused", "postcopy-recover-setup", "postcopy-recover"})
_WHICH = (Fact.PACKAGE_LOADED, Fact.TARGET_GONE, Fact.FENCED, Fact.STAND_IN)
"""Each says whether the destination has loaded: it has; or it never ran, and nobody waits for it any more."""

_BEGUN: tuple[Finding, ...] = ((Fact.LISTENING, 0, ""), (Fact.HEADER_SEEN, 0, ""))
_PACKAGE: Finding = (Fact.PACKAGE_SENT, 0, "")


def _broken(log: FactLog) -> tuple[Finding, ...]:
    """`postcopy-paused`: a new lost round, unless this very round is recorded and no resume was tried yet."""
    current = open_round(log)
    if current == 0:
        return ((Fact.LINK_LOST, log.last_round(Fact.LINK_LOST) + 1, ""),)
    if log.stamp(Fact.RESUME_WANTED, current) is None:
        return ((Fact.LINK_LOST, current, ""),)
    return ((Fact.RECONNECT_FAILED, current, ""), (Fact.LINK_LOST, current + 1, ""))


def _healing(log: FactLog, *reached: Fact) -> tuple[Finding, ...]:
    """The words after `postcopy-paused`: the newest lost round (a new one, if its loss was not heard of) and how
    far its repair got."""
    current = open_round(log) or log.last_round(Fact.LINK_LOST) + 1
    return tuple((fact, current, "") for fact in (Fact.LINK_LOST, Fact.RESUME_WANTED, *reached))


def _healed(log: FactLog) -> tuple[Finding, ...]:
    """Nothing is missing for want of a channel any more: the repair of a round that was open got to its end."""
    return _healing(log, Fact.RECONNECTED, Fact.RESUME_ACK) if open_round(log) else ()


def _rounds(word: str, log: FactLog) -> tuple[Finding, ...]:
    """What a word of a postcopy that runs, is broken, or heals, proves of the newest round."""
    match word:
        case "postcopy-paused":
            return _broken(log)
        case "postcopy-recover-setup":
            return _healing(log)
        case "postcopy-recover":
            return _healing(log, Fact.RECONNECTED)
        case _:
            return _healed(log)


def _back(log: FactLog) -> tuple[Finding, ...]:
    """QEMU gave the attempt up. What it has paused for the switchover it starts again by itself."""
    return ((Fact.SOURCE_RESUMED, 0, "QEMU gave up, and may have"),) if Fact.CONTINUE in log else ()


def _unheard_of(word: str, log: FactLog) -> tuple[Finding, ...]:
    """A word that nobody here knows: a new round, unless it is still the same one."""
    newest = log.last_round(Fact.UNKNOWN_STATUS)
    entry = log.entry(Fact.UNKNOWN_STATUS, newest) if newest else None
    return () if entry is not None and entry.text == word else ((Fact.UNKNOWN_STATUS, newest + 1, word),)


def _stopped(log: FactLog) -> tuple[Finding, ...]:
    """The guest stopped for the switchover, which it does not before devices that have a say are ready."""
    ready = ((Fact.DEVICES_READY, 0, "the source switched over"),) if Fact.SWITCHOVER_ACK in log else ()
    return ((Fact.SETUP_DONE, 0, ""), *ready, (Fact.SWITCHOVER, 0, ""))


def arrival(log: FactLog) -> tuple[Finding, ...]:
    """What is proved once the destination has taken everything, whoever says so."""
    loaded = ((Fact.PACKAGE_LOADED, 0, "the destination's result"),) if Fact.PACKAGE_SENT in log else ()
    sent = ((Fact.ALL_SENT, 0, ""), (Fact.PEER_ACK, 0, ""))
    return (*_stopped(log), (Fact.CONTINUE, 0, ""), *loaded, *_healed(log), *sent)


def holds_back(word: str | None, log: FactLog, *, has_proof: bool) -> bool:
    """Whether `source_findings` has more to say of this very word once the log says what became of the destination."""
    return word in _BROKEN and not has_proof and not any(fact in log for fact in _WHICH)


def source_findings(word: str | None, log: FactLog, *, has_proof: bool) -> tuple[Finding, ...]:
    """What the source QEMU's status word proves; `log` gives the rounds and who ended the attempt."""
    proof = ((Fact.PACKAGE_LOADED, 0, "the return path"),) if has_proof else ()
    switched = (*_stopped(log), (Fact.CONTINUE, 0, ""))
    match word:
        case None | "none" | "setup":
            return ()
        case "failing" | "failed":
            return _back(log)  # an error's text is asked for by the effect that records it
        case "wait-unplug":
            return ((Fact.UNPLUG_WAIT, 0, ""),)
        case "active":
            unplugged = ((Fact.UNPLUG_DONE, 0, ""),) if Fact.UNPLUG_WAIT in log else ()
            return (*unplugged, (Fact.SETUP_DONE, 0, ""))
        case "pre-switchover":
            return _stopped(log)
        case "device":
            return switched
        case "postcopy-device":
            return (*switched, _PACKAGE)
        case "postcopy-active" | "postcopy-paused" | "postcopy-recover-setup" | "postcopy-recover":
            rounds = () if holds_back(word, log, has_proof=has_proof) else _rounds(word, log)
            return (*switched, _PACKAGE, *proof, *rounds)
        case "completed" if Fact.STAND_IN in log and Fact.ALL_SENT not in log:
            return (*switched, *_healed(log))  # it went to a stand-in, and none of it to the destination
        case "completed":
            return arrival(log)
        case "cancelling" | "cancelled":
            ours = Fact.CANCEL in log or Fact.ERROR in log
            cancel = () if ours else ((Fact.CANCEL, 0, "somebody cancelled it in QEMU's own monitor"),)
            return (*cancel, *_back(log))
        case "colo":
            return ((Fact.COLO, 0, ""),)
        case _:
            return _unheard_of(word, log)


_ASKED = "somebody asked its mirror to end"
_WHY = {"aborting": "it is being given up", "waiting": _ASKED, "pending": _ASKED}


def mirror_findings(words: Iterable[tuple[int, str, str | None, str]], log: FactLog) -> tuple[Finding, ...]:
    """What QEMU's word of each mirror's job proves: (the disk's number, its name, the job's status or None for a job
    that is not there, its error).

    A job that ended without an error is a disk that is equal if the guest was paused by then; before, somebody ended
    it behind our back, and the guest has written on since. One that only waits for its end was asked for it by us if
    the guest is paused; before, somebody else asked, and may have asked for another end: `block-job-complete` would
    have the guest go on on the copy, over the network."""
    paused = Fact.SWITCHOVER in log
    found: list[Finding] = []
    ready = drained = True
    for number, name, status, error in words:
        if status == "concluded" and not error and paused:
            continue
        drained = False
        is_ending = status in ("waiting", "pending")
        if status in ("ready", "standby") or (is_ending and paused):
            found.append((Fact.DISK_READY, number, name))
            continue
        ready = False
        if error or is_ending or status in (None, "null", "aborting", "concluded"):
            why = error or _WHY.get(status or "", "its mirror is not there any more")
            found.append((Fact.DISK_FAILED, 0, f"{name}: {why}"))
    if ready:
        found.append((Fact.DISKS_READY, 0, ""))
    if drained:
        found.append((Fact.DISKS_DRAINED, 0, ""))
    return tuple(found)


def destination_findings(word: str | None, run_state: str | None, log: FactLog) -> tuple[Finding, ...]:
    """What the destination QEMU's status word and run state prove.

    LOADED needs the run state: only when it has left `inmigrate` is the device state in and the guest
    startable. That holds for every QEMU; the status word alone says it too early before 10.2. Once it is recorded a
    word is enough: a QEMU whose main loop hangs in postcopy has events and no run state.
    """
    loaded = run_state not in (None, "inmigrate") or Fact.LOADED in log
    findings: list[Finding] = []
    match word:
        case None | "none" | "failing" | "failed" | "cancelling" | "cancelled":
            return ()
        case "setup":
            return ((Fact.LISTENING, 0, ""),)
        case "active":
            findings = list(_BEGUN)
        case "postcopy-device":
            findings = [*_BEGUN, _PACKAGE]
        case "postcopy-active" | "postcopy-paused" | "postcopy-recover-setup" | "postcopy-recover":
            findings = list(_BEGUN)
            if loaded:
                findings += [_PACKAGE, (Fact.PACKAGE_LOADED, 0, ""), (Fact.LOADED, 0, ""), *_rounds(word, log)]
        case "completed":
            findings = list(_BEGUN)
            if loaded and Fact.PACKAGE_SENT in log:
                findings += [(Fact.PACKAGE_LOADED, 0, "")]  # it may be over before anybody looked
            if loaded:
                findings += [(Fact.LOADED, 0, ""), *_healed(log), (Fact.ALL_SENT, 0, "")]
        case _:
            return _unheard_of(word, log)
    if run_state == "running":
        findings.append((Fact.TARGET_RAN, 0, "the run state is running"))
    return tuple(findings)
