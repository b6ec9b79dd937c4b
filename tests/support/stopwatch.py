"""Times work of this thread as a quiet machine would: what else runs, and how fast the machine is, change little.

CPU time alone does not do it: a neighbour on the other half of a core makes the same instructions take twice as long.
So a fixed piece of Python is timed beside the work, and the work is divided by how much longer that took than usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable

YARDSTICK_S = 0.012
"""CPU seconds of `_yardstick` on a quiet core of 2.5 to 3.5 GHz with Python 3.11."""


def quiet_s(work: Callable[[], object], tries: int = 3) -> float:
    """The least CPU seconds of this thread that `work` took, as on the machine that YARDSTICK_S was measured on."""
    return min(_cpu_s(work) / slowness() for _ in range(tries))


def slowness() -> float:
    """How many times as long as usual this thread takes now; at least 1."""
    return max(1.0, _cpu_s(_yardstick) / YARDSTICK_S)


def _cpu_s(work: Callable[[], object]) -> float:
    start_s = time.thread_time()
    work()
    return time.thread_time() - start_s


def _yardstick() -> dict[int, str]:
    """Objects made, hashed and dropped, as in most of what is timed."""
    return {index: str(index) * 2 for index in range(50_000)}
