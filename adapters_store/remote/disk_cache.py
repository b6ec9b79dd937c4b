"""The local disk as a cache of blobs and training files: bounded in bytes, the least recently used goes first.

An entry is a folder blobs/ab/HEX (with the packed form) or a file files/ab/HEX; its modification time is its last use.
Several processes may share one: each counts what it adds, and looks at the disk again after an eighth of the budget.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from adapters_store.filesystem import Filesystem

_FOLDERS = ("blobs", "files")
_LOOK_AFTER = 8  # parts of the budget


class _Entry(NamedTuple):
    used_ns: int
    num_bytes: int
    path: Path


class DiskCache:
    """root: the data directory. Safe from many threads."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
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

    def make_room(self, num_bytes: int) -> None:
        """Evict entries that hold at least num_bytes, because the disk is full."""
        with self._lock:
            self._evict_to(self.num_bytes() - num_bytes, None)

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
