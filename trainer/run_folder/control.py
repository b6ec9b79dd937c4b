"""Asks once a step whether to go on. Knows a file, two signals, the words "pause" and "cancel"; knows no training."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

CONTROL_FILE = "control"
PAUSE, CANCEL = "pause", "cancel"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Control:
    """The run folder's control file, and SIGTERM and SIGINT, both of which mean "pause"."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / CONTROL_FILE
        self._signalled = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def wish(self) -> str:
        """ "pause", "cancel", or "" to go on. Any other word in the file is no wish."""
        try:
            word = self._file.read_text(errors="replace").strip()
        except FileNotFoundError:
            word = ""
        if word in (PAUSE, CANCEL):
            return word
        return PAUSE if self._signalled else ""

    def answered(self) -> None:
        """The wish is fulfilled: a run that is resumed does not find it again."""
        self._file.unlink(missing_ok=True)
