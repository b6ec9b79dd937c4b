"""The content-addressed folder of adapter files. Decides when bytes are durable; knows nothing of rows or tenants.

blobs/ab/abcdef.../adapter_config.json and adapter_model.safetensors, as uploaded, under the digest's hex. A blob is
made in staging/ on the same file system, synced, renamed into place, and its parent synced: it is there whole or not.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import uuid4

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError
from adapters_store.filesystem import Filesystem, free_disk_bytes
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.storage.locks import Locks

RESERVE_BYTES = 64 * 1024 * 1024
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Blobs:
    """The files of every digest, in a folder of the data directory. `ObjectBlobs` makes it a cache of an object store.

    root: made if missing. files: the operations, replaceable in tests. reserve_bytes: what uploads leave free. The
    database needs room even to delete: on a disk that was full to the last byte, nothing could be deleted (tried).
    """

    is_remote = False

    def __init__(self, root: Path, files: Filesystem, locks: Locks, *, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._files = files
        self._root = root
        self._reserve_bytes = reserve_bytes
        self._blobs = root / "blobs"
        self._staging = root / "staging"
        self._locks = locks
        for folder in (root, self._blobs, self._staging):
            files.make_folder(folder)

    def folder(self, digest: AdapterDigest) -> Path:
        """The local folder of its files, which may be absent."""
        name = digest.removeprefix("sha256:")
        return self._blobs / name[:2] / name

    def get(self, digest: AdapterDigest) -> Path:
        """The same, its files brought there if they must be. Raises StoreUnavailable, StoreError (disk_full),
        FileNotFoundError: the durable copy is missing."""
        return self.folder(digest)

    def head(self, digest: AdapterDigest) -> bool:
        """Whether the durable copy is there, by its names alone. Raises StoreUnavailable."""
        return all((self.folder(digest) / name).exists() for name in (WEIGHTS_FILE, CONFIG_FILE))

    def refresh(self, digest: AdapterDigest) -> None:
        """Distrust the local copy, unless it is the only one."""

    def added(self, digest: AdapterDigest, num_bytes: int) -> None:
        """The packed form was written beside the files."""

    def changing(self) -> AbstractContextManager[None]:
        """Hold while a blob and its row are written, or while a blob without a row is removed."""
        return self._locks.exclusive()

    def settled(self) -> AbstractContextManager[None]:
        """Hold to see blobs and rows between two changes."""
        return self._locks.shared()

    def new_staging(self) -> Path:
        """The path of a folder that does not exist yet, on the file system of the blobs."""
        return self._staging / uuid4().hex

    def has_room(self, num_bytes: int) -> bool:
        """Whether the reserve stays free when `num_bytes` more are written."""
        return free_disk_bytes(self._root) >= num_bytes + self._reserve_bytes

    def require_room(self, num_bytes: int) -> None:
        """Raises StoreError (disk_full)."""
        if not self.has_room(num_bytes):
            message = f"no room for {num_bytes} bytes: {self._reserve_bytes} must stay free; nothing was stored"
            raise StoreError("disk_full", message)

    @contextmanager
    def stage(self, config: bytes, weights: Path, *, moves: bool = False) -> Iterator[Path]:
        """A private copy of an upload, to be checked and then put. Gone at the end of the block unless it was put.

        moves: take the weights themselves, if they are on the same file system.
        """
        staged = self.new_staging()
        moves = moves and weights.stat().st_dev == self._staging.stat().st_dev
        num_bytes = len(config) + (0 if moves else weights.stat().st_size)
        self.require_room(num_bytes)
        try:
            with disk_full_is_an_answer():
                self._files.make_folder(staged)
                self._files.write(staged / CONFIG_FILE, config)
                if moves:
                    self._files.rename(weights, staged / WEIGHTS_FILE)
                else:
                    self._files.copy(weights, staged / WEIGHTS_FILE)
            yield staged
        finally:
            if staged.exists():
                self._files.remove_tree(staged)

    def put_new(
        self, staged: Path, digest: AdapterDigest, *, is_whole: Callable[[], bool], is_damaged: Callable[[], bool]
    ) -> None:
        """Make a staged copy durable under its digest, unless it is; replace a damaged one.

        is_whole: reads the local copy and compares it with the digest. is_damaged: a load has found it so.
        """
        if is_whole():
            return
        target = self.folder(digest)
        with disk_full_is_an_answer():
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                self._files.sync_file(staged / name)
            self._files.sync_folder(staged)
            self._files.make_folder(target.parent)
            self._files.sync_folder(self._blobs)  # even if the folder existed: its maker may have been killed
            self.remove(digest)
            self._files.rename(staged, target)
            self._files.sync_folder(target.parent)

    def remove(self, digest: AdapterDigest) -> None:
        """No row names it any more. It is renamed first, so that no half of it is ever found under its digest."""
        target = self.folder(digest)
        if target.exists():
            trash = self.new_staging()
            with disk_full_is_an_answer():
                self._files.rename(target, trash)
            self._files.remove_tree(trash)

    def list(self) -> Iterator[AdapterDigest]:
        """Every digest with local files."""
        for folder in self.folders():
            yield AdapterDigest(f"sha256:{folder.name}")

    def folders(self) -> Iterator[Path]:
        """Of every digest with local files."""
        return self._blobs.glob("??/*")

    def remove_old(
        self, digests: Iterable[AdapterDigest], is_left_over: Callable[[Path], bool]
    ) -> Sequence[AdapterDigest]:
        """Remove those of `digests` whose blob is a left-over; returns them."""
        old = [digest for digest in digests if is_left_over(self.folder(digest))]
        for digest in old:
            self.remove(digest)
        return old

    def remove_old_staging(self, is_left_over: Callable[[Path], bool]) -> int:
        """Remove what killed processes left; returns how many."""
        old = [folder for folder in self._staging.iterdir() if is_left_over(folder)]
        for folder in old:
            self._files.remove_tree(folder)
        return len(old)


@contextmanager
def disk_full_is_an_answer() -> Iterator[None]:
    """Turn errors of the disk into StoreError (disk_full, read_only); every other OSError passes."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise StoreError("disk_full", "the data directory's disk is full; nothing was stored") from error
        if error.errno in _READ_ONLY:
            raise StoreError("read_only", "the data directory cannot be written; nothing was stored") from error
        raise
