"""Checks once a step whether the run should stop: by the run folder's control file, or by a signal. Trains nothing."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from trainer.run_folder.folder import PAUSE, RunFolder

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Control:
    """The run folder's control file, and SIGTERM and SIGINT, both of which mean "pause".

    Signals belong to the main thread. On another one (Ray Train runs the loop there) the file alone counts.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._signalled = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> str:
        """PAUSE, CANCEL, or "" to continue. The file's word takes precedence over a signal."""
        return self._folder.requested() or (PAUSE if self._signalled else "")

    def clear(self) -> None:
        """The request is done: a resumed run must not find it again."""
        self._folder.request("")
