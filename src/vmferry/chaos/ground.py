"""Two hosts for chaos: real agents in clear text, with proxies on their links and relays on the memory stream.

Theory of operation
-------------------
`testing.hosts.TwoAgents` gives two network namespaces with an agent each. What is different here: each agent is told
that the other listens at a `LinkProxy` of ours, which stands in the *other's* network, so that what crosses the cable
is the agent's own connection; and each QEMU is started through a script that gives it a second monitor for the
`Witness`. `storage` is "shared" (both see the same files), "own" (the target sees copies of the disks, so that one
side's locks are not the other's) or "small" (the journals lie on file systems of a few hundred KiB).

Rule 1: a ground is used for many runs, one after the other; one on which anything went wrong is thrown away.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from vmferry.chaos.link import LinkProxy
from vmferry.chaos.streams import Streams
from vmferry.chaos.told import LogTail
from vmferry.chaos.witness import Witness
from vmferry.testing.host_tools import HostToolError, run
from vmferry.testing.hosts import AGENT_PORT, QEMUS, AgentHost, TwoAgents
from vmferry.testing.qemus import with_second_monitor

PROXY_PORT = 7700
JOURNAL_FS = "2m"


class Ground:
    """`a` is the source, `b` the target. Raises HostToolError where this machine has no network namespaces."""

    def __init__(self, pair: tuple[str, str], storage: str, session: Path, number: int) -> None:
        self.pair, self.storage = pair, storage
        self.mounts: list[Path] = []
        self.monitors = session / f"m{number}"
        self.monitors.mkdir()
        programs = [with_second_monitor(QEMUS[name], session / f"qemu-{name}-{number}", self.monitors)
                    for name in pair]  # fmt: skip
        self.agents = TwoAgents(*programs, pki=None, cache=session / f"facts{number}")
        self.folder = self.agents.folder
        self.a, self.b = self.agents.a, self.agents.b
        self.streams = Streams()
        self.links: list[LinkProxy] = []
        self.witness: Witness | None = None
        self.is_broken = False
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        if self.agents.hosts.kind != "netns":
            raise HostToolError("chaos needs network namespaces (root)")
        (self.folder / "guests").mkdir()
        self.disks = self.folder / "disks"
        self.disks.mkdir()
        self.disks_b = self.disks
        if self.storage == "own":
            self.disks_b = self.folder / "disks-b"
            self.disks_b.mkdir()
            self.b.over = (self.disks_b, self.disks)
        if self.storage == "small":
            for host in (self.a, self.b):
                self._small(host.state)
        for host, other in ((self.a, self.b), (self.b, self.a)):
            with other.net.inside():
                proxy = LinkProxy(
                    (other.net.address, PROXY_PORT), (other.net.address, AGENT_PORT), self.streams.rewrite
                )
            self.links.append(proxy)
            at = host.flags.index("--peer") + 1
            host.flags[at] = f"{other.name}={other.net.address}:{PROXY_PORT}"
        self.witness = Witness(self.monitors, f"{self.folder}/")
        self.agents.start()
        self.logs = {host.name: LogTail(host.log_path) for host in (self.a, self.b)}

    @property
    def link(self) -> LinkProxy:
        """From the source's agent to the target's."""
        return self.links[0]

    def _small(self, folder: Path) -> None:
        """A file system of its own, with what is there already."""
        kept = folder.with_name(folder.name + "-before")
        folder.rename(kept)
        folder.mkdir()
        run(["mount", "-t", "tmpfs", "-o", f"size={JOURNAL_FS}", "vmferry-chaos", str(folder)])
        self.mounts.append(folder)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        shutil.rmtree(kept)

    def host(self, actor: str) -> AgentHost:
        """source-… and target-… -> the host."""
        return self.a if actor.startswith("source") else self.b

    @contextlib.contextmanager
    def cable_cut(self, ports: list[int], way: str) -> Iterator[None]:
        """While the block runs packets of these ports are lost at the target's host, without a word to anybody."""
        direction = {"both-ways": "both", "to-target": "in", "to-source": "out"}[way]
        with contextlib.ExitStack() as stack:
            for port in ports:
                stack.enter_context(self.b.net.drop(port=port, direction=direction))  # type: ignore[arg-type]
            yield

    def close(self) -> list[str]:
        """Ends it. What was left that should be gone, in words."""
        left: list[str] = []
        with contextlib.ExitStack() as stack:  # each step is done whatever becomes of the others; the last one first
            stack.callback(shutil.rmtree, self.monitors, ignore_errors=True)
            stack.callback(lambda: left.extend(self.agents.remove()))
            for folder in self.mounts:
                stack.callback(run, ["umount", "-l", str(folder)])
            if self.witness is not None:
                stack.callback(self.witness.close)
            stack.callback(self.streams.forget)
            for link in self.links:
                stack.callback(link.close)
            stack.callback(self.agents.close)
        return left
