"""`vmferry`: reads the command line, runs one command, gives its exit code. Renders, decides nothing.

Rule 1: this file and what it imports at the top stay small: each command pays for them before it does anything.
        Everything heavy (the agent, certificates, the terminal's progress bar) is imported by its command.
Rule 2: with --json standard output has exactly one JSON object, also on failure.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

from vmferry.cli.parser import build_parser
from vmferry.errors import UsageError, VmferryError


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code: 0 means that what was asked for is so."""
    if sys.flags.optimize:
        sys.stderr.write("vmferry refuses to run with -O: its assertions guard guests\n")
        return UsageError.exit_code
    parser = build_parser()
    as_json = "--json" in (sys.argv[1:] if argv is None else argv)
    try:
        arguments = parser.parse_args(argv)
        module_name, _, function_name = arguments.run.partition(":")
        return int(getattr(import_module(module_name), function_name)(arguments))
    except VmferryError as error:
        report_error(error, as_json=as_json)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was begun goes on in the agents\n")
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (a pager, `head`): that is no failure of the command.
        sys.stdout = None
        return 141


def report_error(error: VmferryError, *, as_json: bool, extra: dict[str, Any] | None = None) -> None:
    """One object on standard output, or a few lines on standard error."""
    if as_json:
        print(json.dumps({**(extra or {}), "error": error.to_wire()}))
        return
    lines = [f"vmferry: {error.message}"]
    lines.append(f"  side: {error.side}   guest: {error.guest}   retry: {error.retry}")
    if error.hint:
        lines.append(f"  next: {error.hint}")
    cause = error.cause
    while cause:
        if cause.get("message") and cause["message"] != error.message:
            lines.append(f"  because: {cause['message']}")
        cause = cause.get("cause")
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
