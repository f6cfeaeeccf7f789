"""A guest with a disk of which nobody can say whether it is what it was: restored only when a person says so."""

from __future__ import annotations

import pytest

from vmferry.agent.restores import RestoreArguments, Restores, restore
from vmferry.errors import PlanRefused, UsageError
from vmferry.store.reader import SnapshotReader
from vmferry.testing.fake_site import MakeSite

DEVICE = '[[disk]]\npath = "/dev/null"\nreadonly = true\n'


async def test_a_guest_with_a_device_is_restored_when_a_person_accepts_it(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site()
    agent = site.agents["a"]
    await site.run_vm("h", more=DEVICE)
    await site.command("a", "vm-save", vm="h", name="one")
    job = agent.saves.active("h")
    assert job is not None
    await job.ended.wait()
    repository = agent.snapshot_store.open_repository()
    with SnapshotReader(repository, job.snapshot) as reader:
        assert [disk["path"] for disk in reader.head.disks] == ["/dev/null"]
    begun: list[str] = []
    monkeypatch.setattr(Restores, "begin", lambda self, attempt: begun.append(attempt.vm))
    with pytest.raises(UsageError, match="there are same-address and unchecked-disk"):
        await restore(agent, RestoreArguments(name="one", rename="h2", accept=["base-image"]))
    for accept in ([], ["same-address"]):
        with pytest.raises(PlanRefused, match=r"/dev/null is a device, and nobody can say .* --accept unchecked-disk"):
            await restore(agent, RestoreArguments(name="one", rename="h2", accept=accept))
    assert begun == []
    wire = await restore(agent, RestoreArguments(name="one", rename="h2", accept=["unchecked-disk"]))
    assert begun == ["h2"]
    assert any("/dev/null is a device" in note for note in wire["notes"])
