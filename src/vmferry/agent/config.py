"""What an agent is told at start: its name, its folders, its peers, its QEMU, its certificates.

A TOML file and flags give the same fields; flags win. See `docs/agent.md` for an example.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vmferry.errors import UsageError

DEFAULT_PORT = 7600
DEFAULT_STATE = Path("/var/lib/vmferry")
DEFAULT_RUNTIME = Path("/run/vmferry")
DEFAULT_QEMU = "qemu-system-x86_64"


@dataclass(frozen=True, slots=True)
class Address:
    """A host's address and TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, default_port: int = DEFAULT_PORT) -> Address:
    """'10.0.0.1:7600', '10.0.0.1', '[fd00::1]:7600' -> Address. Raises UsageError."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    elif text.count(":") > 1:
        host, port = text, ""
    else:
        host, _, port = text.partition(":")
    if not host or (port and not port.isdigit()) or (port and not 0 <= int(port) < 65536):
        raise UsageError(f"{text!r} is not an address; write ADDRESS:PORT, for example 10.0.0.1:{DEFAULT_PORT}")
    return Address(host, int(port) if port else default_port)


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Another agent: its name (as in its certificate) and the addresses to try, in order."""

    name: str
    addresses: tuple[Address, ...]


def parse_peer(text: str) -> PeerConfig:
    """'host-b=10.0.0.2:7600,10.1.0.2:7600' -> PeerConfig. Raises UsageError."""
    name, sep, rest = text.partition("=")
    if not sep or not name or not rest:
        raise UsageError(f"{text!r} is not a peer; write NAME=ADDRESS:PORT")
    return PeerConfig(name, tuple(parse_address(a) for a in rest.split(",")))


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Everything an agent needs to know."""

    name: str
    state_dir: Path = DEFAULT_STATE
    runtime_dir: Path = DEFAULT_RUNTIME
    socket: Path | None = None
    listen: Address | None = None
    """Where other agents reach this one; None: no other agent does."""
    migration_address: tuple[str, ...] = ()
    """Where guests' memory arrives, best first; the listen address if none is named. With several connections (multifd)
    the first, as QEMU listens there itself."""
    migration_ports: tuple[int, int] = (49152, 49215)
    """First and last port for guests' memory; (0, 0) lets the kernel choose."""
    pki_dir: Path | None = None
    clear_text: bool = False
    """Agents and guests' memory in clear text, asked for by name."""
    tls_only: bool = False
    """No part in a migration in clear text, whoever asks for it by name, as a destination or a source."""
    peers: dict[str, PeerConfig] = field(default_factory=dict)
    qemu: str = DEFAULT_QEMU
    disk_dir: Path | None = None
    """Where copies of guests' disks are put; None: under the path that they have on the host they come from."""
    repository: str = ""
    """Where snapshots are kept: a folder, or the address of an object store (`s3://bucket/folder`); '': a folder of the
    agent's own."""
    repository_key: Path | None = None
    """The file with the key of an encrypted repository; None: it is not encrypted."""
    repository_options: dict[str, str] = field(default_factory=dict)
    """What an object store's address does not say: endpoint, region, … (obstore's words)."""

    @property
    def control_socket(self) -> Path:
        """The Unix socket of the command line and of any QMP client."""
        return self.socket or self.runtime_dir / "agent.sock"

    @property
    def journal_path(self) -> Path:
        return self.state_dir / "journal.sqlite"

    @property
    def repository_folder(self) -> Path:
        """Where snapshots are kept if nothing else is named."""
        return self.state_dir / "repository"

    @property
    def data_addresses(self) -> tuple[str, ...]:
        """The addresses that sources try in their order, to connect with guests' memory."""
        return self.migration_address or (self.listen.host if self.listen else "127.0.0.1",)

    @property
    def data_address(self) -> str:
        """The first of them."""
        return self.data_addresses[0]


_PATHS = ("state_dir", "runtime_dir", "socket", "pki_dir", "disk_dir", "repository_key")
_SWITCHES = ("clear_text", "tls_only")
_TEXTS = ("name", "qemu", "repository")


def from_mapping(base: AgentConfig | None, values: dict[str, Any], *, origin: str) -> AgentConfig:
    """Fields by name (TOML or flags) over a base. Raises UsageError naming the key and where it stands."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        try:
            if name in _PATHS:
                fields[name] = Path(value)
            elif name in _TEXTS:
                fields[name] = str(value)
            elif name == "listen":
                fields[name] = parse_address(str(value))
            elif name in _SWITCHES:
                fields[name] = bool(value)
            elif name == "migration_address":
                several = value.split(",") if isinstance(value, str) else value
                fields[name] = tuple(str(address).strip() for address in several)
            elif name == "migration_ports":
                first, _, last = str(value).partition("-")
                fields[name] = (int(first), int(last or first))
            elif name == "repository_options":
                fields[name] = {str(option): str(given) for option, given in value.items()}
            elif name == "peers":
                pairs = [f"{n}={a}" for n, a in value.items()] if isinstance(value, dict) else list(value)
                peers = [parse_peer(str(pair)) for pair in pairs]
                fields[name] = {**(base.peers if base else {}), **{p.name: p for p in peers}}
            else:
                raise UsageError(f"{origin}: {key!r} is not a setting of the agent")
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{origin}: {key} = {value!r} cannot be read: {error}") from error
    if base is None and not fields.get("name"):
        raise UsageError(f"{origin}: an agent needs a name; say --name NAME")
    config = AgentConfig(**fields) if base is None else replace(base, **fields)
    if config.clear_text and config.tls_only:
        raise UsageError(f"{origin}: clear_text and tls_only together leave nothing that this agent could do")
    return config


def load(path: Path | None, flags: dict[str, Any]) -> AgentConfig:
    """The file (if any) and the flags that were given. Raises UsageError."""
    if path is None:
        return from_mapping(None, flags, origin="command line")
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as TOML: {error}") from error
    values.setdefault("name", flags.get("name", ""))
    return from_mapping(from_mapping(None, values, origin=str(path)), flags, origin="command line")
