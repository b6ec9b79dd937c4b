"""The text of /metrics: rendered on a thread, because it asks the store, and kept for some milliseconds.

Inference routers read it every 50 ms, each for itself; readers that come together share one text.
"""

from __future__ import annotations

import threading
import time

from prometheus_client import CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool


class MetricsText:
    """max_age_s: how old a text may be when it is answered with; 0: every reader has a new one."""

    def __init__(self, registry: CollectorRegistry, max_age_s: float) -> None:
        self._registry = registry
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._text = b""
        self._rendered_s = float("-inf")

    async def read(self) -> bytes:
        return self._text if self._is_fresh() else await run_in_threadpool(self._render)

    def _render(self) -> bytes:
        with self._lock:
            if not self._is_fresh():
                begun_s = time.monotonic()
                self._text = generate_latest(self._registry)
                self._rendered_s = begun_s
            return self._text

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._rendered_s < self._max_age_s
