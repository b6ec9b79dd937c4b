"""Decides when background threads may compute beside an engine that uses every core. Knows time; knows no work.

A decode step on a CPU is some hundred parallel regions, and each waits for its slowest thread: a loader that takes one
core for 3 ms costs all of them 3 ms, whatever its priority (measured: niceness 19 and the idle class stretch others'
95th percentile by 1.3, and starve: 170 ms for a load of 4). So the loader works between two steps, when the cores are
idle anyway, and the engine gives it a small share of its time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.05  # of a step's time, while somebody has work to do
_LEAST_S = 0.0005  # a few pieces of work
_MOST_S = 0.05


class Turns:
    """Background threads wrap their work in `work()` and each piece of it (well below a millisecond) in `turn()`.

    The engine calls `give()` between two steps and `rest()` when it has none to do. Thread-safe; one engine.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._is_resting = True
        self._num_at_work = 0
        self._until_s = 0.0
        self._last_s = clock()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Holds while there are pieces left to do: the engine gives turns only then."""
        with self._changed:
            self._num_at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_at_work -= 1
                self._changed.notify_all()

    def turn(self) -> None:
        """Wait until a piece of work may be done. Called between pieces, inside `work()`."""
        if self._is_resting or self._clock() < self._until_s:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._is_resting or self._clock() < self._until_s)

    def give(self) -> None:
        """The engine has ended a step: if there is work, let it be done for a share of the time since the last call."""
        now_s = self._clock()
        self._is_resting = False
        if self._num_at_work:
            budget_s = min(max(SHARE * (now_s - self._last_s), _LEAST_S), _MOST_S)
            self._until_s = now_s + budget_s
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._num_at_work == 0, timeout=budget_s)
        self._last_s = self._clock()

    def rest(self) -> None:
        """The engine has nothing to do: background work goes on without turns until the next `give()`."""
        if not self._is_resting:
            with self._changed:
                self._is_resting = True
                self._changed.notify_all()
