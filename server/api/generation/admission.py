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


def _deadline_of(request: Request) -> float | None:
    """When the client stops waiting, in seconds of `time.monotonic`; None without the header. Raises ApiError 400."""
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    milliseconds = whole_number(text, 1, MAX_MS)
    if milliseconds is None:
        message = f"{TIMEOUT_HEADER} must be 1 to {MAX_MS} milliseconds, got {shown(text)}"
        raise ApiError(400, "invalid_value", message, param=TIMEOUT_HEADER)
    return time.monotonic() + milliseconds / 1000


@dataclass(frozen=True)
class BeforeBody:
    """What is known of a request for text before its body is read.

    admission: one request of the caller's tenant, spent even if the body is refused; None for a caller that speaks for
    all, since the body names its tenant.
    """

    caller: Caller
    deadline_s: float | None
    admission: Admitted | None


async def before_body(request: Request, caller: CallerDep, context: ContextDep) -> BeforeBody:
    """A dependency that is declared before the body. Raises ApiError 400, 429."""
    deadline_s, admission = _deadline_of(request), None
    if not caller.speaks_for_all:
        admission = await context.meters.admit(caller.tenant, await quotas_of(context, caller.tenant))
    return BeforeBody(caller, deadline_s, admission)


BeforeBodyDep = Annotated[BeforeBody, Depends(before_body)]
