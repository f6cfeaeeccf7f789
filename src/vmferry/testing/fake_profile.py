"""The two QEMU generations that the fake can be: what each reports of itself. Values as the real ones gave them.

Rule 1: options come from the option table; `tests/real/test_contract_real.py` compares the names and values with
the real programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmferry.core.option_table import CAPABILITIES, PARAMETERS, UNSET, Option


@dataclass(frozen=True, slots=True)
class Profile:
    """One version of QEMU."""

    version: tuple[int, int, int]
    package: str
    machines: tuple[str, ...]
    """Versioned q35 machine types, the newest first; it has the alias."""

    @property
    def has_proof(self) -> bool:
        """Waits for the destination's proof (postcopy-device), and says `failing` before `failed`."""
        return self.version >= (10, 2)

    @property
    def has_exit_on_error(self) -> bool:
        """`migrate-incoming` can be told to keep the process after an error."""
        return self.version >= (9, 1)

    def version_info(self) -> dict[str, Any]:
        """As query-version and the greeting have it."""
        major, minor, micro = self.version
        return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": self.package}

    def banner(self) -> str:
        """What --version prints first."""
        return f"QEMU emulator version {'.'.join(map(str, self.version))} ({self.package})"

    def capabilities(self) -> dict[str, bool]:
        """Name to default."""
        return {option.name: False for option in CAPABILITIES if self._has(option)}

    def parameters(self) -> dict[str, Any]:
        """Name to default, without those that are reported only once they are set."""
        return {
            option.name: option.qemu_default
            for option in PARAMETERS
            if self._has(option) and option.qemu_default is not UNSET
        }

    def _has(self, option: Option) -> bool:
        here = self.version[:2]
        return option.since <= here and (option.gone_in is None or here < option.gone_in)


_OLD_MACHINES = ("pc-q35-7.2", "pc-q35-7.1", "pc-q35-6.2")

PROFILES: dict[str, Profile] = {
    "7.2": Profile((7, 2, 22), "Debian 1:7.2+dfsg-7+deb12u18+b3", _OLD_MACHINES),
    "11.1": Profile((11, 1, 2), "Debian 1:11.1.2+ds-3", ("pc-q35-11.1", "pc-q35-10.0", *_OLD_MACHINES)),
}
