"""Real files that count what is done to them, and stop, tear or fail where a test says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from adapters_store.filesystem import Data, Filesystem


class RecordingFiles(Filesystem):
    """Real files; notes every operation and calls `at_step` before each. With `torn`, data is then half written."""

    def __init__(self, at_step: Callable[[int], None] = lambda _: None, *, torn: int | None = None) -> None:
        self.steps: list[tuple[str, str]] = []
        self._at_step = at_step
        self._torn = torn

    def _note(self, operation: str, path: Path) -> None:
        self.steps.append((operation, path.name))
        self._at_step(len(self.steps))

    def make_folder(self, path: Path) -> None:
        self._note("make_folder", path)
        super().make_folder(path)

    def copy(self, source: Path, target: Path) -> None:
        self._note("copy", target)
        super().copy(source, target)
        self._tear(target)

    def write(self, target: Path, data: Data) -> None:
        self._note("write", target)
        super().write(target, data)
        self._tear(target)

    def _tear(self, target: Path) -> None:
        if self._torn == len(self.steps):
            os.truncate(target, target.stat().st_size // 2)
            os._exit(9)

    def sync_file(self, path: Path) -> None:
        self._note("sync_file", path)
        super().sync_file(path)

    def sync_folder(self, path: Path) -> None:
        self._note("sync_folder", path)
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._note("rename", target)
        super().rename(source, target)

    def remove_tree(self, path: Path) -> None:
        self._note("remove_tree", path)
        super().remove_tree(path)
