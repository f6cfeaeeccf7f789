"""Objects in an object store (S3 and what speaks like it, and whatever else obstore knows).

Optional: needs `vmferry[objects]`. One request per call and no multipart uploads, so nothing is left behind by a put
that broke. Not to replace an object is asked for with `If-None-Match: *`: AWS, MinIO, Ceph and moto answer to it. A
store that ignores the header loses one thing only: that two hosts that create one repository at the same moment are
told apart. All other names are random.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    JoinError,
    NotFoundError,
    PreconditionError,
)
from obstore.store import from_url

from vmferry.limits import STORE_REQUEST_S, STORE_RETRIES_MAX, STORE_RETRY_S
from vmferry.store.backend import Entry, checked_name, checked_prefix, is_name
from vmferry.store.errors import Damaged, ObjectExists, ObjectMissing, StorePermanent, StoreTransient


class ObjectStore:
    """A `Backend` on an address such as `s3://bucket/folder`.

    `options` are obstore's for that kind of store (`endpoint`, `region`, …); keys of access come from the environment
    unless they are among them. Raises StorePermanent when the address means nothing.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, *, retries: int = STORE_RETRIES_MAX) -> None:
        self._url, self._tries_again = url, retries > 0
        try:
            self._store = from_url(
                url,
                retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=STORE_RETRY_S)},
                client_options={
                    "timeout": timedelta(seconds=STORE_REQUEST_S),
                    "allow_http": url.startswith("http:")
                    or str((options or {}).get("endpoint", "")).startswith("http:"),
                },
                **(options or {}),
            )
        except (BaseError, ValueError, TypeError) as error:
            raise StorePermanent(f"{url} is no object store: {_first_line(error)}", cause=_first_line(error)) from error

    def put(self, name: str, data: bytes) -> None:
        """See `Backend`."""
        try:
            with self._translated(name):
                obstore.put(self._store, checked_name(name), data, mode="create", use_multipart=False)
        except ObjectMissing as error:
            raise StorePermanent(f"{self._url}: there is no such place to write to", cause=error) from error
        except StorePermanent as error:
            # 1. it is done, and the answer is lost  2. obstore tries again  3. a key that has run out is refused
            error.may_have_happened = self._tries_again
            raise

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Backend`."""
        checked_name(name)
        if not length:
            size = self.size(name)
            if offset > size:
                raise Damaged(name, f"it ends at byte {size}, before {offset}")
            length = size - offset if length is None else 0
        if length == 0:  # a range of nothing is not one that HTTP can ask for
            return b""
        try:
            with self._translated(name):
                data = bytes(obstore.get_range(self._store, name, start=offset, length=length))
        except (StoreTransient, StorePermanent):  # a range that begins behind the end is an error of each store's own
            if (size := self.size(name)) < offset + length:
                raise Damaged(name, f"it ends at byte {size}, before {offset + length}") from None
            raise
        if len(data) != length:
            raise Damaged(name, f"it ends at byte {offset + len(data)}, before {offset + length}")
        return data

    def size(self, name: str) -> int:
        """See `Backend`."""
        with self._translated(name):
            return int(obstore.head(self._store, checked_name(name))["size"])

    def list(self, prefix: str) -> list[Entry]:
        """See `Backend`."""
        with self._translated(prefix or "the store"):
            found = [
                Entry(meta["path"], int(meta["size"]), meta["last_modified"].timestamp())
                for chunk in obstore.list(self._store, checked_prefix(prefix) or None)
                for meta in chunk
                if is_name(meta["path"])
            ]
        return sorted(found, key=lambda entry: entry.name)

    def delete(self, name: str) -> None:
        """See `Backend`."""
        with contextlib.suppress(ObjectMissing), self._translated(name):
            obstore.delete(self._store, checked_name(name))

    def close(self) -> None:
        """See `Backend`; connections go with the object."""

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """obstore's words -> the contract's. What it has no word for (no connection, HTTP 5xx) may pass."""
        try:
            yield
        except (NotFoundError, FileNotFoundError) as error:
            raise ObjectMissing(name) from error
        except (AlreadyExistsError, PreconditionError) as error:
            raise ObjectExists(name) from error
        except (GenericError, JoinError) as error:
            raise StoreTransient(f"{self._url}: {name}: {_first_line(error)}", cause=_first_line(error)) from error
        except (BaseError, ValueError, PermissionError) as error:
            raise StorePermanent(f"{self._url}: {name}: {_first_line(error)}", cause=_first_line(error)) from error


def _first_line(error: Exception) -> str:
    """obstore's messages end in a dump of its structures, which may hold more than a person should see."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
