"""CPU seconds of a process and of all that came from it, also of those whose parent has ended. Linux only."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

_EVERY_S = 0.1  # what a process computes after its last look is not counted


class TreeTimes:
    """Looks at all processes again and again while the block lasts; a process is known by its id and its start."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._members: set[tuple[int, int]] = set()
        self._ticks: dict[tuple[int, int], int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tree-times", daemon=True)

    def __enter__(self) -> TreeTimes:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def total_s(self) -> float:
        return sum(list(self._ticks.values())) / os.sysconf("SC_CLK_TCK")

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._look()

    def _look(self) -> None:
        found = sorted(_processes(), key=lambda each: each[3])  # parents first
        by_id = {pid: (pid, start) for pid, _, _, start in found}
        if not self._members:
            self._members.add(by_id[self._root])
        for pid, parent, ticks, start in found:
            if (pid, start) in self._members or by_id.get(parent) in self._members:
                self._members.add((pid, start))
                self._ticks[pid, start] = ticks


def _processes() -> Iterator[tuple[int, int, int, int]]:
    """Of each: id, parent's id, CPU ticks, start."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            yield int(name), int(words[1]), int(words[11]) + int(words[12]), int(words[19])
