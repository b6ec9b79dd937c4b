"""What SIGINT and SIGTERM mean: stop, in order, with exit code 0; asked twice, at once. Knows nothing of HTTP."""

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

    A signal ends the block by KeyboardInterrupt, which the block's end takes for done. Between `defer()` and the end
    of the block it only sets `asked`: things are being put away, or somebody looks at `asked` by himself.
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
        """Returns once a signal has come, or the condition has ended."""
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
