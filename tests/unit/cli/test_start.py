"""What a command pays for before it does anything."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"dataclasses", "inspect", "shutil", "asyncio", "subprocess", "msgspec", "rich", "numpy", "cryptography"}


def test_migrate_starts_without_what_is_slow_to_import() -> None:
    program = (
        "import sys, vmferry.cli.migrate_cmd\n"
        "from vmferry.cli.parser import build_parser\n"
        "build_parser().parse_args(['migrate', 'web1', 'host-b', '--json'])\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
