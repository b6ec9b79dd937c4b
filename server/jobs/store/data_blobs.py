"""The content-addressed folder of uploaded data. Decides when bytes are durable; knows nothing of rows or tenants.

files/ab/abcdef...: one file under its sha256, made in files/staging/ on the same file system, synced, renamed into
place, and its parent synced: a blob is whole or absent. The file operations are handed in, as in the adapter store.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from uuid import uuid4

from adapters_store.errors import StoreError
from adapters_store.filesystem import Filesystem, file_sha256
from adapters_store.remote.object_blobs import ObjectData
from adapters_store.storage.blobs import disk_full_is_an_answer
from adapters_store.storage.locks import Locks


class DataBlobs:
    """root: a folder of the data directory; made if missing. files: the operations, replaceable in tests. locks: of
    this folder. objects: the object store that holds the bytes; the folder is then its cache."""

    def __init__(self, root: Path, files: Filesystem, locks: Locks, objects: ObjectData | None = None) -> None:
        self._locks = locks
        self._objects = objects
        self._files = files
        self._root = root
        self._staging = root / "staging"
        files.make_folder(self._staging)

    def path(self, digest: str) -> Path:
        """The path of this digest's bytes, which may be absent."""
        name = digest.removeprefix("sha256:")
        return self._root / name[:2] / name

    def changing(self) -> AbstractContextManager[None]:
        """Hold while a blob is put in place and its row written, while it is linked, or while orphans are removed."""
        return self._locks.exclusive() if self._objects is None else self._objects.changing()

    def keep(self, staged: Path, digest: str) -> None:
        """In an object store first, and before any row is locked. Raises StoreUnavailable (blobs_unavailable)."""
        if self._objects is not None:
            self._objects.put_new(staged, digest)

    def get(self, digest: str) -> Path:
        """The path of its bytes, brought here if they must be. Raises FileNotFoundError: they are missing;
        StoreUnavailable, StoreError (blob_damaged, disk_full)."""
        path = self.path(digest)
        if self._objects is not None:
            self._objects.get(digest, path, digest_of)
        elif not path.is_file():
            raise FileNotFoundError(path)
        return path

    def whole(self, digest: str) -> Path:
        """The same, read and compared with the digest. A damaged copy in a cache is fetched again; without an object
        store it is StoreError (blob_damaged)."""
        path = self.get(digest)
        if self.is_damaged(digest):
            if self._objects is None:
                raise StoreError("blob_damaged", f"the bytes of {digest} have another digest")
            path.unlink(missing_ok=True)
        return self.get(digest)

    def is_damaged(self, digest: str) -> bool:
        """If the bytes are here and are others."""
        try:
            return digest_of(self.path(digest)) != digest
        except FileNotFoundError:
            return False

    def stage(self, source: Path) -> tuple[Path, str]:
        """A private, synced copy of `source` and its digest; to be `put` or `discard`ed. StoreError: disk_full."""
        staged = self._staging / uuid4().hex
        try:
            with disk_full_is_an_answer():
                self._files.copy(source, staged)
                self._files.sync_file(staged)
        except BaseException:
            self.discard(staged)
            raise
        return staged, digest_of(staged)

    def put(self, staged: Path, digest: str, *, heals: bool = False) -> None:
        """Make a staged copy durable under its digest; an existing blob stays as it is, unless the copy heals it."""
        target = self.path(digest)
        if target.exists() and not heals:
            self.discard(staged)
            return
        with disk_full_is_an_answer():
            self._files.make_folder(target.parent)
            self._files.sync_folder(self._root)
            self._files.rename(staged, target)
            self._files.sync_folder(target.parent)
        if self._objects is not None:
            self._objects.added(target)

    def discard(self, staged: Path) -> None:
        staged.unlink(missing_ok=True)

    def remove(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)

    def link(self, digest: str, target: Path) -> None:
        """Give the bytes a second name that outlives the first. Raises FileNotFoundError if the blob is gone."""
        target.unlink(missing_ok=True)
        try:
            self._link(digest, target)
        except FileNotFoundError:
            if self._objects is None:
                raise
            self._link(digest, target)  # it was evicted in between

    def _link(self, digest: str, target: Path) -> None:
        try:
            os.link(self.get(digest), target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._files.copy(self.path(digest), target)  # `runs` is a file system of its own, which hosts share
            self._files.sync_file(target)

    def list(self) -> Iterator[str]:
        """Every blob present."""
        for file in self._root.glob("??/*"):
            yield f"sha256:{file.name}"

    def remove_old_staging(self, is_left_over: Callable[[Path], bool]) -> int:
        """Remove what killed uploads left; returns how many."""
        count = 0
        for staged in self._staging.iterdir():
            if is_left_over(staged):
                staged.unlink(missing_ok=True)  # its owner may be faster
                count += 1
        return count


def digest_of(path: Path) -> str:
    """Of a file's bytes."""
    return f"sha256:{file_sha256(path)}"
