"""If the store answers, and since when it does not. Knows the clock; no SQL.

While the store does not answer, one caller at a time tries it, at most twice a second. Other callers are refused at
once, so that no thread waits for a database that is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from adapters_store.errors import StoreError, StoreUnavailable

DEFAULT_GRACE_S = 60.0
RETRY_S = 0.5


class Availability:
    """grace_s: how long remembered answers count after the last one that the store gave. Thread-safe."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._probe = threading.RLock()  # held by the one caller that tries a store that does not answer
        self._error: StoreUnavailable | None = None
        self._tried_s = float("-inf")
        self._answered_s = time.monotonic()

    @property
    def error(self) -> StoreUnavailable | None:
        """Its last error; None while it answers."""
        return self._error

    def is_lost(self) -> bool:
        """It has not answered for longer than the grace."""
        return self._error is not None and time.monotonic() - self._answered_s > self._grace_s

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask the store in the block. Raises StoreUnavailable at once if it failed less than RETRY_S ago."""
        is_probe = self._begin()
        try:
            yield
        except StoreUnavailable as error:
            if error.is_away:
                self._error, self._tried_s = error, time.monotonic()
            raise
        except StoreError:
            self._found()
            raise
        finally:
            if is_probe:
                self._probe.release()
        self._found()

    def _found(self) -> None:
        self._error, self._answered_s = None, time.monotonic()

    def _begin(self) -> bool:
        error = self._error
        if error is None:
            return False
        if time.monotonic() - self._tried_s < RETRY_S or not self._probe.acquire(blocking=False):
            raise StoreUnavailable(error.code, error.message)
        return True
