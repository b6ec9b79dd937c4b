"""What every route gets as a dependency: engine, store, settings and this app's own parts. Never a global."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from fastapi import Depends, Request

from adapters_store.store import AdapterStore
from server.api.edge.draining import Draining
from server.api.edge.event_bridge import EventBridge
from server.api.edge.meters import LocalMeters, Meters
from server.api.edge.upload_slots import UploadSlots
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from server.api.telemetry.call_record import CallRecord
from server.api.telemetry.metrics import ApiMetrics
from server.api.telemetry.usage_log import UsageLog
from server.api.wire.heavy_work import HeavyWork
from server.engine.grammar.compiler import GrammarCompiler


@dataclass(frozen=True, kw_only=True)
class ApiContext:
    """engine, store and settings are the caller's; the rest belongs to this app.

    upload_slots: which uploads are admitted; check_slots: how many are checked and written at once.
    created: Unix seconds of the app's start. trace: called with every generation when it is over; None if tracing is
    off. grammars: what constrained answers follow. heavy: runs long work.
    """

    engine: EngineClient
    store: AdapterStore
    settings: ApiSettings
    metrics: ApiMetrics
    upload_slots: UploadSlots
    check_slots: anyio.CapacityLimiter
    created: int
    usage: UsageLog
    trace: Callable[[CallRecord], None] | None
    grammars: GrammarCompiler
    bridge: EventBridge = field(default_factory=EventBridge)
    meters: Meters = field(default_factory=LocalMeters)
    draining: Draining = field(default_factory=Draining)
    heavy: HeavyWork = field(default_factory=HeavyWork)

    @property
    def fingerprint(self) -> str:
        """Short name of the base's exact weights, OpenAI's system_fingerprint."""
        return f"fp_{self.engine.base.digest.rpartition(':')[2][:10]}"


async def context_of(request: Request) -> ApiContext:
    """Not a plain `def`: FastAPI would call it on a thread for every request."""
    context = request.app.state.context
    assert isinstance(context, ApiContext)
    return context


ContextDep = Annotated[ApiContext, Depends(context_of)]
