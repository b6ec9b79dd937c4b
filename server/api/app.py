"""Builds the app from an engine, a store and settings. Nothing starts at import, and two apps share no state."""

from __future__ import annotations

import time
from typing import Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware

from adapters_store.accounts.shared_meters import SharedMeters
from adapters_store.store import AdapterStore
from server.api.auth import authenticate
from server.api.batches import route as batches
from server.api.console.route import console_router
from server.api.context import ApiContext
from server.api.edge.body_limits import RequestLimits
from server.api.edge.draining import DrainGate
from server.api.edge.head_method import HeadAsGet
from server.api.edge.meters import LocalMeters
from server.api.edge.request_boundary import RequestBoundary
from server.api.edge.shared_quotas import SharedQuotas
from server.api.edge.upload_slots import UploadSlots
from server.api.engine_client import EngineClient
from server.api.generation import chat, completions, embeddings
from server.api.generation.messages import route as messages
from server.api.generation.responses import route as responses
from server.api.routes import adapters, admin, files, fine_tuning, health, models, residency, usage, versions
from server.api.settings import ApiSettings
from server.api.telemetry import metrics
from server.api.telemetry.metrics import ApiMetrics
from server.api.telemetry.tracing import OtlpTracing
from server.api.telemetry.usage_log import UsageLog
from server.api.wire import errors
from server.api.wire.thread_route import ThreadRoute
from server.engine.grammar.compiler import compiler_for
from server.jobs.limits import BatchLimits, JobLimits
from server.jobs.service import Onboarding

_openapi = APIRouter(route_class=ThreadRoute)
_ROUTERS = (
    completions.router,
    chat.router,
    responses.router,
    messages.router,
    embeddings.router,
    models.router,
    adapters.router,
    versions.router,
    residency.router,
    admin.router,
    usage.router,
    health.router,
    metrics.router,
    files.router,
    fine_tuning.router,
    batches.router,
    _openapi,
)


def create_app(
    *,
    engine: EngineClient,
    store: AdapterStore,
    settings: ApiSettings,
    usage: UsageLog | None = None,
    tracing: OtlpTracing | None = None,
    job_limits: JobLimits | None = None,
    batch_limits: BatchLimits | None = None,
) -> FastAPI:
    """The whole API over one engine and one store. The caller starts and closes both.

    `background` starts everything besides answering; usage is saved from then on.
    """
    app = FastAPI(title="multilora", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    own_metrics = ApiMetrics(
        engine,
        settings.max_label_values,
        settings.data_dir,
        store.served_names,
        max_age_s=settings.metrics_max_age_s,
    )
    context = app.state.context = ApiContext(
        engine=engine,
        store=store,
        settings=settings,
        metrics=own_metrics,
        upload_slots=UploadSlots(
            settings.max_uploads,
            store.has_room,
            min_bytes_per_s=settings.min_upload_bytes_per_s,
            grace_s=settings.idle_timeout_s,
        ),
        check_slots=anyio.CapacityLimiter(settings.max_upload_checks),
        created=int(time.time()),
        usage=usage or UsageLog(store.usage),
        trace=None if tracing is None else tracing.record,
        meters=SharedQuotas(SharedMeters(store.database.url)) if store.database.is_shared else LocalMeters(),
        grammars=compiler_for(engine.tokenizer, engine.vocabulary),
    )
    onboarding = app.state.onboarding = Onboarding(
        settings.data_dir,
        store.database,
        job_limits,
        batch_limits=batch_limits,
        serves=engine.base.digest,
        remote=store.remote,
    )
    for part in (*_ROUTERS, console_router(settings)):
        app.router.routes.extend(part.routes)  # flat: an included router would be one route that hides the others
    errors.install(app)
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestLimits, settings=settings, max_file_bytes=onboarding.limits.max_file_bytes)
    app.add_middleware(DrainGate, draining=context.draining)
    app.add_middleware(RequestBoundary, metrics=own_metrics)
    if settings.cors_origins:
        _allow_browsers(app, settings.cors_origins)
    if tracing is not None:
        tracing.instrument(app)
    return app


def _allow_browsers(app: FastAPI, origins: tuple[str, ...]) -> None:
    """The outermost layer: preflights carry no key, and pages must be able to read errors too. Keys come in a header,
    so a page can only use a key that it has; there are no cookies."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"),
        allow_headers=("*",),
        expose_headers=("*",),
    )


@_openapi.get("/openapi.json", dependencies=[Depends(authenticate)])
def show_openapi(request: Request) -> dict[str, Any]:
    """FastAPI's own route for this asks for no key, and makes the schema on the event loop."""
    app = request.app
    assert isinstance(app, FastAPI)
    return app.openapi()
