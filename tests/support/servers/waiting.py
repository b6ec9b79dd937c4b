"""Waits for something that happens on another thread or in another process."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.1
PAUSE_OVER_LOOK = 4.0


def wait_until(condition: Callable[[], object], *, timeout_s: float = 600.0) -> None:
    """Returns once the condition holds. timeout_s: only so that a broken test ends; no busy machine takes that long.

    What looks with a request or a query pauses for longer: it would take the core from what it waits for."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        looked_s = time.monotonic()
        if condition():
            return
        now_s = time.monotonic()
        assert now_s < deadline_s, f"not so within {timeout_s} s"
        time.sleep(min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, PAUSE_OVER_LOOK * (now_s - looked_s))))
