"""`x-request-timeout-ms`: how long the client will wait for the whole answer. Knows the header; what it means for a
request is the scheduler's business."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import Depends, Request

from server.api.errors import ApiError

HEADER = "x-request-timeout-ms"
MAX_MS = 24 * 3600 * 1000


async def deadline_of(request: Request) -> float | None:
    """When the client stops waiting, in seconds of `time.monotonic`; None if it does not say. Raises ApiError 400."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= MAX_MS):
        raise ApiError(400, "invalid_value", f"{HEADER} must be 1 to {MAX_MS} milliseconds, got {text!r}", param=HEADER)
    return time.monotonic() + int(text) / 1000


DeadlineDep = Annotated[float | None, Depends(deadline_of)]
