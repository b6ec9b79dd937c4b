"""Gives memory that threads freed back to the system. Knows the C library; knows nothing of what used the memory.

Free memory inside an arena stays with the process until it is trimmed; glibc trims the end of the main arena only. A
trim takes 1 to 2 ms. How many arenas there are: `lora_kernels.process`.
"""

from __future__ import annotations

import threading

from lora_kernels.process import c_library_trim

TRIM_EVERY_S = 10.0


class MemoryTrim:
    """A thread that trims every `every_s`; none if the C library has no such call."""

    def __init__(self, *, every_s: float = TRIM_EVERY_S) -> None:
        self._every_s = every_s
        self._trim = c_library_trim()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-trim", daemon=True)

    def start(self) -> None:
        if self._trim is not None:
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        assert self._trim is not None
        while not self._stop.wait(self._every_s):
            self._trim()
