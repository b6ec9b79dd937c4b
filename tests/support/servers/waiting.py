"""Waits for something that happens on another thread."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], *, timeout_s: float = 600.0) -> None:
    """Returns once the condition holds. timeout_s: only so that a broken test ends; no busy machine takes that long."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not so within {timeout_s} s"
        time.sleep(0.002)
