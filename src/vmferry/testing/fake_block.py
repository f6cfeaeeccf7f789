"""The disks of a fake QEMU: what its command line has, an NBD server, mirrors of them. No byte of a disk is in it.

Theory of operation
-------------------
A dirty bitmap is a number of bytes: what the script's `wrote` says counts as written by the guest, to each disk. A
backup job sends what its bitmap has, as far as anybody can see: steps `round` of a script.

An export is a name; a node of another QEMU's export is a connection that asked for the name and was let in. A mirror
walks through QEMU's job states: running, then ready, from there (`block-job-cancel`) waiting, pending, and with
`job-finalize` concluded. Its target is such a connection or a node of this QEMU's own: a file that is there, or a
`blkdebug` that says that it is full. Steps of a script: `mirror` (the bulk) and `drain` (what is left when it shall
end); `fail` there ends the job with an error.

Rule 1: as with QEMU, a mirror that is ready and has nothing to write does not notice that its peer is gone. It does
        when it is asked to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.testing.fake_link import Link, LinkLost
from vmferry.testing.fake_state import Refused, State, StepFailed

IMAGE_BYTES = 1 << 20
"""Of an image that is not in the file system."""
CONCLUDED = ("concluded", "null")


@dataclass
class Node:
    """A block node of the command line, or one that was added."""

    name: str
    driver: str
    filename: str = ""
    below: str = ""
    read_only: bool = False
    link: Link | None = None
    is_full: bool = False
    """Whoever writes to it is told that there is no room."""
    bitmaps: dict[str, int] = field(default_factory=dict)
    """Their names, and how many bytes each has."""


class Job:
    """One mirror, or one backup of what a bitmap has."""

    kind, bulk = "mirror", "mirror"

    def __init__(self, state: State, job_id: str, target: Node, *, size_bytes: int) -> None:
        self.state, self.id, self.target, self.size_bytes = state, job_id, target, size_bytes
        self.status, self.error, self.done_bytes = "null", "", 0
        self.copy_mode = "background"
        self.is_cancelled = asyncio.Event()
        self.is_ending = asyncio.Event()
        self.may_go_on = asyncio.Event()
        """Not set while a person has paused it."""
        self.may_go_on.set()
        self.task: asyncio.Task[None] | None = None

    def be(self, status: str) -> None:
        """The new status, with its event."""
        self.status = status
        self.state.emit("JOB_STATUS_CHANGE", {"id": self.id, "status": status})

    def wire(self) -> dict[str, Any]:
        """As query-jobs has it."""
        wire: dict[str, Any] = {
            "id": self.id, "type": self.kind, "status": self.status,
            "current-progress": self.done_bytes, "total-progress": self.size_bytes,
        }  # fmt: skip
        return {**wire, "error": self.error} if self.error else wire

    async def run(self) -> None:
        """The bulk, then equal until it shall end; the end comes with `finalize` or an error."""
        self.be("running")
        try:
            await self._step(self.bulk)
            await self._until(asyncio.ensure_future(self.may_go_on.wait()))
            if self.is_cancelled.is_set():
                raise LinkLost("Operation canceled")
            self.done_bytes = self.size_bytes
            await self._stay()
            self.be("waiting")
            self.be("pending")
        except (StepFailed, LinkLost) as error:
            self.end(str(error) or "Input/output error")

    def pause(self) -> None:
        """As a person wants it. Raises Refused."""
        paused = {"running": "paused", "ready": "standby"}.get(self.status)
        if paused is None:
            why = "is paused already" if not self.may_go_on.is_set() else f"in state '{self.status}' cannot be paused"
            raise Refused(f"Job '{self.id}' {why}")
        self.may_go_on.clear()
        self.be(paused)

    def resume(self) -> None:
        """Ends a pause. Raises Refused."""
        if self.may_go_on.is_set():
            raise Refused("Can't resume a job that was not paused")
        self.may_go_on.set()
        self.be("running" if self.status == "paused" else "ready")

    async def _stay(self) -> None:
        """Equal from here on, until it shall end."""
        self.be("ready")
        await self._until(asyncio.ensure_future(self.is_ending.wait()))
        await self._step("drain")

    def end(self, error: str = "") -> None:
        """Over, with this error or none."""
        if self.status in CONCLUDED[:1]:
            return
        self.error = error
        self.is_cancelled.set()
        self.be("concluded")

    async def _step(self, name: str) -> None:
        await self.state.step(name, lost=self.is_cancelled)
        if self.is_cancelled.is_set():
            raise LinkLost("Operation canceled")
        if self.target.is_full:
            raise LinkLost("No space left on device")
        link = self.target.link
        if link is None and self.target.driver != "nbd":
            return
        if link is None or link.lost.is_set():
            raise LinkLost("Input/output error")
        link.send("flush")
        answer = asyncio.ensure_future(link.receive())
        await self._until(answer)
        if not answer.done():
            answer.cancel()
            raise LinkLost("Operation canceled")
        answer.result()

    async def _until(self, what: asyncio.Future[Any]) -> None:
        """Until that is there, or this is cancelled."""
        cancelled = asyncio.ensure_future(self.is_cancelled.wait())
        await asyncio.wait({what, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        cancelled.cancel()


class Backup(Job):
    """Ends when it is done; with `auto_finalize` by itself."""

    kind, bulk = "backup", "round"
    auto_finalize = True

    async def _stay(self) -> None:
        return

    async def run(self) -> None:
        await super().run()
        if self.status == "pending" and self.auto_finalize:
            self.end()


class Block:
    """The block layer of one fake QEMU."""

    def __init__(self, state: State, nodes: dict[str, Node], drives: tuple[tuple[str, str], ...]) -> None:
        self.state, self.nodes, self.drives = state, nodes, drives
        self.exports: dict[str, str] = {}
        self.jobs: dict[str, Job] = {}
        self._written_bytes = 0
        self._stop_serving: Callable[[], None] | None = None
        self._clients: list[Link] = []
        self._met_links: list[Link] = []
        self._max_connections = 0
        """0: no bound."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, name: str, arguments: dict[str, Any]) -> Any:
        """One command. Raises Refused; NotImplementedError for a command that is not about disks."""
        method = getattr(self, "_do_" + name.replace("-", "_"), None)
        if method is None:
            raise NotImplementedError(name)
        self._let_guest_write()
        return await method(arguments)

    def yank(self, node: str) -> None:
        """Cuts the connection of the node. Raises Refused."""
        found = self.nodes.get(node)
        if found is None or found.link is None:
            raise Refused("Instance not found", "DeviceNotFound")
        found.link.cut()
        for job in self.jobs.values():
            if job.target is found and job.status == "running":
                job.is_cancelled.set()

    # --- what is there ---

    async def _do_query_block(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [self._device(device, self.nodes.get(node)) for device, node in self.drives]

    def _device(self, device: str, node: Node | None) -> dict[str, Any]:
        found = {"device": "", "qdev": f"/machine/peripheral/{device}/virtio-backend"}
        return found if node is None else {**found, "inserted": self._inserted(node)}

    def _inserted(self, node: Node) -> dict[str, Any]:
        image = {"filename": self._file(node), "format": node.driver, "virtual-size": self._size(node)}
        inserted = {"node-name": node.name, "ro": node.read_only, "drv": node.driver, "image": image}
        return inserted | _bitmaps(node)

    async def _do_eject(self, arguments: dict[str, Any]) -> None:
        self._insert(str(arguments["id"]), "")

    async def _do_blockdev_change_medium(self, arguments: dict[str, Any]) -> None:
        name = f"#block{len(self.nodes)}"
        self.nodes[name] = Node(name, "raw", filename=str(arguments["filename"]), read_only=True)
        self._insert(str(arguments["id"]), name)

    def _insert(self, device: str, node: str) -> None:
        if device not in dict(self.drives):
            raise Refused(f"Device '{device}' not found", "DeviceNotFound")
        self.drives = tuple((each, node if each == device else had) for each, had in self.drives)

    def _file(self, node: Node) -> str:
        return self.nodes[node.below].filename if node.below in self.nodes else node.filename

    def _size(self, node: Node) -> int:
        try:
            return os.stat(self._file(node)).st_size
        except OSError:
            return IMAGE_BYTES

    async def _do_query_jobs(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [job.wire() for job in self.jobs.values()]

    async def _do_query_block_exports(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"id": n, "type": "nbd", "node-name": node, "shutting-down": False} for n, node in self.exports.items()]

    async def _do_query_named_block_nodes(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        nodes = list(self.nodes.values())
        return [{"node-name": n.name, "drv": n.driver, "ro": n.read_only, **_bitmaps(n)} for n in nodes]

    # --- bitmaps ---

    def _let_guest_write(self) -> None:
        """What the script has it write that it has not written yet."""
        more = int(self.state.script.get("wrote", 0)) - self._written_bytes
        self._written_bytes += max(0, more)
        for node in (self.nodes[name] for _, name in self.drives if more > 0 and name):
            node.bitmaps = {name: count + more for name, count in node.bitmaps.items()}

    def _node_of(self, data: dict[str, Any]) -> Node:
        node = self.nodes.get(str(data["node"]))
        if node is None:
            raise Refused(f"Cannot find device='' nor node-name='{data['node']}'")
        return node

    def _bitmap(self, data: dict[str, Any]) -> tuple[Node, str]:
        node, name = self._node_of(data), str(data["name"])
        if name not in node.bitmaps:
            raise Refused(f"Dirty bitmap '{name}' not found")
        return node, name

    async def _do_block_dirty_bitmap_add(self, data: dict[str, Any]) -> None:
        node, name = self._node_of(data), str(data["name"])
        if name in node.bitmaps:
            raise Refused(f"Bitmap already exists: {name}")
        node.bitmaps[name] = 0

    async def _do_block_dirty_bitmap_remove(self, data: dict[str, Any]) -> None:
        node, name = self._bitmap(data)
        del node.bitmaps[name]

    async def _do_block_dirty_bitmap_clear(self, data: dict[str, Any]) -> None:
        node, name = self._bitmap(data)
        node.bitmaps[name] = 0

    async def _do_block_dirty_bitmap_merge(self, data: dict[str, Any]) -> None:
        node, target = self._bitmap({"node": data["node"], "name": data["target"]})
        for each in data["bitmaps"]:
            named = {"node": data["node"], "name": each} if isinstance(each, str) else each
            where, name = self._bitmap(named)
            node.bitmaps[target] = max(node.bitmaps[target], where.bitmaps[name])

    async def _bitmaps_together(self, actions: list[dict[str, Any]]) -> None:
        """All or none."""
        before = {name: dict(node.bitmaps) for name, node in self.nodes.items()}
        try:
            for action in actions:
                await self.run(str(action["type"]), action["data"])
        except Refused:
            for name, bitmaps in before.items():
                self.nodes[name].bitmaps = bitmaps
            raise

    async def _do_transaction(self, arguments: dict[str, Any]) -> None:
        """External snapshots, or bitmaps; all or none, as QEMU does it."""
        actions = arguments["actions"]
        if all(str(action["type"]).startswith("block-dirty-bitmap-") for action in actions):
            await self._bitmaps_together(actions)
            return
        for action in actions:
            assert action["type"] == "blockdev-snapshot-sync", action
            node, file = str(action["data"]["node-name"]), str(action["data"]["snapshot-file"])
            if node not in self.nodes:
                raise Refused(f"Cannot find device='' nor node-name='{node}'")
            assert action["data"]["mode"] == "existing", "QEMU would truncate whatever is there"
            _require_file(file)
        await self.state.step("transaction")
        for data in (action["data"] for action in actions):
            name, node = str(data["snapshot-node-name"]), str(data["node-name"])
            self.nodes[name] = Node(name, "qcow2", filename=str(data["snapshot-file"]))
            self.drives = tuple((device, name if drive == node else drive) for device, drive in self.drives)

    # --- the server ---

    async def _do_nbd_server_start(self, arguments: dict[str, Any]) -> None:
        if self._stop_serving is not None:
            raise Refused("NBD server already running")
        credentials = arguments.get("tls-creds")
        if credentials is not None and credentials not in self.state.objects:
            raise Refused(f"No TLS credentials with id '{credentials}'")
        address = arguments["addr"]["data"]
        self._max_connections = int(arguments.get("max-connections", 0))
        try:
            self._stop_serving = await self.state.outside.serve(address["host"], int(address["port"]), self._met)
        except OSError as error:
            raise Refused(f"Failed to bind socket: {error.strerror}") from error

    async def _do_nbd_server_stop(self, arguments: dict[str, Any]) -> None:
        if self._stop_serving is None:
            raise Refused("NBD server not running")
        self._stop_serving()
        self._stop_serving = None
        self.exports.clear()
        for link in self._clients:
            link.close()
        self._clients.clear()

    async def _do_block_export_add(self, arguments: dict[str, Any]) -> None:
        if self._stop_serving is None:
            raise Refused("NBD server not running")
        if arguments["node-name"] not in self.nodes:
            raise Refused(f"Cannot find device='' nor node-name='{arguments['node-name']}'")
        self.exports[str(arguments["name"])] = str(arguments["node-name"])

    def _met(self, link: Link) -> None:
        self._met_links = [each for each in self._met_links if not each.lost.is_set()]
        if self._max_connections and len(self._met_links) >= self._max_connections:
            link.close()  # QEMU does not take it at all
            return
        self._met_links.append(link)
        self._keep(self._let_in(link), "fake-nbd-client")

    async def _let_in(self, link: Link) -> None:
        try:
            asked = await link.receive()
        except LinkLost:
            return
        is_there = asked.get("export") in self.exports
        link.send("export" if is_there else "none")
        if not is_there:
            return
        self._clients.append(link)
        with contextlib.suppress(LinkLost):
            while await link.receive():
                link.send("flushed")

    # --- the client ---

    async def _do_blockdev_add(self, arguments: dict[str, Any]) -> None:
        name = str(arguments["node-name"])
        if name in self.nodes:
            raise Refused(f"Duplicate nodes with node-name='{name}'")
        if arguments["driver"] == "raw":
            self.nodes[name] = Node(name, "raw", below=str(arguments["file"]), read_only=bool(arguments["read-only"]))
            return
        if arguments["driver"] != "nbd":
            self.nodes[name] = _local(arguments)
            return
        server = arguments["server"]
        link: Link | None = None
        try:
            link = await self.state.outside.connect(server["host"], int(server["port"]))
            link.send("nbd", export=arguments["export"])
            answer = await link.receive()
        except (OSError, LinkLost) as error:
            if link is not None:
                link.close()
            raise Refused("Failed to connect to the NBD server: Connection refused") from error
        if answer["kind"] != "export":
            link.close()
            raise Refused(f"Requested export not available: {arguments['export']}")
        self.nodes[name] = Node(name, "nbd", link=link)

    async def _do_blockdev_del(self, arguments: dict[str, Any]) -> None:
        name = str(arguments["node-name"])
        node = self.nodes.get(name)
        if node is None:
            raise Refused(f"Failed to find node with node-name='{name}'")
        if any(job.target is node and job.status not in CONCLUDED for job in self.jobs.values()):
            raise Refused(f"Node {name} is in use")
        if node.link is not None:
            node.link.close()
        del self.nodes[name]

    # --- jobs ---

    async def _do_blockdev_mirror(self, arguments: dict[str, Any]) -> None:
        state, job_id = self.state, str(arguments["job-id"])
        if "target-is-zero" in arguments and state.profile.version < (10, 1):
            raise Refused("Parameter 'target-is-zero' is unexpected")
        source, target = (self.nodes.get(str(arguments[key])) for key in ("device", "target"))
        if source is None or target is None:
            raise Refused(f"Cannot find device='{arguments['device']}' nor node-name='{arguments['device']}'")
        if job_id in self.jobs:
            raise Refused(f"Job ID '{job_id}' already in use")
        job = self.jobs[job_id] = Job(state, job_id, target, size_bytes=self._size(source))
        job.copy_mode = str(arguments.get("copy-mode", "background"))
        job.be("created")
        job.task = self._keep(job.run(), f"fake-{job_id}")

    async def _do_blockdev_backup(self, arguments: dict[str, Any]) -> None:
        job_id, target = str(arguments["job-id"]), self.nodes.get(str(arguments["target"]))
        node, name = self._bitmap({"node": arguments["device"], "name": arguments["bitmap"]})
        if target is None:
            raise Refused(f"Cannot find device='{arguments['target']}' nor node-name='{arguments['target']}'")
        if job_id in self.jobs:
            raise Refused(f"Job ID '{job_id}' already in use")
        job = self.jobs[job_id] = Backup(self.state, job_id, target, size_bytes=node.bitmaps[name])
        job.auto_finalize = bool(arguments.get("auto-finalize", True))
        job.be("created")
        job.task = self._keep(job.run(), f"fake-{job_id}")

    async def _do_human_monitor_command(self, arguments: dict[str, Any]) -> str:
        """qemu-io's flush only; without it a fake has no such monitor."""
        words = str(arguments["command-line"]).split()
        if (words[0], words[-1]) != ("qemu-io", "flush"):
            raise NotImplementedError(arguments["command-line"])
        return "" if words[1] in self.nodes else f"Error: Cannot find device='' nor node-name='{words[1]}'\r\n"

    def _job(self, job_id: Any) -> Job:
        found = self.jobs.get(str(job_id))
        if found is None:
            raise Refused("Job not found")
        return found

    async def _do_block_job_change(self, arguments: dict[str, Any]) -> None:
        if self.state.profile.version < (8, 2):
            raise Refused("The command block-job-change has not been found", "CommandNotFound")
        self._job(arguments["id"]).copy_mode = str(arguments["copy-mode"])

    async def _do_block_job_set_speed(self, arguments: dict[str, Any]) -> None:
        self._job(arguments["device"])

    async def _do_block_job_cancel(self, arguments: dict[str, Any]) -> None:
        """Without force: the end of a mirror that is ready; before, a cancel like any other."""
        job = self._job(arguments["device"])
        if not job.may_go_on.is_set() and not arguments.get("force"):
            raise Refused(f"The block job for device '{job.id}' is currently paused")
        if job.status == "ready" and not arguments.get("force"):
            job.is_ending.set()
        else:
            self._cancel(job)

    async def _do_job_cancel(self, arguments: dict[str, Any]) -> None:
        self._cancel(self._job(arguments["id"]))

    def _cancel(self, job: Job) -> None:
        if job.status in CONCLUDED:
            raise Refused(f"Job '{job.id}' in state '{job.status}' cannot accept command verb 'cancel'")
        job.is_cancelled.set()
        if job.status == "pending":
            job.end("Operation canceled")

    async def _do_job_pause(self, arguments: dict[str, Any]) -> None:
        self._job(arguments["id"]).pause()

    async def _do_job_resume(self, arguments: dict[str, Any]) -> None:
        self._job(arguments["id"]).resume()

    async def _do_job_finalize(self, arguments: dict[str, Any]) -> None:
        job = self._job(arguments["id"])
        if job.status != "pending":
            raise Refused(f"Job '{job.id}' in state '{job.status}' cannot accept command verb 'finalize'")
        job.end()

    async def _do_job_dismiss(self, arguments: dict[str, Any]) -> None:
        job = self._job(arguments["id"])
        if job.status != "concluded":
            raise Refused(f"Job '{job.id}' in state '{job.status}' cannot accept command verb 'dismiss'")
        del self.jobs[job.id]
        job.be("null")

    def _keep(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()


def _bitmaps(node: Node) -> dict[str, Any]:
    """As QEMU lists them; nothing where there are none."""
    common = {"recording": True, "persistent": False, "busy": False, "granularity": 65536}
    found = [{"name": name, "count": count, **common} for name, count in node.bitmaps.items()]
    return {"dirty-bitmaps": found} if found else {}


def _local(arguments: dict[str, Any]) -> Node:
    """A node that needs nobody else. Raises Refused."""
    name, driver, below = str(arguments["node-name"]), str(arguments["driver"]), arguments.get("file")
    filename = str(below["filename"]) if isinstance(below, dict) else f"{driver}://"
    if driver == "qcow2":
        _require_file(filename)
    return Node(name, driver, filename=filename, is_full="inject-error" in arguments)


def _require_file(path: str) -> None:
    if not Path(path).is_file():
        raise Refused(f"Could not open '{path}': No such file or directory")


def nodes_of(texts: list[str]) -> dict[str, Node]:
    """The nodes of `-blockdev` options in JSON."""
    found: dict[str, Node] = {}
    for text in texts:
        option = json.loads(text)
        name = str(option["node-name"])
        found[name] = Node(
            name,
            str(option["driver"]),
            filename=str(option.get("filename", f"{option['driver']}://")),
            below=str(option.get("file", "")),
            read_only=bool(option.get("read-only")),
        )
    return found
