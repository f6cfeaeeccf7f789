"""`vmferry demo` and `vmferry bench`: both make their own hosts, agents and guests, and take them away again."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from types import FrameType

from vmferry.cli.main import report_error
from vmferry.errors import VmferryError

INTERRUPTED = 130


def demo(arguments: Namespace) -> int:
    """Boots a guest, moves it, lets it judge. 0: it went on without losing anything."""
    from vmferry.demo.run import DemoWish, run_demo

    wish = DemoWish(
        mode=arguments.mode,
        memory=arguments.memory,
        dirty_mib_per_s=arguments.dirty,
        clear_text=arguments.clear_text,
        as_json=arguments.json,
    )
    try:
        with sigterm_interrupts():
            result, code = run_demo(wish)
    except VmferryError as error:
        report_error(error, as_json=arguments.json, extra={"result": "failed"})
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted(as_json=arguments.json)
    if arguments.json:
        print(json.dumps(result))
    return code


def bench(arguments: Namespace) -> int:
    """Measures against the raw thing. 0: it could be measured, whatever came out."""
    measure = import_module(f"vmferry.bench.{arguments.what}")
    try:
        with sigterm_interrupts():
            result = measure.run_bench(rounds=arguments.rounds)
    except KeyboardInterrupt:
        return _interrupted(as_json=arguments.json)
    if arguments.json:
        print(json.dumps(result))
        return 0
    for line in measure.report_lines(result):
        print(line)
    return 0


def _interrupted(*, as_json: bool) -> int:
    sys.stderr.write("interrupted; hosts, agents and guests of it are gone\n")
    if as_json:
        print(json.dumps({"result": "interrupted"}))
    return INTERRUPTED


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: nothing may be left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
