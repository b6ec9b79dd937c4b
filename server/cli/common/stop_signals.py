"""SIGINT and SIGTERM: the first stops in order with exit code 0, the second at once. Knows nothing of HTTP."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)
_POLL_S = 0.1


class StopSignals:
    """For the length of a block, on the main thread.

    A signal ends the block with KeyboardInterrupt, which the end of the block swallows. After `defer()` a signal only
    sets `asked`: the block is cleaning up, or it polls `asked`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._is_deferred = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        return self.count > 0

    def defer(self) -> None:
        self._is_deferred = True

    def wait(self, while_true: Callable[[], bool] = lambda: True) -> None:
        """Returns after a signal, or when the condition turns false."""
        self.defer()
        while not self.asked and while_true():
            time.sleep(_POLL_S)  # an Event's lock cannot be taken safely inside a signal handler

    def __enter__(self) -> StopSignals:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return self.asked and isinstance(error, KeyboardInterrupt)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if not self._is_deferred and self.count == 1:
            raise KeyboardInterrupt
