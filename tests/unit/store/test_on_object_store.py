"""The whole way over HTTP: save, save the changes, restore, forget, prune, verify in an object store."""

from __future__ import annotations

from tests.unit.store.conftest import SMALL, ManualClock, Store, memory, touched
from tests.unit.store.test_backends import bucket, s3
from vmferry.store.config import PassPhrase
from vmferry.store.objects import ObjectStore
from vmferry.store.prune import execute, plan_prune
from vmferry.store.repository import Repository
from vmferry.store.verify import verify

__all__ = ["bucket", "s3"]


def test_the_whole_way(bucket: ObjectStore) -> None:
    repository = Repository.create(bucket, key=PassPhrase("x"), shape=SMALL)
    store = Store(bucket, ManualClock(), repository)
    first = store.save(memory(200))
    second = store.later(first, touched(memory(200), 30))
    store.check()
    repository.forget(first)
    del store.saved[first]
    execute(repository, plan_prune(repository, grace_s=-10, empty_below=1.0))
    store.check(second)
    assert verify(repository).problems == ()
    assert store.names("locks/") == []
    repository.forget(second)
    execute(repository, plan_prune(repository, grace_s=-10))
    assert store.names("") == ["config"]
