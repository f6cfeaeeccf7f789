"""What every fence keeps to: `check_fence` proves it of an implementation, in a world that the caller can change.

A world is the other side as the fence can see it: nobody is known to have the guest (`free`), somebody over there runs
it (`runs`), or it cannot be asked (`silent`). `tries_to_start` is the late destination: True if it gets the guest.
"""

from __future__ import annotations

from typing import Protocol

from vmferry.agent.fences import Fence, Verdict


class FenceWorld(Protocol):
    """The other side of one guest."""

    def free(self) -> None: ...

    def runs(self) -> None: ...

    def silent(self) -> None: ...

    async def tries_to_start(self) -> bool:
        """Whether a destination that was told to start long ago could start now."""

    def fence(self) -> Fence:
        """The fence under test, new."""


async def check_fence(world: FenceWorld) -> None:
    """Raises AssertionError naming what the implementation does not keep."""
    world.runs()
    fence = world.fence()
    assert (await fence.ask()).verdict is not Verdict.FENCED, "a guest that runs there is not fenced"
    fence.release()

    world.silent()
    fence = world.fence()
    found = await fence.ask()
    assert found.verdict is Verdict.UNKNOWN, f"what cannot be asked is unknown, not {found.verdict}"
    assert found.text, "a verdict has its reason"
    fence.release()

    world.free()
    fence = world.fence()
    for _ in range(2):  # asked again it says the same
        assert (await fence.ask()).verdict is Verdict.FENCED, "nobody has it"
        assert not await world.tries_to_start(), "who is fenced cannot start"
    fence.release()
    fence.release()  # a second time changes nothing
