"""`x-request-timeout-ms`: how long the client will wait for the whole answer. Knows the header; what it means for a
request is the scheduler's business."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import Depends, Request

from adapters_store.parsing.numbers import whole_number
from adapters_store.parsing.strict_json import shown
from server.api.wire.errors import ApiError

HEADER = "x-request-timeout-ms"
MAX_MS = 24 * 3600 * 1000


async def deadline_of(request: Request) -> float | None:
    """When the client stops waiting, in seconds of `time.monotonic`; None if it does not say. Raises ApiError 400."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    milliseconds = whole_number(text, 1, MAX_MS)
    if milliseconds is None:
        message = f"{HEADER} must be 1 to {MAX_MS} milliseconds, got {shown(text)}"
        raise ApiError(400, "invalid_value", message, param=HEADER)
    return time.monotonic() + milliseconds / 1000


DeadlineDep = Annotated[float | None, Depends(deadline_of)]
