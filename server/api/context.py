"""The one object every route is handed. Built by `create_app`, found through the request, never a global."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from fastapi import Depends, Request

from adapters_store.store import AdapterStore
from server.api.edge.draining import Draining
from server.api.edge.event_bridge import EventBridge
from server.api.edge.rate_limits import RateLimits
from server.api.edge.upload_slots import UploadSlots
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from server.api.telemetry.call_record import CallRecord
from server.api.telemetry.metrics import ApiMetrics
from server.api.telemetry.usage_log import UsageLog
from server.api.wire.heavy_work import HeavyWork


@dataclass(frozen=True, kw_only=True)
class ApiContext:
    """engine, store and settings as given; the rest is this app's own.

    upload_slots: which uploads may come in; check_slots: how many may be checked and written at once.
    created: Unix seconds of the app's start. trace: told of every generation once it is over. heavy: where
    long work runs.
    """

    engine: EngineClient
    store: AdapterStore
    settings: ApiSettings
    metrics: ApiMetrics
    upload_slots: UploadSlots
    check_slots: anyio.CapacityLimiter
    created: int
    usage: UsageLog
    trace: Callable[[CallRecord], None]
    bridge: EventBridge = field(default_factory=EventBridge)
    rate_limits: RateLimits = field(default_factory=RateLimits)
    draining: Draining = field(default_factory=Draining)
    heavy: HeavyWork = field(default_factory=HeavyWork)

    @property
    def fingerprint(self) -> str:
        """Short name of the base's exact weights, OpenAI's system_fingerprint."""
        return f"fp_{self.engine.base.digest.rpartition(':')[2][:10]}"


async def context_of(request: Request) -> ApiContext:
    """Not a plain `def`: FastAPI would ask a thread for it, with every request."""
    context = request.app.state.context
    assert isinstance(context, ApiContext)
    return context


ContextDep = Annotated[ApiContext, Depends(context_of)]
