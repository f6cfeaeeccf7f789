"""docs/commands.md: every command with its help, as `vmferry COMMAND --help` prints it."""

from __future__ import annotations

import argparse
from typing import Final

from vmferry.cli.parser import DEFAULT_SOCKET, build_parser

WIDTH: Final = 100
_HEAD: Final = """\
# Commands

<!-- made by tools/gen_docs.py from src/vmferry/cli/parser.py; do not edit -->

What `vmferry COMMAND --help` prints. Exit codes are in [exit-codes.md](exit-codes.md), migration options in
[options.md](options.md).
"""


def docs_markdown() -> str:
    """docs/commands.md; the same on every terminal and in every environment."""
    parser = build_parser()
    choices = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return _HEAD + "".join(f"\n## {name}\n\n```\n{_help(command)}\n```\n" for name, command in choices.items())


def _help(command: argparse.ArgumentParser) -> str:
    for action in command._actions:
        if action.dest == "socket" and action.default is not None:
            action.default = DEFAULT_SOCKET  # not the environment of whoever makes the document

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, width=WIDTH)

    command.formatter_class = formatter
    return command.format_help().strip()
