"""Two hosts on one machine: two network namespaces with a cable between them.

Theory of operation
-------------------
Each host is a network namespace; a veth pair joins them. Programs are started inside with `ip netns exec`,
which becomes the program, so its process id is the one that the caller sees. Files and Unix sockets are
shared by all. Where namespaces are not possible, the hosts are two loopback addresses (`kind` is "loopback");
then nothing can be done to the cable.

Rule 1: names are unique to this process, and only what was made here is deleted.
Rule 2: processes started through a host do not outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from vmferry.testing.host_tools import HostToolError, run

Kind = Literal["netns", "loopback"]
Direction = Literal["in", "out", "both"]
_INTERFACE = "cable0"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count(1)


class CableError(RuntimeError):
    """These two hosts have no cable that could be pulled: they are loopback addresses."""


@dataclass(slots=True)
class Host:
    """One end. `address` (IPv4) and `address6` are where its servers listen and what the other end dials."""

    name: str
    kind: Kind
    address: str
    address6: str
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on this host."""
        return ["ip", "netns", "exec", self.name, *argv] if self.kind == "netns" else list(argv)

    def run(self, argv: Sequence[str], *, timeout_s: float = 60, environment: Mapping[str, str] | None = None) -> str:
        """Runs to the end; returns what was printed. Raises HostToolError."""
        return run(self.argv(argv), environment=environment, timeout_s=timeout_s)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a program, with options of subprocess.Popen. It is killed when the hosts are closed."""
        process: subprocess.Popen[Any] = subprocess.Popen(self.argv(argv), **options)
        self.processes.append(process)
        return process

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in the host's network while the block runs. Sockets and threads that it makes stay there."""
        if self.kind != "netns":
            yield
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with contextlib.ExitStack() as stack:
            home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, home)
            there = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, there)
            _enter(libc, there)
            stack.callback(_enter, libc, home)
            yield

    def link_down(self) -> None:
        """Pulls the cable. No end is told by a packet."""
        self._ip("link", "set", _INTERFACE, "down")

    def link_up(self) -> None:
        """Puts the cable back; addresses are still there."""
        self._ip("link", "set", _INTERFACE, "up")
        self._ip("-6", "address", "replace", f"{self.address6}/64", "dev", _INTERFACE, "nodad")

    @contextmanager
    def drop(
        self,
        *,
        percent: int = 100,
        port: int | tuple[int, int] | None = None,
        direction: Direction = "both",
        reset: bool = False,
    ) -> Iterator[None]:
        """While the block runs, packets at this host get lost.

        `percent`: how many of those that match. `port`: only TCP segments from or to this port (of these). `direction`:
        as this host sees it. `reset`: instead of silence the sender gets a TCP reset.
        """
        self._need_cable()
        table = f"vmferry{next(_numbers)}"
        self._nft(_rules(table, percent=percent, port=port, direction=direction, reset=reset))
        try:
            yield
        finally:
            self._nft(f"delete table inet {table}")

    @contextmanager
    def limit(self, *, bytes_per_s: int) -> Iterator[None]:
        """While the block runs, this host sends no faster than this."""
        self._need_cable()
        queue = ["dev", _INTERFACE, "root"]
        rate = ["tbf", "rate", f"{bytes_per_s * 8}bit", "burst", "64kb", "latency", "50ms"]
        self.run(["tc", "qdisc", "replace", *queue, *rate])
        try:
            yield
        finally:
            self.run(["tc", "qdisc", "del", *queue])

    def _ip(self, *words: str) -> None:
        self._need_cable()
        run(["ip", "-n", self.name, *words])

    def _nft(self, commands: str) -> None:
        self.run(["nft", commands])

    def _need_cable(self) -> None:
        if self.kind != "netns":
            raise CableError(f"{self.name} is a loopback address; this needs network namespaces (root)")


class TwoHosts:
    """`with TwoHosts.create() as hosts:` gives `hosts.a` and `hosts.b`."""

    def __init__(self, a: Host, b: Host) -> None:
        self.a = a
        self.b = b

    @property
    def kind(self) -> Kind:
        """What the hosts are; the same for both."""
        return self.a.kind

    @classmethod
    def create(cls) -> Self:
        """Namespaces if this machine allows it, else loopback addresses."""
        return cls.create_namespaces() if namespaces_possible() else cls.create_loopback()

    @classmethod
    def create_loopback(cls) -> Self:
        return cls(
            Host(name="127.0.0.11", kind="loopback", address="127.0.0.11", address6="::1"),
            Host(name="127.0.0.12", kind="loopback", address="127.0.0.12", address6="::1"),
        )

    @classmethod
    def create_namespaces(cls) -> Self:
        """Raises HostToolError. **If this raises**, nothing is left behind."""
        token = secrets.token_bytes(3)
        stem = f"vmferry-{os.getpid()}-{token.hex()}"
        ends = [
            Host(
                name=f"{stem}-{letter}",
                kind="netns",
                address=f"10.{token[0]}.{token[1]}.{number}",
                address6=f"fd00:{token[0]:x}:{token[1]:x}:{token[2]:x}::{number}",
            )
            for number, letter in ((1, "a"), (2, "b"))
        ]
        hosts = cls(*ends)
        try:
            for host in ends:
                run(["ip", "netns", "add", host.name])
            a, b = (host.name for host in ends)
            peer = ["peer", "name", _INTERFACE, "netns", b]
            run(["ip", "link", "add", _INTERFACE, "netns", a, "type", "veth", *peer])
            for host in ends:
                run(["ip", "-n", host.name, "link", "set", "lo", "up"])
                run(["ip", "-n", host.name, "address", "add", f"{host.address}/30", "dev", _INTERFACE])
                host.link_up()
        except BaseException:
            hosts.close()
            raise
        return hosts

    def close(self) -> None:
        """Kills what still runs on the hosts and was started through them; then takes the hosts away."""
        for host in (self.a, self.b):
            for process in host.processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()
            host.processes.clear()
            if host.kind == "netns" and (Path("/run/netns") / host.name).exists():
                run(["ip", "netns", "delete", host.name])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def namespaces_possible() -> bool:
    """Tries it: rights, kernel options and tools all have to be there."""
    name = f"vmferry-{os.getpid()}-{secrets.token_hex(3)}-try"
    try:
        run(["ip", "netns", "add", name])
    except HostToolError:
        return False
    try:
        run(["ip", "netns", "exec", name, "true"])
        run(["ip", "-n", name, "link", "add", _INTERFACE, "type", "veth", "peer", "name", "cable1"])
    except HostToolError:
        return False
    finally:
        run(["ip", "netns", "delete", name])
    return True


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _rules(table: str, *, percent: int, port: int | tuple[int, int] | None, direction: Direction, reset: bool) -> str:
    assert 1 <= percent <= 100, percent
    # Resets pass: our own would else be answered instead of sent.
    verdict = "tcp flags & rst == 0 reject with tcp reset" if reset else "drop"
    chance = "" if percent == 100 else f"numgen random mod 100 < {percent} "
    if port is not None:
        ports = "-".join(map(str, port)) if isinstance(port, tuple) else str(port)
        matches = [f"tcp sport {ports} ", f"tcp dport {ports} "]
    else:
        matches = ["meta l4proto tcp "] if reset else [""]
    commands = [f"add table inet {table}"]
    for hook, interface in (("input", "iifname"), ("output", "oifname")):
        if direction == "both" or hook.startswith(direction):
            commands.append(f"add chain inet {table} {hook} {{ type filter hook {hook} priority 0; }}")
            commands += [
                f'add rule inet {table} {hook} {interface} "{_INTERFACE}" {match}{chance}{verdict}' for match in matches
            ]
    return "; ".join(commands)
