"""The directory that holds everything one QEMU process leaves on a host.

Rule 1: one QEMU process, one directory: the source and the destination of the same VM on the same host
(trying vmferry out on one machine) must not share a socket, a log or a memory file.
"""

from __future__ import annotations

import dataclasses
import posixpath

from vmferry import limits
from vmferry.errors import SpecError


@dataclasses.dataclass(frozen=True, slots=True)
class RuntimePaths:
    """Where one QEMU process has its sockets, logs and memory file.

    `directory` is absolute; `ram_directory` is where a memory file goes, best a RAM filesystem (it is the
    same as `directory` when not given). Raises SpecError when a socket path would be too long for Linux;
    nothing exists then.
    """

    directory: str
    ram_directory: str | None = None

    def __post_init__(self) -> None:
        for path in (self.directory, self.ram_directory or "/"):
            if not path.startswith("/"):
                raise SpecError(f"the runtime directory {path!r} is not an absolute path")
        for path in (self.qmp_path, self.serial_socket_path, self.vnc_path):
            if len(path.encode()) > limits.UNIX_SOCKET_PATH_BYTES_MAX:
                raise SpecError(
                    f"the socket path {path!r} is longer than {limits.UNIX_SOCKET_PATH_BYTES_MAX} bytes",
                    hint="give the agent a state directory with a shorter path",
                )

    @property
    def qmp_path(self) -> str:
        """The QMP control socket; QEMU listens there and serves one client at a time."""
        return posixpath.join(self.directory, "qmp.sock")

    @property
    def log_path(self) -> str:
        """What QEMU printed: its warnings, and why it refused to start."""
        return posixpath.join(self.directory, "qemu.log")

    @property
    def serial_log_path(self) -> str:
        """What the guest printed on its first serial port; only ever appended to."""
        return posixpath.join(self.directory, "serial.log")

    @property
    def serial_socket_path(self) -> str:
        """The first serial port as a socket, when the spec asks for one."""
        return posixpath.join(self.directory, "serial.sock")

    @property
    def vnc_path(self) -> str:
        """The display of an adopted VM that had VNC."""
        return posixpath.join(self.directory, "vnc.sock")

    def recovery_path(self, number: int) -> str:
        """Where QEMU waits for its source at the try of this number to join a broken postcopy again. No longer than
        the others; a name that comes again is long out of use."""
        return posixpath.join(self.directory, f"rec{number % 1000}.sock")

    def ram_path(self, name: str) -> str:
        """The memory file of the memory object `name`, unique to this process by the directory's name."""
        tag = posixpath.basename(self.directory.rstrip("/"))
        place = self.ram_directory or self.directory
        return posixpath.join(place, f"vmferry-{tag}-{name}.ram")

    def rerooted(self, path: str) -> str:
        """A file of the runtime directory that takes the place of `path`, named after it."""
        return posixpath.join(self.directory, posixpath.basename(path.rstrip("/")) or "unnamed")
