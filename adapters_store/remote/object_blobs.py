"""Adapters in an object store, with the data directory's disk as a cache. Decides when bytes are durable, and when a
blob counts as missing: only when the object store says so. Knows nothing of rows or tenants.

Removing from the object store is the sweep's work alone: versions are content, so a delete may race any publish.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from uuid import uuid4

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError
from adapters_store.filesystem import Filesystem
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.remote.keys import ADAPTERS, DATA
from adapters_store.remote.remote import Remote
from adapters_store.storage.blobs import Blobs, disk_full_is_an_answer


class ObjectBlobs(Blobs):
    """Blobs in a bucket. What the folder holds of them is never the only copy."""

    is_remote = True

    def __init__(self, root: Path, files: Filesystem, remote: Remote) -> None:
        super().__init__(root, files, remote.locks, reserve_bytes=remote.cache.reserve_bytes)
        self._remote = remote
        self._once = _Once()

    def changing(self) -> AbstractContextManager[None]:
        """Publishes run beside each other: objects are created whole or not at all. Only the sweep is alone."""
        return self._locks.shared()

    def settled(self) -> AbstractContextManager[None]:
        """No lock: an object that a row names is never replaced nor removed."""
        return nullcontext()

    def has_room(self, num_bytes: int) -> bool:
        """Whether there is room, or can be made by eviction."""
        return self._remote.cache.make_room(num_bytes)

    def put_new(
        self, staged: Path, digest: AdapterDigest, *, is_whole: Callable[[], bool], is_damaged: Callable[[], bool]
    ) -> None:
        """First the object store, then the cache. An object that is there already has the same content."""
        bucket, is_bad = self._remote.bucket, is_damaged()
        if not is_bad and self.head(digest):
            bucket.remove(ADAPTERS.orphan_key(digest))
        else:
            for part, key in zip(ADAPTERS.parts, ADAPTERS.keys(digest), strict=True):
                if is_bad:
                    bucket.replace(key, staged / part)
                else:
                    bucket.put_new(key, staged / part)
        self.refresh(digest)
        self._adopt(staged, digest)

    def head(self, digest: AdapterDigest) -> bool:
        """Asks the object store, never the cache: another server may have had it removed."""
        if any(self._remote.bucket.head(key) is None for key in reversed(ADAPTERS.keys(digest))):
            self._remote.require_ours()
            return False
        return True

    def get(self, digest: AdapterDigest) -> Path:
        folder = self.folder(digest)
        if not (folder / WEIGHTS_FILE).exists():
            self._once.unless((folder / WEIGHTS_FILE).exists, digest, lambda: self._fetch(digest))
        return folder

    def folder(self, digest: AdapterDigest) -> Path:
        folder = super().folder(digest)
        self._remote.cache.touch(folder)
        return folder

    def refresh(self, digest: AdapterDigest) -> None:
        self._remote.cache.drop(super().folder(digest))

    def added(self, digest: AdapterDigest, num_bytes: int) -> None:
        self._remote.cache.added(num_bytes, super().folder(digest))

    def remove(self, digest: AdapterDigest) -> None:
        """From the cache. The object stays until a sweep has seen it without a row for the grace."""
        self.refresh(digest)

    def remove_old(
        self, digests: Iterable[AdapterDigest], is_left_over: Callable[[Path], bool]
    ) -> Sequence[AdapterDigest]:
        """None: those of the cache are evicted in time."""
        return []

    def _fetch(self, digest: AdapterDigest) -> None:
        """Raises FileNotFoundError: the object store is ours and has no such object."""
        staged = self.new_staging()
        weights_key, config_key = ADAPTERS.keys(digest)
        try:
            with disk_full_is_an_answer():
                self._files.make_folder(staged)
                self._remote.fetch(config_key, staged / CONFIG_FILE)
                self._remote.fetch(weights_key, staged / WEIGHTS_FILE)
                self._adopt(staged, digest)
        finally:
            if staged.exists():
                self._files.remove_tree(staged)

    def _adopt(self, staged: Path, digest: AdapterDigest) -> None:
        """Move a whole copy into the cache; another thread or process may have been faster."""
        folder = super().folder(digest)
        num_bytes = sum(each.stat().st_size for each in staged.iterdir())
        with disk_full_is_an_answer():
            self._files.make_folder(folder.parent)
            try:
                self._files.rename(staged, folder)
            except OSError:
                if not folder.exists():
                    raise
                return
        self._remote.cache.added(num_bytes, folder)


class ObjectData:
    """The same for training files, each one object under the sha256 of its bytes, which every fetch is checked by."""

    def __init__(self, root: Path, remote: Remote) -> None:
        self._root = root
        self._remote = remote
        self._once = _Once()
        self._damaged: set[str] = set()

    def changing(self) -> AbstractContextManager[None]:
        return self._remote.locks.shared()

    def put_new(self, source: Path, digest: str) -> None:
        """Durable when it returns; the source stays."""
        bucket, key = self._remote.bucket, DATA.keys(digest)[0]
        if digest in self._damaged:
            bucket.replace(key, source)
            self._damaged.discard(digest)
        elif bucket.head(key) is None:
            bucket.put_new(key, source)
        else:
            bucket.remove(DATA.orphan_key(digest))

    def get(self, digest: str, target: Path, digest_of: Callable[[Path], str]) -> None:
        """Bring the bytes to `target` if they are not there. Raises FileNotFoundError, StoreUnavailable, StoreError
        (blob_damaged, disk_full)."""
        if target.exists():
            self._remote.cache.touch(target)
        else:
            self._once.unless(target.exists, digest, lambda: self._fetch(digest, target, digest_of))

    def added(self, path: Path) -> None:
        self._remote.cache.added(path.stat().st_size, path)

    def _fetch(self, digest: str, target: Path, digest_of: Callable[[Path], str]) -> None:
        staged = self._root / "staging" / uuid4().hex
        try:
            with disk_full_is_an_answer():
                self._remote.fetch(DATA.keys(digest)[0], staged)
                if (found := digest_of(staged)) != digest:
                    self._damaged.add(digest)
                    raise StoreError("blob_damaged", f"the object store's bytes of {digest} have digest {found}")
                target.parent.mkdir(mode=0o700, exist_ok=True)
                staged.rename(target)
            self.added(target)
        finally:
            staged.unlink(missing_ok=True)


class _Once:
    """Of several threads that want the same thing at once, one does it and the others find it done."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: set[str] = set()

    def unless(self, is_done: Callable[[], bool], key: str, action: Callable[[], None]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: key not in self._under_way)
            self._under_way.add(key)
        try:
            if not is_done():
                action()
        finally:
            with self._changed:
                self._under_way.remove(key)
                self._changed.notify_all()
