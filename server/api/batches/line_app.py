"""Answers one line of a batch through the routes that clients use, and says where its requests wait. Knows no file.

The app is a second one over the same engine and store, on the batch runner's own event loop: same checks, same
answers, same usage. Two parts differ. Its requests wait in a queue of the tenant's batches, whose weight is a hundredth
of the tenant's; and the tenant's rates do not count them, so live requests keep the whole quota.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from fastapi import FastAPI
from starlette.types import Message, Scope

from adapters_store.accounts.keys import Scope as KeyScope
from adapters_store.accounts.records import UNLIMITED, Quotas
from server.api.auth import CALLER_IN_SCOPE, Caller
from server.api.context import ApiContext
from server.api.edge.draining import Draining
from server.api.edge.event_bridge import EventBridge
from server.api.edge.meters import Admitted, Held, LocalMeters
from server.api.edge.rate_limits import Admission
from server.api.edge.request_boundary import RequestBoundary
from server.api.engine_client import EngineClient
from server.api.generation import chat, completions, embeddings
from server.api.generation.responses import route as responses
from server.api.wire import errors
from server.api.wire.heavy_work import HeavyWork
from server.engine.request import Request, TokenEvent

_ROUTERS = (completions.router, chat.router, embeddings.router, responses.router)
WEIGHT = 0.01  # of a tenant's batches, next to its live requests
QUEUE = "{tenant} (batches)"  # no tenant's name: names have no blanks


@dataclass(frozen=True, slots=True)
class Answer:
    """status: of HTTP. body: JSON."""

    status: int
    body: bytes


class BatchEngine:
    """The engine, with its requests in the queue of a tenant's batches."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request, listener: Callable[[TokenEvent], None]) -> None:
        request.tenant = QUEUE.format(tenant=request.owner)
        request.weight *= WEIGHT
        self._engine.submit(request, listener)


class _Unmetered(LocalMeters):
    """Counts, and refuses nothing."""

    async def admit(self, tenant: str, quotas: Quotas) -> Admission:
        return await super().admit(tenant, UNLIMITED)

    async def reserve(
        self, tenant: str, quotas: Quotas, admitted: Admitted | None, *, num_tokens: int, num_sequences: int
    ) -> Held:
        return await super().reserve(tenant, UNLIMITED, admitted, num_tokens=num_tokens, num_sequences=num_sequences)


class LineApp:
    """Used on one event loop, which is not that of the server's own app."""

    def __init__(self, context: ApiContext) -> None:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.state.context = replace(
            context,
            engine=cast(EngineClient, BatchEngine(context.engine)),
            bridge=EventBridge(),
            meters=_Unmetered(),
            draining=Draining(),
            heavy=HeavyWork(),
        )
        for router in _ROUTERS:
            app.router.routes.extend(router.routes)
        errors.install(app)
        self._app = RequestBoundary(app, context.metrics)

    async def answer(self, tenant: str, endpoint: str, body: bytes, *, request_id: str, actor: str) -> Answer:
        """The route's whole answer to this body. When the task is cancelled, its requests leave the engine."""
        headers = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": request_id}
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": endpoint,
            "raw_path": endpoint.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": None,
            "server": None,
            CALLER_IN_SCOPE: Caller(tenant, actor=actor, scopes=frozenset({KeyScope.INFERENCE})),
        }
        sent: list[Message] = []
        unread = [body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()  # no client hangs up
            return await never

        async def send(message: Message) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return Answer(sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]))
