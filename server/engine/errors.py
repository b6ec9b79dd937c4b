"""What the engine refuses. Bad input is `sampling_params.InvalidRequest`; this is the rest."""

from __future__ import annotations


class QueueFull(Exception):
    """The waiting queue is at its limit. HTTP 429 with Retry-After `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
