"""GET /admin/audit: who did what, the newest first. Admin key only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query

from server.api.auth import require_admin
from server.api.context import ContextDep, off_loop
from server.api.wire.paging import DEFAULT_LIMIT, Limit

Before = Annotated[int | None, Query(ge=1, le=2**53)]
OfTenant = Annotated[str | None, Query(max_length=128)]


async def show_audit(
    context: ContextDep, tenant: OfTenant = None, before: Before = None, limit: Limit = DEFAULT_LIMIT
) -> dict[str, Any]:
    """before: an entry's id, to read on where a page ended."""
    entries = await off_loop(context.store.audit.entries, tenant=tenant, before=before, limit=limit + 1)
    shown = [{"object": "audit_entry", **asdict(entry)} for entry in entries[:limit]]
    return {"object": "list", "data": shown, "has_more": len(entries) > limit}


def register(app: FastAPI) -> None:
    app.add_api_route("/admin/audit", show_audit, methods=["GET"], dependencies=[Depends(require_admin)])
