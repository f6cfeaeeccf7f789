"""What a restore asks of other hosts: whom it means, who does not answer, and who answers nonsense."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmferry import limits
from vmferry.agent.restore_definition import GuestIdentity, clashes
from vmferry.agent.restores import RestoreArguments, Restores, find, identities, local_identities, restore
from vmferry.errors import Busy, RepositoryError, UsageError, VmferryError
from vmferry.store.memory import MemoryStore
from vmferry.store.repository import Repository

FOUND = SimpleNamespace(snapshot="5" * 32, repository="a" * 32)


class Peer:
    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def call(self, command: str, arguments: dict[str, Any], **more: Any) -> Any:
        self.asked.append((command, arguments))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def agent_with(**peers: Peer) -> Any:
    async def with_repository(work: Any) -> Any:
        return FOUND

    return SimpleNamespace(
        config=SimpleNamespace(name="host-a", state_dir=Path("/nowhere")),
        peers=SimpleNamespace(links=peers, link=peers.__getitem__),
        snapshot_store=SimpleNamespace(with_repository=with_repository),
        vms={},
        restores=SimpleNamespace(at_work=list, status=lambda job: None, promises=lambda but="": []),
    )


async def test_a_name_is_looked_up_where_the_person_is() -> None:
    """The other host may have another guest under that name."""
    peer = Peer({"over": False})
    await restore(agent_with(b=peer), RestoreArguments(name="base", host="b", job="1f" * 16))
    ((command, sent),) = peer.asked
    assert command == "peer-forward"
    assert sent["command"] == "vm-restore"
    wish = sent["arguments"]
    assert (wish["name"], wish["repository"], wish["host"]) == (FOUND.snapshot, FOUND.repository, "")


def test_another_repository_is_refused() -> None:
    repository = Repository.create(MemoryStore())
    with pytest.raises(RepositoryError, match="not the one that has the snapshot") as caught:
        find(repository, "base", meant="b" * 32)
    assert "--spec FILE" in caught.value.hint, "what is imported there does not say what its guest is made of"
    with pytest.raises(RepositoryError, match="base"):
        find(repository, "base", meant=repository.config.repository)


@pytest.mark.parametrize("job", ["restore-1", "../" * 10, "1f" * 15, "1F" * 16])
async def test_an_id_that_names_files_is_checked(job: str) -> None:
    with pytest.raises(UsageError, match="32 hexadecimal digits"):
        await restore(agent_with(), RestoreArguments(name="base", job=job))


@pytest.mark.parametrize(
    "answer",
    [VmferryError("no answer"), {}, {"identities": 7}, {"identities": [7]}, {"identities": [{"vm": "x"}]},
     {"identities": [{"vm": "x", "host": "b", "quiet_macs": "y"}]}],
)  # fmt: skip
async def test_a_host_that_was_not_asked_is_named(answer: Any) -> None:
    good = Peer({"identities": [{"vm": "g", "host": "c", "loud_macs": ["52:54:00:00:00:01"], "of_later": 1}]})
    found, notes = await identities(agent_with(b=Peer(answer), c=good))
    assert found == [GuestIdentity("g", "c", loud_macs=("52:54:00:00:00:01",))]
    (note,) = notes
    assert note.startswith("b was not asked")


MINE, OTHERS = (GuestIdentity(f"web{n}", "host-a", loud_macs=("52:54:00:00:00:02",)) for n in (1, 2))


async def test_two_restores_at_once_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on two hosts: what is promised is what another host hears."""
    agent = agent_with()
    held = agent.restores = Restores(agent)
    with held.promised("1f" * 16, MINE):
        assert await identities(agent, but="1f" * 16) == ([], ())
        with held.promised("2f" * 16, OTHERS):
            assert local_identities(agent) == [MINE, OTHERS]
            found, _ = await identities(agent, but="2f" * 16)
            assert found == [MINE]
            refused, _ = clashes(OTHERS, found)
            assert "same address" in refused[0]
        monkeypatch.setattr(limits, "RESTORES_MAX", 1)
        with pytest.raises(Busy), held.promised("2f" * 16, OTHERS):
            pass
    assert local_identities(agent) == []
    with held.promised("2f" * 16, OTHERS):
        pass
