"""What can go wrong with a store; all of them are `RepositoryError`, so they share its exit code.

Rule 1: whether trying again may help is part of the class, not of the text: callers decide by it.
Rule 2: whatever concerns one object names it.
"""

from __future__ import annotations

from vmferry.errors import RepositoryError


class ObjectMissing(RepositoryError):
    """The store has no object of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the store has no object {name}", retry="no")
        self.name = name


class ObjectExists(RepositoryError):
    """The store has an object of this name already; it was left as it is."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the store has an object {name} already", retry="no")
        self.name = name


class StoreTransient(RepositoryError):
    """The store did not do it, or nobody knows whether it did; the same call again may succeed."""

    default_retry = "yes"


class StorePermanent(RepositoryError):
    """The store refuses (no room, no permission, wrong address), and will until somebody mends that."""

    may_have_happened: bool = False
    """Of a put: it was tried more than once, and a try before the one that was refused may have been carried out."""


class Damaged(RepositoryError):
    """An object of the repository is not what was written; nothing of it was handed out."""

    default_retry = "no"
    default_hint = "'verify' names everything that is damaged, and the snapshots that it belongs to"

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name} is damaged: {what}")
        self.name = name
        self.what = what


class WrongKey(RepositoryError):
    """The repository is encrypted, and the key or pass phrase does not open it; or it is not, and one was given."""


class OtherRepository(RepositoryError):
    """Where the repository was that this process has open there is another one now; nothing was written to it."""

    default_retry = "after-fix"
    default_hint = (
        "was its file system mounted, or unmounted, after the agent had started? Mount what belongs there, then "
        "restart the agent; guests go on meanwhile"
    )


class RepositoryBusy(RepositoryError):
    """Somebody else works on the repository in a way that excludes what was asked for."""

    default_retry = "yes"


class LockLost(RepositoryError):
    """This process's lock is gone: it was too slow and others took it for dead. Nothing was committed."""

    default_retry = "yes"


class PlanOutdated(RepositoryError):
    """The repository changed since the plan was made; nothing was done."""

    default_retry = "yes"
    default_hint = "make a new plan"


class UnknownSnapshot(RepositoryError):
    """The repository has no snapshot of this id."""
