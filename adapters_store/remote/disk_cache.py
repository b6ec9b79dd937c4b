"""The local disk as a cache of blobs and training files: bounded in bytes, the least recently used goes first.

An entry is a folder blobs/ab/HEX (with the packed form) or a file files/ab/HEX; its modification time is its last use.
Several processes may share one: each counts what it adds, and looks at the disk again after an eighth of the budget.
Entries also go before the disk's last reserve_bytes are used: the data directory's database needs them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from adapters_store.filesystem import Filesystem, free_disk_bytes

_FOLDERS = ("blobs", "files")
_LOOK_AFTER = 8  # parts of the budget


class _Entry(NamedTuple):
    used_ns: int
    num_bytes: int
    path: Path


class DiskCache:
    """root: the data directory. Safe from many threads."""

    def __init__(self, root: Path, max_bytes: int, reserve_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self.reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._added = max_bytes  # so the first addition looks at the disk

    def touch(self, path: Path) -> None:
        """Note a use."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return

    def added(self, num_bytes: int, keep: Path) -> None:
        """Count bytes that were written; evict others than `keep` if the budget is exceeded."""
        with self._lock:
            self._added += num_bytes
            if self._added < self._max_bytes / _LOOK_AFTER:
                return
            self._added = 0
            self._evict_to(self._max_bytes, keep)

    def make_room(self, num_bytes: int) -> bool:
        """Whether the reserve stays free when num_bytes more are written; evicts entries until it does."""
        with self._lock:
            while (missing := num_bytes + self.reserve_bytes - free_disk_bytes(self._root)) > 0:
                held = self.num_bytes()
                if held < missing:
                    return False  # nothing is evicted in vain
                self._evict_to(held - missing, None)
        return True

    def num_bytes(self) -> int:
        """What it holds now."""
        return sum(entry.num_bytes for entry in self._entries())

    def _evict_to(self, most_bytes: int, keep: Path | None) -> None:
        entries = sorted(self._entries())
        held = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if held <= most_bytes:
                return
            if entry.path != keep:
                self.drop(entry.path)
                held -= entry.num_bytes

    def drop(self, path: Path) -> None:
        """Remove an entry: renamed first, so that no half of it is ever found."""
        trash = self._root / "staging" / uuid4().hex
        try:
            path.rename(trash)
        except FileNotFoundError:
            return  # another process was faster
        Filesystem().remove_tree(trash)

    def _entries(self) -> Iterator[_Entry]:
        for folder in _FOLDERS:
            for path in (self._root / folder).glob("??/*"):
                try:
                    stat = path.stat()
                    files = list(path.iterdir()) if path.is_dir() else [path]
                    num_bytes = sum(each.stat().st_size for each in files)
                except FileNotFoundError:
                    continue  # evicted by another process
                yield _Entry(stat.st_mtime_ns, num_bytes, path)
