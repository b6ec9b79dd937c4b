"""GET /v1/usage: usage by day and adapter version; of all tenants for a caller that speaks for all."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Query

from adapters_store.accounts.keys import Scope
from adapters_store.accounts.usage import counts_to_json, to_json, total_of
from server.api.auth import CallerDep, guarded
from server.api.context import ContextDep
from server.api.wire.paging import DEFAULT_LIMIT, After, Limit, page
from server.api.wire.thread_route import ThreadRoute

Day = Annotated[date | None, Query(description="YYYY-MM-DD, UTC; this day included")]

router = APIRouter(route_class=ThreadRoute)


@router.get("/v1/usage", dependencies=guarded(Scope.READ))
def show_usage(
    caller: CallerDep,
    context: ContextDep,
    *,
    start: Day = None,
    end: Day = None,
    limit: Limit = DEFAULT_LIMIT,
    after: After = None,
) -> dict[str, Any]:
    """Up to this moment. `total` sums all days asked for, whatever the page."""
    context.usage.flush()
    rows = context.store.usage.rows(
        tenant=None if caller.speaks_for_all else caller.tenant,
        start=None if start is None else start.isoformat(),
        end=None if end is None else end.isoformat(),
    )
    return {**page(to_json(rows), limit, after), "total": counts_to_json(total_of(rows))}
