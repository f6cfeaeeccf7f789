"""The QMP commands of a fake QEMU. Only what vmferry and its tests use; anything else is CommandNotFound."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from vmferry.testing.fake_block import Block
from vmferry.testing.fake_incoming import Incoming
from vmferry.testing.fake_link import Link, SocketLink
from vmferry.testing.fake_outgoing import IN_POSTCOPY, OVER, WIRE_BYTES, Outgoing
from vmferry.testing.fake_state import Refused, State
from vmferry.testing.fake_stream import SPEAKS, StreamLink

OOB = frozenset({"yank", "query-yank", "migrate-pause", "migrate-recover"})
"""Commands that may come out of band."""
_BUSY = "There's a migration process in progress"
_SET_UP = frozenset({"setup", "wait-unplug", *IN_POSTCOPY, "active", "pre-switchover", "device", "postcopy-device"})
YANK_TEXT = "Instance not found"


class Commands:
    """One fake QEMU's monitor commands over its state."""

    def __init__(
        self,
        state: State,
        *,
        memory_bytes: int,
        cpus: int,
        devices: dict[str, str],
        incoming: bool,
        block: Block | None = None,
    ) -> None:
        self.state = state
        self.outgoing: Outgoing | None = None
        self.incoming: Incoming | None = None
        self.block = block or Block(state, {}, ())
        self.received: list[int] = []
        """Descriptors that came with the newest message."""
        self.over = asyncio.Event()
        """Set when the process shall end."""
        self._is_incoming = incoming
        self._memory_bytes, self._cpus, self._devices = memory_bytes, cpus, devices
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses: list[dict[str, Any]] = []
        if incoming:
            state.run_state = "inmigrate"

    async def run(self, name: str, arguments: dict[str, Any], *, oob: bool) -> Any:
        """One command. Raises Refused."""
        if oob and name not in OOB:
            raise Refused(f"The command {name} does not support OOB")
        if not oob:
            await self.state.audible.wait()
        fixed = self._fixed(name, arguments)
        if fixed is not None:
            return fixed
        method = getattr(self, "_do_" + name.replace("-", "_"), None)
        if method is None:
            with contextlib.suppress(NotImplementedError):
                return await self.block.run(name, arguments)
            raise Refused(f"The command {name} has not been found", "CommandNotFound")
        return await method(arguments)

    # --- what never changes ---

    def _fixed(self, name: str, arguments: dict[str, Any]) -> Any:
        profile = self.state.profile
        match name:
            case "query-version":
                return profile.version_info()
            case "query-kvm":
                return {"enabled": False, "present": True}
            case "query-pci" | "query-memory-devices":
                return []
            case "query-memory-size-summary":
                return {"base-memory": self._memory_bytes, "plugged-memory": 0}
            case "query-hotpluggable-cpus":
                props = [{"socket-id": n, "core-id": 0, "thread-id": 0} for n in range(self._cpus)]
                path = "/machine/unattached/device"
                return [{"props": p, "type": "qemu64-x86_64-cpu", "vcpus-count": 1, "qom-path": path} for p in props]
            case "qom-list":
                return self._objects_at(str(arguments["path"]))
            case "query-machines":
                return _machines(profile.machines)
            case "query-cpu-definitions":
                return [{"name": n, "unavailable-features": [], "migration-safe": True} for n in ("qemu64", "max")]
        return None

    def _objects_at(self, path: str) -> list[dict[str, str]]:
        if path == "/machine/peripheral":
            return [{"name": name, "type": f"child<{kind}>"} for name, kind in self._devices.items()]
        return []

    # --- the guest ---

    async def _do_query_status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"status": self.state.run_state, "running": self.state.is_running}

    async def _do_cont(self, arguments: dict[str, Any]) -> None:
        state = self.state
        if state.run_state == "inmigrate":
            return  # the trap of 11.1: it says yes, and the guest stays where it is
        if state.run_state == "finish-migrate":
            raise Refused("Migration is not finalized yet")
        await state.step("cont", lost=self.over)
        text = state.script.get("cont")
        if text:
            raise Refused(str(text))
        state.set_run_state("running")
        await state.step("cont-answer", lost=self.over)

    async def _do_stop(self, arguments: dict[str, Any]) -> None:
        if self.state.is_running:
            self.state.set_run_state("paused")
        await self.state.step("stop", lost=self.over)

    async def _do_quit(self, arguments: dict[str, Any]) -> None:
        self._shut_down(guest=False, reason="host-qmp-quit")

    async def _do_system_powerdown(self, arguments: dict[str, Any]) -> None:
        self.state.emit("POWERDOWN", None)
        self._shut_down(guest=True, reason="guest-shutdown")

    def _shut_down(self, *, guest: bool, reason: str) -> None:
        self.state.director.tell({"running": False})
        self.state.emit("SHUTDOWN", {"guest": guest, "reason": reason})
        self.over.set()

    # --- options ---

    async def _do_query_migrate_capabilities(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"state": state, "capability": name} for name, state in self._read_back(self.state.capabilities)]

    async def _do_query_migrate_parameters(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return dict(self._read_back(self.state.parameters))

    def _read_back(self, values: dict[str, Any]) -> list[tuple[str, Any]]:
        wrong = self.state.script.get("wrong", {})
        return [(name, wrong.get(name, value)) for name, value in values.items()]

    async def _do_migrate_set_capabilities(self, arguments: dict[str, Any]) -> None:
        if self.outgoing is not None and self.state.word not in OVER:
            raise Refused(_BUSY)
        wanted = {str(c["capability"]): bool(c["state"]) for c in arguments["capabilities"]}
        self._take(self.state.capabilities, wanted)

    async def _do_migrate_set_parameters(self, arguments: dict[str, Any]) -> None:
        self._take(self.state.parameters, arguments)
        self.state.changed.set()

    def _take(self, values: dict[str, Any], wanted: dict[str, Any]) -> None:
        """All or nothing, as QEMU does it."""
        refusals = self.state.script.get("refuse", {})
        for name in wanted:
            if name in refusals:
                raise Refused(str(refusals[name]))
            if name not in values:
                raise Refused(f"Parameter '{name}' is unexpected")
        values.update(wanted)

    # --- descriptors and objects ---

    async def _do_getfd(self, arguments: dict[str, Any]) -> None:
        if not self.received:
            raise Refused("No file descriptor supplied via SCM_RIGHTS")
        old = self.state.descriptors.pop(str(arguments["fdname"]), None)
        if old is not None:
            self.state.outside.close_descriptor(old)
        self.state.descriptors[str(arguments["fdname"])] = self.received.pop(0)

    async def _do_closefd(self, arguments: dict[str, Any]) -> None:
        found = self.state.descriptors.pop(str(arguments["fdname"]), None)
        if found is None:
            raise Refused(f"File descriptor named '{arguments['fdname']}' not found")
        self.state.outside.close_descriptor(found)

    async def _do_object_add(self, arguments: dict[str, Any]) -> None:
        if arguments["id"] in self.state.objects:
            raise Refused(f"attempt to add duplicate property '{arguments['id']}' to object (type 'container')")
        self.state.objects[str(arguments["id"])] = str(arguments["qom-type"])

    async def _do_object_del(self, arguments: dict[str, Any]) -> None:
        if self.state.objects.pop(str(arguments["id"]), None) is None:
            raise Refused(f"object '{arguments['id']}' not found")

    # --- migration ---

    async def _do_query_migrate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        state, out = self.state, self.outgoing
        if state.word is None:
            return {}
        info: dict[str, Any] = {"status": state.word}
        if state.error_desc is not None:
            info["error-desc"] = state.error_desc
        if self._addresses and state.word == "setup":
            info["socket-address"] = self._addresses
        if out is not None and state.word != "setup":
            left = max(0, WIRE_BYTES - state.sent_bytes)
            empty_pages = self._memory_bytes // 4096 * (WIRE_BYTES - left) // WIRE_BYTES
            info["total-time"] = int((state.outside.now_s() - out.started_s) * 1000)
            info["setup-time"] = 1
            info["ram"] = {
                "transferred": state.sent_bytes, "total": self._memory_bytes, "remaining": left, "page-size": 4096,
                "mbps": 1000.0, "dirty-sync-count": state.passes, "dirty-pages-rate": 0, "duplicate": empty_pages,
                "normal": state.sent_bytes // 4096, "normal-bytes": state.sent_bytes, "pages-per-second": 0,
            }  # fmt: skip
            if out.downtime_ms is not None:
                info["downtime"] = out.downtime_ms
        return info

    async def _do_migrate(self, arguments: dict[str, Any]) -> None:
        state = self.state
        connect = self._opener(arguments)
        if arguments.get("resume"):
            if self.outgoing is None:
                raise Refused("Cannot resume if there is no paused migration")
            self.outgoing.resume(connect)
            return
        if state.word not in OVER:
            raise Refused(_BUSY)
        if state.run_state == "inmigrate":
            raise Refused("Guest is waiting for an incoming migration")
        if state.run_state == "postmigrate":
            raise Refused("Can't migrate the vm that was paused due to previous migration")
        self.incoming = None
        self.outgoing = Outgoing(state, connect)
        self._keep(self.outgoing.run())

    async def _do_migrate_incoming(self, arguments: dict[str, Any]) -> None:
        state = self.state
        if not self._is_incoming or self.incoming is not None:
            raise Refused("'-incoming' was not specified on the command line")
        if "exit-on-error" in arguments and not state.profile.has_exit_on_error:
            raise Refused("Parameter 'exit-on-error' is unexpected")
        accept = await self._acceptor(arguments)
        self.incoming = Incoming(state, accept, exits_on_error=bool(arguments.get("exit-on-error", True)))
        self._keep(self.incoming.run())

    async def _do_migrate_cancel(self, arguments: dict[str, Any]) -> None:
        if self.outgoing is not None:
            self.outgoing.cancel()

    async def _do_migrate_continue(self, arguments: dict[str, Any]) -> None:
        if self.outgoing is None or self.state.word != "pre-switchover" or arguments["state"] != self.state.word:
            raise Refused(f"Migration not in expected state: {self.state.word}")
        self.outgoing.continued.set()

    async def _do_migrate_start_postcopy(self, arguments: dict[str, Any]) -> None:
        if not self.state.capabilities["postcopy-ram"]:
            raise Refused("Enable postcopy with migrate_set_capability before the start of migration")
        if self.outgoing is None or self.state.word in OVER:
            raise Refused("Start the migration before postcopy")
        self.outgoing.postcopy_wanted.set()
        self.state.changed.set()

    async def _do_migrate_pause(self, arguments: dict[str, Any]) -> None:
        if self.incoming is not None:
            self.incoming.pause()
        elif self.outgoing is not None and self.state.word in ("postcopy-active", "postcopy-recover"):
            self.outgoing.yank()
        else:
            raise Refused("migrate-pause is currently only supported during postcopy-active state")

    async def _do_migrate_recover(self, arguments: dict[str, Any]) -> None:
        if self.incoming is None:
            raise Refused("Migrate recover can only be run when postcopy is paused.")
        self.incoming.check_recovers()
        self.incoming.recover(await self._acceptor(arguments))

    async def _do_query_yank(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        monitor = {"type": "chardev", "id": "vmferry-qmp"}
        return [monitor, {"type": "migration"}] if self.state.word in _SET_UP else [monitor]

    async def _do_yank(self, arguments: dict[str, Any]) -> None:
        nodes = [str(i["node-name"]) for i in arguments["instances"] if i["type"] == "block-node"]
        if nodes:
            for node in nodes:
                self.block.yank(node)
            return
        if self.state.word not in _SET_UP | {"cancelling", "failing"}:
            raise Refused(YANK_TEXT, "DeviceNotFound")
        for side in (self.outgoing, self.incoming):
            if side is not None:
                side.yank()

    # --- inside ---

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work, name="fake-migration")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    def _opener(self, arguments: dict[str, Any]) -> Callable[[], Awaitable[Link]]:
        """How to get the connection that `uri` names. Raises Refused."""
        kind, _, rest = str(arguments.get("uri", "")).partition(":")
        if kind == "fd":
            descriptor = self.state.descriptors.pop(rest, None)
            if descriptor is None:
                raise Refused(f"File descriptor named '{rest}' has not been found")
            return lambda: self._open(descriptor, rest)
        if kind == "tcp":
            host, _, port = rest.rpartition(":")
            return lambda: self.state.outside.connect(host, int(port))
        raise Refused(f"unknown migration protocol: {arguments.get('uri')}")

    async def _open(self, descriptor: int, name: str) -> Link:
        link = await self.state.outside.open_link(descriptor)
        if name not in SPEAKS:
            return link
        assert isinstance(link, SocketLink), "an agent that saves is a process"
        asks = bool(self.state.capabilities.get("return-path"))
        return StreamLink(link, machine=self.state.profile.machines[-3], asks=asks)

    async def _acceptor(self, arguments: dict[str, Any]) -> Callable[[], Awaitable[Link]]:
        kind, _, rest = str(arguments.get("uri", "")).partition(":")
        if kind == "unix":
            return await self.state.outside.listen_at(rest)
        if kind != "tcp":
            return self._opener(arguments)
        host, _, port = rest.rpartition(":")
        try:
            bound, first = await self.state.outside.listen(host, int(port))
        except OSError as error:
            raise Refused(f"Failed to find an available port: {error.strerror}") from error
        self._addresses = [{"type": "inet", "host": bound[0], "port": str(bound[1])}]
        return first


def _machines(names: tuple[str, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": name, "cpu-max": 288, "deprecated": False} for name in names]
    found[0].update({"alias": "q35", "is-default": True})
    return [*found, {"name": "none", "cpu-max": 1, "deprecated": False}]
