"""The model checker: every interleaving of the functions that decide, in a small world of two agents and two QEMUs.

Theory of operation
-------------------
`world` is one state, `rules` the functions of production (and a memory of their answers), `logs` a fact log as an
integer. Steps come from `source`, `destination` (the agents, as their hands do it), `restart` (what a journal proves),
`qemu` (two QEMUs and the stream), `outside` (network, people, faults). `invariants` says what must hold; `explore`
goes breadth first, so a violation's schedule is the shortest, and `replay` follows one. `mutants` are small mistakes
that must all be seen; `campaign` runs everything; `pairs` and `faults_doc` make docs/faults.md.

What is the real thing: views, rows, guards, limits (`effect_now`), statuses, the refusal of a cancel, and the findings
from QEMU's words. What is written anew here, after the agents: effects, commands between agents, the restart, and what
the destination's agent takes its QEMU for. A change of those has to be made here, too.

Reductions, and what each loses
-------------------------------
1. A decision and its deed are one step. A decision depends on its own side's log and readings only, so it commutes
   with every step that leaves those alone. A step that does not is explored in between, too (`explore.steps`), where
   the side would then decide otherwise and the guard still says yes. Lost: a guard that says no and yes again in that
   moment, and a question (ask-target) asked late, which changes nothing.
2. A push is on its way from the moment that something is new, and the newest replaces older ones: one session carries
   them in order and each is whole, so an older one that arrives commutes with what the destination does after sending
   it. An answer replaces a push that was sent before it, for the same reason. A push that is lost is one that comes
   late. Lost: nothing but pushes that tell nothing new when they are sent.
3. A question is answered when it arrives: until then nothing of it can be seen. Lost: nothing.
4. A run state is read with a word after which QEMU changes it no more by itself. Lost: nothing.
5. That loading has begun is seen there at once: nothing is decided on it. Lost: a status that skips `active` there.
6. What an attempt or a place knew is forgotten at its end, as its journal says the same. Lost: nothing.
7. Facts that nobody reads, or nobody reads any more, are left out (`rules.NEVER_READ`, `logs`). Lost: nothing.

Bounds
------
1. At most `Setting.faults` faults and `Setting.cancels` wishes to cancel in a run. What follows from a fault (a call
   that fails while the link is down) and what ends one (the link is back, an agent starts, a QEMU answers) is free.
2. At most five rounds of a repeated fact; `Result.out_of_rounds` counts what was left out, 0 so far.
3. One call, one late call and one push of facts are on their way at a time. A push holds what was so when it was sent,
   and may arrive after anything else.

Abstractions
------------
1. Time is only "the row has lasted too long", possible at any moment in a row that waits, and in a row that acts once
   it has acted. A retry's pause is longer than a recovery that goes well.
2. One guest, one attempt, both agents' clocks apart. Older attempts exist as a grant with an old generation.
3. Memory is one step for all passes and one for all pages. Locks are one for all disks, held or not; a part of them is
   the destination holding it without running. Multifd, preempt, TLS, options, unplugging and unknown words are left out
   (a word that nobody knows is a view of its own, which the table's tests walk).
4. Policies are the defaults (roll back, run, for ever); a fence is that of the locks, where a guest that ran has
   written to its disks. A person's word (`vmferry resolve`) and a loss of the channel that only the destination has
   noticed are left out.
5. QEMU 10.2 or newer on both sides: the source waits for the proof. The guest is stopped before the switch.
6. Journals are never lost and an append is one step, done or failed. Only the source's journal fails here.
7. A failed plan is not there: it ends as a refused place does.
8. A run may end where the verdict is so, or where a row names an action for a person; the rescue tools that rows name
   are steps of their own.
"""
