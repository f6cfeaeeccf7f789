"""Overlays of a restore: images that take what the guest writes, so that the stored ones stay as they are.

They are made as every image of a job is (`images`): under a name of the job's, then journalled by device and inode,
then given their own names, so that UNDO knows what it may take away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from vmferry.agent.images import Identity, temporary, tool_of
from vmferry.agent.restore_definition import Overlay
from vmferry.errors import Unfit
from vmferry.limits import IMAGE_TOOL_S


async def make_overlay(overlay: Overlay, *, job: str, qemu: str) -> Identity:
    """Makes it under its temporary name; `images.publish` gives it its own. Raises Unfit; nothing is left then."""
    program = tool_of(qemu)
    if program is None:
        raise Unfit("there is no qemu-img to make an overlay with", hint="install qemu-utils")
    name = temporary(overlay.path, job)
    try:
        Path(overlay.path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made empty first: qemu-img writes over what is there, and this fails where something is.
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise Unfit(f"the overlay {overlay.path} cannot be made: {error.strerror}", cause=error) from error
    try:
        await _create(program, overlay, name)
        found = os.stat(name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return found.st_dev, found.st_ino


async def _create(program: str, overlay: Overlay, name: str) -> None:
    process = await asyncio.create_subprocess_exec(
        program, "create", "-q", "-f", "qcow2", "-b", overlay.backing, "-F", overlay.backing_format, "--", name,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(IMAGE_TOOL_S):
            _, complaints = await process.communicate()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise Unfit(f"qemu-img did not make {overlay.path} within {IMAGE_TOOL_S:g} s") from error
        raise
    if process.returncode != 0:
        words = " ".join(complaints.decode(errors="replace").split())
        raise Unfit(f"qemu-img cannot make {overlay.path}: {words}")
