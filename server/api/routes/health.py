"""GET /health: is the engine's thread alive. GET /ready: would a request be served now. Open to all."""

from __future__ import annotations

from fastapi import APIRouter

from server.api.context import ContextDep
from server.api.edge.draining import server_stopping
from server.api.wire.errors import ApiError, engine_dead, to_api_error

router = APIRouter()


@router.get("/health")
async def health(context: ContextDep) -> dict[str, str]:
    """200 while the engine lives; 503 asks the supervisor for a restart."""
    if not context.engine.is_healthy():
        raise engine_dead()
    return {"status": "ok"}


@router.get("/ready")
async def ready(context: ContextDep) -> dict[str, str]:
    """200 once requests are served, and while they are: not when the server stops, nor when its store is away for
    longer than remembered answers count."""
    if context.draining.is_on:
        raise server_stopping()
    reach = context.store.database.availability
    if reach.error is not None and reach.is_lost():
        raise to_api_error(reach.error)
    if not (context.engine.is_healthy() and context.engine.is_ready()):
        raise ApiError(503, "not_ready", "The server is not ready yet.", retry_after_s=1.0)
    return {"status": "ready"}
