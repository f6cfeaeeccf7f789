"""What chores do, in their threads: verify, prune, export, import; and what the next agent does with one that was not
ended.

Rule 1: between two steps the `Watch` is told how far it is; what it raises ends the work, with nothing half there.
Rule 2: nothing is taken away that a plan did not show: a prune does exactly the plan that it has shown, or, if the
        repository has changed since, nothing (PlanOutdated).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmferry.agent import snapshot_files
from vmferry.agent.snapshot_sink import find
from vmferry.agent.wants import ChoreWanted
from vmferry.errors import MigrationFailed
from vmferry.store import pins
from vmferry.store import verify as verifying
from vmferry.store.errors import PlanOutdated
from vmferry.store.index import index_name
from vmferry.store.prune import PrunePlan, execute, plan_prune
from vmferry.store.rebuild import Rebuilt, rebuild_indexes

if TYPE_CHECKING:
    from vmferry.agent.chores import Watch
    from vmferry.store.pins import Pin
    from vmferry.store.repository import Repository

Opened = Callable[[], "Repository"]


def work(opened: Opened, wanted: ChoreWanted, host: str, watch: Watch) -> dict[str, Any]:
    """A chore from its beginning to its end. Returns what it found or did; raises VmferryError, OSError."""
    repository = opened()
    watch.tell(0, 0)
    match wanted.kind:
        case "verify":
            return _verify(repository, wanted, watch)
        case "prune":
            return _prune(repository, wanted.arguments, watch)
        case "export":
            return snapshot_files.export(repository, wanted, watch)
        case _:
            return snapshot_files.load(repository, wanted, watch, host=host)


def after(opened: Opened, wanted: ChoreWanted, host: str, watch: Watch) -> dict[str, Any]:
    """Of a chore whose agent ended: what it did after all, with nothing left of what it did not. Raises
    MigrationFailed: it was not done, or nobody knows.

    A verify's lock is that of a dead process. A prune leaves what the next one takes away, and has removed what it had
    shown. What an export wrote goes; under its own name there is a whole file or none. An import was done if it is
    listed."""
    restarted = f"the agent restarted during the {wanted.kind}"
    if wanted.kind == "export":
        snapshot_files.part_of(Path(wanted.file), wanted.job).unlink(missing_ok=True)
        raise MigrationFailed(f"{restarted}; if there is a {wanted.file}, it is whole", guest="unharmed")
    if wanted.kind == "import":
        found = snapshot_files.kept_after_all(opened, wanted, because=restarted)
        if found is not None:
            return found
    raise MigrationFailed(restarted, guest="unharmed", hint="begin it anew")


def _verify(repository: Repository, chore: ChoreWanted, watch: Watch) -> dict[str, Any]:
    wanted = find(repository, chore.name).snapshot if chore.name else ""
    made = Rebuilt((), ())
    if chore.arguments.get("rebuild_indexes"):
        made = rebuild_indexes(repository, watch.tell)
    verdict = verifying.verify(repository, watch.tell)
    names = {info.snapshot: info.head.name for info in repository.snapshots() if info.head is not None}
    problems = [each for each in verdict.problems if not wanted or wanted in each.snapshots]
    damaged = sorted(verdict.damaged_snapshots & ({wanted} if wanted else verdict.damaged_snapshots))
    return {
        "whole": not problems,
        "rebuilt_indexes": [index_name(index_id) for index_id in made.indexes],
        "not_rebuilt": [{"object": each.name, "what": each.what} for each in made.failed],
        "problems": [
            {"object": each.name, "what": each.what, "snapshots": [names.get(s, s) for s in each.snapshots]}
            for each in problems
        ],
        "damaged_snapshots": [names.get(snapshot, snapshot) for snapshot in damaged],
        "snapshots": verdict.snapshots,
        "packs": verdict.packs,
        "pages": verdict.pages,
        "read_bytes": verdict.read_bytes,
        "orphans": verdict.orphans,
    }


def _prune(repository: Repository, arguments: dict[str, Any], watch: Watch) -> dict[str, Any]:
    host = str(arguments["drop_pins"])
    dropping = [pin for pin in pins.all_pins(repository) if host and pin.host == host]
    plan = plan_prune(repository, empty_below=float(arguments["empty_below"]), on_bytes=watch.tell)
    shown: dict[str, Any] = {"plan": _plan_wire(plan, dropping), "dropped_pins": [], "done": None}
    if arguments["dry_run"] or (plan.is_empty and not dropping):
        return shown
    watch.ask(shown, f"{len(plan.remove_packs)} packs to remove, {len(plan.empty_packs)} to write anew")
    _require_same_pins(repository, host, dropping)
    left = list(dropping)

    def drop() -> None:
        while left:
            pins.remove(repository, left[0].job)
            del left[0]

    def tell(done: int, whole: int) -> None:
        watch.tell(done, whole)
        drop()  # not before the deed is sure to begin: while it may still say that nothing was done, nothing is

    dropped = {"dropped_pins": shown["plan"]["drop_pins"]}
    if plan.is_empty:
        drop()
        return shown | dropped
    done = execute(repository, plan, on_bytes=tell, but_pins=frozenset(pin.job for pin in dropping))
    return shown | dropped | {"done": msgspec.to_builtins(done)}


def _require_same_pins(repository: Repository, host: str, shown: list[Pin]) -> None:
    """Raises PlanOutdated: a guest that was restored since is none that anybody knew to be lost."""
    now = [pin for pin in pins.all_pins(repository) if host and pin.host == host]
    if {pin.job for pin in now} - {pin.job for pin in shown}:
        raise PlanOutdated(f"{host} has restored a guest since the plan was made: it is not lost, and nothing was done")


def _plan_wire(plan: PrunePlan, dropping: list[Pin]) -> dict[str, Any]:
    return {
        "drop_pins": [msgspec.to_builtins(pin) for pin in dropping],
        "remove_packs": len(plan.remove_packs),
        "rewrite_packs": len(plan.empty_packs),
        "remove_indexes": len(plan.remove_indexes),
        "remove_leftovers": len(plan.remove_leftovers),
        "kept_packs": plan.kept_packs,
        "too_young": plan.too_young,
        "freed_bytes": plan.freed_bytes,
    }
