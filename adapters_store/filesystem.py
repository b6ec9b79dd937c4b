"""The file operations that must survive a crash, each one a point where a machine may stop. Knows no policy.

Handed in, so that a test can stop at any of them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_READ_ONLY = (errno.EROFS, errno.EACCES)
Data = bytes | memoryview | Iterable[memoryview]  # at once, or piece by piece


class Filesystem:
    """Real files. Every method raises OSError as the system does."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def copy(self, source: Path, target: Path) -> None:
        shutil.copyfile(source, target)

    def write(self, target: Path, data: Data) -> None:
        with target.open("wb") as stream:
            stream.writelines((data,) if isinstance(data, bytes | memoryview) else data)

    def write_atomic(self, target: Path, data: Data, *, durable: bool = True) -> None:
        """A reader finds the old file or the new one, whole. durable: also after a power cut."""
        aside = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            self.write(aside, data)
            if durable:
                self.sync_file(aside)
            self.rename(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        if durable:
            self.sync_folder(target.parent)

    @contextmanager
    def new_folder(self, target: Path) -> Iterator[Path]:
        """A folder beside `target`, to be filled in the block; then synced and renamed to it: whole or not there."""
        aside = target.with_name(f".{target.name}.aside")
        self.remove_tree(aside)
        self.make_folder(aside)
        try:
            yield aside
            for path in aside.iterdir():
                self.sync_file(path)
            self.sync_folder(aside)
            self.rename(aside, target)
        finally:
            self.remove_tree(aside)
        self.sync_folder(target.parent)

    def sync_file(self, path: Path) -> None:
        _sync(path)

    def sync_folder(self, path: Path) -> None:
        _sync(path)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        """A folder with all in it, or a file; absent is no error."""
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def free_disk_bytes(path: Path) -> int:
    """Of the file system that holds `path`."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def file_sha256(path: Path) -> str:
    """The hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def file_lock(path: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold a lock between processes and threads (flock on a file of its own); waits for it."""
    with _lock_file(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


@contextmanager
def tried_file_lock(path: Path) -> Iterator[bool]:
    """Hold the same lock alone if it is free; gives the block whether it is held."""
    with _lock_file(path) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a lock needs no write access
    try:
        yield fd
    finally:
        os.close(fd)  # closing gives the lock back
