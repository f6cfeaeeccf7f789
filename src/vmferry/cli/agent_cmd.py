"""`vmferry agent`: runs the agent until SIGTERM or SIGINT. The QEMUs stay."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from argparse import Namespace
from pathlib import Path

from vmferry.agent import config as agent_config
from vmferry.agent.agent import Agent

FLAGS = (
    "name", "listen", "peers", "pki_dir", "clear_text", "tls_only", "state_dir", "runtime_dir", "socket",
    "migration_address", "migration_ports", "qemu", "disk_dir", "repository", "repository_key",
)  # fmt: skip


def run(arguments: Namespace) -> int:
    """Runs until it is told to end."""
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    flags = {name: getattr(arguments, name) for name in FLAGS if getattr(arguments, name) is not None}
    path = Path(arguments.config) if arguments.config else None
    if path is None:
        flags.setdefault("name", socket.gethostname())
    config = agent_config.load(path, flags)
    asyncio.run(_serve(config))
    return 0


async def _serve(config: agent_config.AgentConfig) -> None:
    agent = Agent(config)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    await agent.start()
    try:
        await ending.wait()
    finally:
        await agent.close()
