"""Adapters in an object store, with the data directory's disk as a cache. Decides when bytes are durable, and when a
blob counts as missing: only when the object store says so. Knows nothing of rows or tenants.

Removing from the object store is the sweep's work alone: versions are content, so a delete may race any publish.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import uuid4

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError
from adapters_store.filesystem import Filesystem
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.remote.keys import ADAPTERS, DATA
from adapters_store.remote.remote import Remote
from adapters_store.storage.blobs import FolderBlobs, disk_full_is_an_answer


class ObjectBlobs:
    """`Blobs` over a bucket. local: the cache's folder; what it holds is never the only copy."""

    is_remote = True

    def __init__(self, local: FolderBlobs, remote: Remote, files: Filesystem) -> None:
        self._local = local
        self._remote = remote
        self._files = files
        self._once = _Once()

    def changing(self) -> AbstractContextManager[None]:
        """Publishes run beside each other: objects are created whole or not at all. Only the sweep is alone."""
        return self._remote.locks.shared()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """No lock: an object that a row names is never replaced nor removed."""
        yield

    def has_room(self, num_bytes: int) -> bool:
        """If there is room, or can be made by eviction."""
        if not self._local.has_room(num_bytes):
            self._remote.cache.make_room(num_bytes)
        return self._local.has_room(num_bytes)

    def stage(self, config: bytes, weights: Path, *, moves: bool = False) -> AbstractContextManager[Path]:
        self.has_room(len(config) + weights.stat().st_size)
        return self._local.stage(config, weights, moves=moves)

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
        folder = self._local.folder(digest)
        self._remote.cache.touch(folder)
        return folder

    def refresh(self, digest: AdapterDigest) -> None:
        self._remote.cache.drop(self._local.folder(digest))

    def added(self, digest: AdapterDigest, num_bytes: int) -> None:
        self._remote.cache.added(num_bytes, self._local.folder(digest))

    def remove(self, digest: AdapterDigest) -> None:
        """From the cache. The object stays until a sweep has seen it without a row for the grace."""
        self.refresh(digest)

    def list(self) -> Iterator[AdapterDigest]:
        return self._local.list()

    def remove_old(
        self, digests: Iterable[AdapterDigest], is_left_over: Callable[[Path], bool]
    ) -> Sequence[AdapterDigest]:
        """Those of the cache are evicted in time; they are no one's only copy."""
        return []

    def remove_old_staging(self, is_left_over: Callable[[Path], bool]) -> int:
        return self._local.remove_old_staging(is_left_over)

    def _fetch(self, digest: AdapterDigest) -> None:
        """Raises FileNotFoundError: the object store is ours and has no such object."""
        staged = self._local.new_staging()
        weights_key, config_key = ADAPTERS.keys(digest)
        try:
            with disk_full_is_an_answer():
                self._files.make_folder(staged)
                found = self._remote.bucket.head(weights_key)
                if found is not None and not self.has_room(found.num_bytes):
                    raise StoreError("disk_full", f"no room for the {found.num_bytes} bytes of adapter {digest}")
                self._remote.fetch(config_key, staged / CONFIG_FILE)
                self._remote.fetch(weights_key, staged / WEIGHTS_FILE)
                self._adopt(staged, digest)
        finally:
            if staged.exists():
                self._files.remove_tree(staged)

    def _adopt(self, staged: Path, digest: AdapterDigest) -> None:
        """Move a whole copy into the cache; another thread or process may have been faster."""
        folder = self._local.folder(digest)
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
        self._locks = [threading.Lock() for _ in range(64)]

    def unless(self, is_done: Callable[[], bool], key: str, action: Callable[[], None]) -> None:
        with self._locks[hash(key) % len(self._locks)]:
            if not is_done():
                action()
