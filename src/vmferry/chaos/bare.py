"""A migration by a bare QMP script, as a careful person writes it: for comparison. Run as a process of its own.

    python -m vmferry.chaos.bare SOURCE.sock TARGET.sock HOST PORT MODE BANDWIDTH PAGES-BANDWIDTH

A byte on standard input begins the migration, another one switches to postcopy.

The destination waits with -S. Both QEMUs get the same capabilities. When the source is completed (in postcopy: when it
is postcopy-active) the destination is continued and, once the source is completed, the source is quit. If the
migration fails, or the destination cannot be continued, the destination is quit and the source continued. There is no
journal, no recovery and no second try, as in every such script.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import Any

from vmferry.errors import VmferryError
from vmferry.qmp.blocking import BlockingClient

POLL_S = 0.01


def main(words: list[str]) -> int:
    """0: the destination runs the guest; 1: it went back; 2: the script knows no further."""
    source_path, target_path, host, port, mode, bandwidth, pages = words
    with BlockingClient(source_path) as source, BlockingClient(target_path) as target:
        limits = {"max-bandwidth": int(bandwidth), "max-postcopy-bandwidth": int(pages)}
        return move(source, target, f"tcp:{host}:{port}", postcopy=mode == "postcopy", limits=limits)


def move(source: BlockingClient, target: BlockingClient, uri: str, *, postcopy: bool, limits: dict[str, int]) -> int:
    """The whole migration."""
    names = ["return-path", "postcopy-ram"] if postcopy else ["return-path"]
    wanted: dict[str, Any] = {"capabilities": [{"capability": name, "state": True} for name in names]}
    target.execute("migrate-set-capabilities", wanted)
    source.execute("migrate-set-capabilities", wanted)
    target.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    source.execute("migrate-set-parameters", limits)
    address = target.execute("query-migrate")["socket-address"][0]
    print(address["port"], flush=True)
    os.read(0, 1)
    source.execute("migrate", {"uri": uri})
    continued = switched = False
    while True:
        status = source.execute("query-migrate").get("status")
        if postcopy and status == "active" and not switched and 0 in select.select([0], [], [], 0)[0]:
            switched = True
            source.execute("migrate-start-postcopy")
        if status in ("postcopy-active", "completed") and not continued:
            try:
                _continue(target)
                continued = True
            except VmferryError:
                return _go_back(source, target)
        if status == "completed":
            with contextlib.suppress(VmferryError):
                source.execute("quit")
            return 0
        if status in ("failed", "cancelled"):
            return _go_back(source, target)
        if status == "postcopy-paused":
            return 2
        select.select([], [], [], POLL_S)


def _continue(target: BlockingClient) -> None:
    while target.execute("query-status")["status"] == "inmigrate":
        select.select([], [], [], POLL_S)
    target.execute("cont")


def _go_back(source: BlockingClient, target: BlockingClient) -> int:
    with contextlib.suppress(VmferryError):
        target.execute("quit")
    try:
        source.execute("cont")
    except VmferryError:
        return 2
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except VmferryError as error:
        print(f"the script ends: {error}", file=sys.stderr)
        sys.exit(2)
