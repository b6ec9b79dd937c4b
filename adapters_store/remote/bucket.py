"""One prefix of an object store (S3, GCS, Azure, or a folder that servers share), by URL, through obstore.

Knows keys and bytes; knows no adapter. "Absent" is said only of an object in a bucket that still is ours: a bucket that
is gone, or a wrong address, answers 404 for every key.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.remote.keys import ADAPTERS, DATA
from adapters_store.storage.store_id import FILE_NAME, Mark

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "file")
_RETRY_S = 1.0
_CHUNK_BYTES = 4 << 20
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """modified_s: Unix seconds by the object store's own clock."""

    key: str
    num_bytes: int
    modified_s: float


def _opened(url: str) -> ObjectStore:
    """obstore's client of a URL; credentials and endpoint come from the environment, as its documentation says."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise StoreError("bad_blob_url", f"blob URL: must begin with one of {known}, got {url[:80]!r}")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ModuleNotFoundError:
        raise StoreError("blobs_unsupported", "a blob URL needs obstore: pip install 'multilora[s3]'") from None
    try:
        if scheme == "file":
            return from_url(url, mkdir=True)
        return from_url(url, **_limits_of_waiting())
    except (BaseError, ValueError) as error:
        raise StoreError("bad_blob_url", f"blob URL {url[:80]!r}: {_first_line(error)}") from error


def _limits_of_waiting() -> dict[str, Any]:
    """An object store that hangs must not hold a thread for minutes. Plain HTTP only where the endpoint says so."""
    allow_http = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    return {
        "client_options": {
            "connect_timeout": "2s",
            "read_timeout": "20s",
            "timeout": "15m",
            "allow_http": allow_http,
        },
        "retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=10)},
    }


class Bucket:
    """Safe from many threads. `store` is obstore's; keys are relative to its prefix.

    After a call that failed because the object store was away, further calls fail at once for a second, so that no
    thread waits for it again and again. Methods raise StoreUnavailable (blobs_unavailable).
    """

    def __init__(self, store: ObjectStore) -> None:
        import obstore  # an extra that only an object store needs
        import obstore.exceptions

        self._api = obstore
        self._store = store
        self._away_until_s = float("-inf")
        self._lock = threading.Lock()

    @classmethod
    def at(cls, url: str) -> Bucket:
        """Raises StoreError (bad_blob_url, blobs_unsupported)."""
        return cls(_opened(url))

    def put_new(self, key: str, source: Path | bytes) -> bool:
        """Create the object, whole or not at all; False if there is one already, which stays as it is."""
        with self._asking("put"):
            try:
                self._api.put(self._store, key, source, mode="create")
            except self._api.exceptions.AlreadyExistsError:
                return False
        return True

    def replace(self, key: str, source: Path | bytes) -> None:
        """Write the object, also over one that exists."""
        with self._asking("put"):
            self._api.put(self._store, key, source)

    def get(self, key: str, target: Path, admit: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Write the object's bytes into a new file. admit: is called with their number before the first is written.

        Raises FileNotFoundError: see `require_ours`; OSError, and what `admit` raises.
        """
        with target.open("xb") as stream:
            with self._asking("get"):
                found = self._api.get(self._store, key)
            admit(found.meta["size"])
            try:
                for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
                    stream.write(chunk)
            except self._api.exceptions.BaseError as error:  # a body that breaks off says nothing of other objects
                raise _logged("get", error) from error

    def read(self, key: str) -> bytes | None:
        """A small object's bytes; None if it is absent."""
        with self._asking("get"):
            try:
                return bytes(self._api.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def head(self, key: str) -> ObjectInfo | None:
        with self._asking("head"):
            try:
                meta = self._api.head(self._store, key)
            except FileNotFoundError:
                return None
        return ObjectInfo(key, meta["size"], meta["last_modified"].timestamp())

    def remove(self, key: str) -> None:
        """Absent objects are no error."""
        with self._asking("delete"):
            try:
                self._api.delete(self._store, key)
            except FileNotFoundError:
                return

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object under the folder `prefix`."""
        with self._asking("list"):
            for some in self._api.list(self._store, prefix, chunk_size=1000):
                for meta in some:
                    yield ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def store_id(self) -> str | None:
        """The id of the store whose blobs these are; None for a bucket that has none yet. Raises StoreError
        (wrong_store) for a store.json that is not of our form."""
        mark = self.mark()
        return None if mark is None else mark.store_id

    def mark(self) -> Mark | None:
        text = self.read(FILE_NAME)
        return None if text is None else Mark.parse(text, "the object store")

    def claim(self, mark: Mark) -> None:
        """Make the bucket this store's. Raises StoreError (wrong_store): another one was faster."""
        if self.store_id() is None:
            self.put_new(FILE_NAME, replace(mark, is_joined=True).to_json())
        if self.store_id() != mark.store_id:
            raise StoreError("wrong_store", "the object store belongs to another database")

    def replace_id(self, mark: Mark) -> None:
        """Make the bucket this store's, also if it was another's. What is there now is never removed (`adopted_at`)."""
        self.replace(FILE_NAME, replace(mark, is_joined=True).to_json())

    def holds_blobs(self) -> bool:
        """If there is any adapter or training file."""
        return any(True for folder in (ADAPTERS.folder, DATA.folder) for _ in self.list(folder))

    def require_ours(self, store_id: str) -> None:
        """Before an absent object is believed to be missing, and before anything is removed.

        Raises StoreUnavailable (blobs_unavailable): the bucket is gone or is another one.
        """
        if self.store_id() != store_id:
            raise StoreUnavailable(
                "blobs_unavailable", "the object store does not hold this store's blobs", is_away=False
            )

    def require_create_only(self) -> None:
        """Try whether a second create of one key is refused. Raises StoreError (blobs_unsupported)."""
        key = f"probe/{uuid4().hex}"
        try:
            first, second = self.put_new(key, b"1"), self.put_new(key, b"2")
        finally:
            self.remove(key)
        if not first or second:
            message = "the object store ignores create-only writes (If-None-Match: *), so two servers could overwrite"
            raise StoreError("blobs_unsupported", f"{message} each other's adapters; use one that honours them")

    def forget_absence(self) -> None:
        """Ask again, however lately a call failed."""
        self._away_until_s = float("-inf")

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        start_s = time.monotonic()
        if start_s < self._away_until_s:
            raise _unavailable()
        try:
            yield
        except self._api.exceptions.BaseError as error:
            now_s = time.monotonic()
            with self._lock:
                self._away_until_s = now_s + max(_RETRY_S, now_s - start_s)
            raise _logged(what, error) from error


def _logged(what: str, error: Exception) -> StoreUnavailable:
    _log.warning("object store: %s failed: %s", what, _first_line(error))
    return _unavailable()


def _unavailable() -> StoreUnavailable:
    return StoreUnavailable("blobs_unavailable", "the object store does not answer; try again later", is_away=False)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
