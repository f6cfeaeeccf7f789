"""The command line's talk with the agent of this host: one blocking QMP session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vmferry.errors import AgentUnreachable
from vmferry.qmp.blocking import BlockingClient
from vmferry.qmp.codec import Event
from vmferry.qmp.errors import QmpCommandError, QmpDisconnected, QmpTimeout

CONNECT_S = 5.0
COMMAND_S = 60.0


def connect(path: str) -> BlockingClient:
    """Raises AgentUnreachable; no guest is concerned."""
    try:
        return BlockingClient(path, name="the agent", deadline_s=CONNECT_S)
    except (QmpDisconnected, QmpTimeout) as error:
        raise AgentUnreachable(f"no agent answers on {path}", cause=error) from error


def execute(
    client: BlockingClient,
    command: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    deadline_s: float = COMMAND_S,
    on_event: Callable[[Event], None] | None = None,
) -> Any:
    """One command. Raises the agent's own error in its class, or AgentUnreachable (it may have been done)."""
    try:
        return client.execute(command, arguments, deadline_s=deadline_s, on_event=on_event)
    except QmpCommandError as error:
        raise (error.remote or error) from error
    except (QmpDisconnected, QmpTimeout) as error:
        raise AgentUnreachable(
            f"the agent did not answer {command}; whether it was carried out is not known",
            guest="unknown",
            hint="'vmferry ls' shows how things are",
            cause=error,
        ) from error


def once(path: str, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Connect, one command, close."""
    with connect(path) as client:
        return execute(client, command, arguments)
