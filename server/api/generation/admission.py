"""Checks of a request for text before its body is read: the tenant's quota, and how long the client waits.

Knows no body. The rest of the quota is checked at submission.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from adapters_store.parsing.numbers import whole_number
from adapters_store.parsing.strict_json import shown
from server.api.auth import Caller, CallerDep
from server.api.context import ContextDep
from server.api.edge.meters import Admitted
from server.api.target import quotas_of
from server.api.wire.errors import ApiError

TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_MS = 24 * 3600 * 1000


async def deadline_of(request: Request) -> float | None:
    """When the client stops waiting, in seconds of `time.monotonic`; None without the header. Raises ApiError 400."""
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    milliseconds = whole_number(text, 1, MAX_MS)
    if milliseconds is None:
        message = f"{TIMEOUT_HEADER} must be 1 to {MAX_MS} milliseconds, got {shown(text)}"
        raise ApiError(400, "invalid_value", message, param=TIMEOUT_HEADER)
    return time.monotonic() + milliseconds / 1000


async def admit(caller: CallerDep, context: ContextDep) -> Admitted | None:
    """One request of the caller's tenant, spent even if the body is refused. None for a caller that speaks for all: its
    tenant is named in the body. Raises ApiError 429."""
    if caller.speaks_for_all:
        return None
    return await context.meters.admit(caller.tenant, await quotas_of(context, caller.tenant))


@dataclass(frozen=True)
class BeforeBody:
    """What is known of a request for text before its body is read."""

    caller: Caller
    deadline_s: float | None
    admission: Admitted | None


async def before_body(
    caller: CallerDep,
    deadline_s: Annotated[float | None, Depends(deadline_of)],
    admission: Annotated[Admitted | None, Depends(admit)],
) -> BeforeBody:
    """A dependency that is declared before the body; FastAPI resolves its parameters in their order."""
    return BeforeBody(caller, deadline_s, admission)


BeforeBodyDep = Annotated[BeforeBody, Depends(before_body)]
