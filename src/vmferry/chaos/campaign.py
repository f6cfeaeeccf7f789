"""`vmferry chaos`: many runs, two at a time, each on a ground that is used again while it is clean.

Theory of operation
-------------------
Cells that need the same kind of ground are cut into portions; each worker takes a portion, makes the ground, and does
its runs one after the other. A run whose fault was not injected is done again, on a fresh ground. A line per run says
what became of it.

Rule 1: whatever ends it, also Ctrl-C: the workers stop at the next wait, and take their grounds away.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vmferry.chaos import report, verdict
from vmferry.chaos.cells import Cell, by_ground
from vmferry.chaos.ground import Ground
from vmferry.chaos.run import Run
from vmferry.chaos.stage import Stopped
from vmferry.chaos.verdict import Seen
from vmferry.errors import Unfit
from vmferry.testing.host_tools import HostToolError
from vmferry.testing.hosts import PAIRS

WORKERS = 2
PORTION = 12
TRIES = 6
"""Some moments are a millisecond long: an order's answer, before the same is heard in another way."""
SAVE_RUNS = 10
Say = Callable[[str], None]


class Campaign:
    """Runs cells. `runs` has the result of each, as JSON objects, in the order in which they ended."""

    def __init__(
        self, cells: Sequence[Cell], *, say: Say, keep_logs: Path | None = None, save: Callable[[], None] | None = None
    ) -> None:
        """`save` is called now and then while it works, and at the end: what was seen is not lost with the rest."""
        self.cells, self.say, self.keep_logs, self._save = list(cells), say, keep_logs, save or (lambda: None)
        self.began_s = time.monotonic()
        self.runs: list[dict[str, Any]] = []
        self.left: list[str] = []
        self.stop = threading.Event()
        self._portions: queue.Queue[list[Cell]] = queue.Queue()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def go(self, *, workers: int = WORKERS) -> dict[str, Any]:
        """Everything; the summary. Raises KeyboardInterrupt when nothing is left behind any more, Unfit when the
        machine is."""
        self.began_s = time.monotonic()
        grounds = [_batches(cells) for cells in by_ground(self.cells).values()]
        for turn in itertools.zip_longest(*grounds):
            for portion in filter(None, turn):
                self._portions.put(list(portion))
        session = Path(tempfile.mkdtemp(prefix=f"vfc-{os.getpid()}-", dir="/tmp"))
        ended = [threading.Event() for _ in range(workers)]
        threads = [threading.Thread(target=self._work, args=(session, event), name="chaos") for event in ended]
        for thread in threads:
            thread.start()
        try:
            # Not `join`: interrupted in it, Python 3.11 takes a thread that lives for one that has ended.
            while not all(event.wait(0.2) for event in ended):
                pass
        finally:
            with _no_interrupt():  # a second Ctrl-C must not leave half of it behind
                self.stop.set()
                for thread in threads:
                    thread.join()
                shutil.rmtree(session, ignore_errors=True)
            if self._failure is not None:
                self.say("".join(traceback.format_exception(self._failure)))
        if isinstance(self._failure, HostToolError):
            raise Unfit("this machine is not fit for chaos", cause=self._failure) from self._failure
        if self._failure is not None:
            raise self._failure
        self._save()
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Of the runs so far."""
        return report.summary(self.runs, seconds=time.monotonic() - self.began_s)

    def _work(self, session: Path, ended: threading.Event) -> None:
        try:
            while not self.stop.is_set():
                try:
                    portion = self._portions.get_nowait()
                except queue.Empty:
                    return
                self._do_portion(portion, session)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  the main thread raises it
            self._failure = error
            self.stop.set()
        finally:
            ended.set()

    def _do_portion(self, portion: list[Cell], session: Path) -> None:
        ground: Ground | None = None
        try:
            for cell in portion:
                for _ in range(TRIES):
                    if self.stop.is_set():
                        return
                    try:
                        ground = ground or Ground(*cell.ground, session, next(self._numbers))
                    except AssertionError as error:  # a host so busy that an agent does not start in time
                        seen = Seen(cell.name, why_not=f"no ground: {error}"[:200])
                        continue
                    seen = self._one(ground, cell)
                    if ground.is_broken:
                        self._give_up(ground, seen)
                        ground = None
                    if seen.injected:
                        break
                self._note(cell, seen)
        finally:
            if ground is not None:
                self.left += ground.close()

    def _one(self, ground: Ground, cell: Cell) -> Seen:
        run = Run(ground, cell, f"g{next(self._numbers)}", self.stop)
        try:
            return run.go()
        except (Stopped, HostToolError):
            raise
        except Exception as error:  # noqa: BLE001  a run that fails in a new way is a result, and a bug of ours
            ground.is_broken = True
            run.seen.injected = False
            where = traceback.extract_tb(error.__traceback__)[-1]
            run.seen.why_not = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"[:400]
            return run.seen

    def _give_up(self, ground: Ground, seen: Seen) -> None:
        if self.keep_logs is not None:
            folder = self.keep_logs / seen.cell.replace("/", "_")
            folder.mkdir(parents=True, exist_ok=True)
            for host in (ground.a, ground.b):
                shutil.copy(host.log_path, folder / f"{host.name}.log")
        self.left += ground.close()

    def _note(self, cell: Cell, seen: Seen) -> None:
        with self._lock:
            wire = verdict.wire(cell, seen)
            self.runs.append(wire)
            if len(self.runs) % SAVE_RUNS == 0:
                self._save()
            done = f"[{len(self.runs)}/{len(self.cells)}]"
            self.say(f"{done} {wire['verdict']:<16} {seen.wall_s:5.1f} s  {cell.name}  {wire['why'][:200]}")


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """SIGINT and SIGTERM change nothing while the block runs. A mask would not do: other threads would take them."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _batches(cells: Sequence[Cell]) -> list[Sequence[Cell]]:
    return [cells[at : at + PORTION] for at in range(0, len(cells), PORTION)]


def pairs() -> list[tuple[str, str]]:
    """The QEMUs of this machine, source and destination. Raises Unfit when there is none."""
    found = [pair for pair in PAIRS if all(pair)]
    if not found:
        raise Unfit("this machine has no QEMU", hint="run 'make setup' as root")
    return found
