"""Asks a tenant's quota before the body of its request is read. Knows no body; the rest is asked at submission."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from server.api.auth import CallerDep
from server.api.context import ContextDep
from server.api.edge.rate_limits import Admission
from server.api.target import quotas_of


async def admit(caller: CallerDep, context: ContextDep) -> Admission | None:
    """One request of the caller's tenant, spent even where the body is refused; None for a caller that speaks for all,
    whose tenant the body names. Raises ApiError 429."""
    if caller.speaks_for_all:
        return None
    return context.rate_limits.admit(caller.tenant, await quotas_of(context, caller.tenant))


AdmissionDep = Annotated[Admission | None, Depends(admit)]
