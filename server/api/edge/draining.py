"""Graceful shutdown: new requests are refused; running ones finish, or end with an error at the deadline.

Decides what a request gets while the server stops. The caller decides when that begins and when the deadline is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.edge.event_bridge import Inbox
from server.api.wire.errors import ApiError

STILL_ANSWERED = frozenset({"/health", "/ready", "/metrics"})


class Draining:
    """One per app. `begin` and `cut_off` may be called on any thread; the rest belongs to the event loop."""

    def __init__(self) -> None:
        self.is_on = False
        self.num_inside = 0
        self._is_over = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: set[Inbox] = set()

    def begin(self) -> None:
        """From now on /ready is false, and new requests are refused with a Retry-After."""
        self.is_on = True

    def cut_off(self) -> None:
        """End every running generation with the error server_stopping."""
        self._is_over = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail_all)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While a request is being answered."""
        self._loop = asyncio.get_running_loop()
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1

    @contextmanager
    def watching(self, inbox: Inbox) -> Iterator[None]:
        """While a generation's events come through this inbox."""
        self._inboxes.add(inbox)
        if self._is_over:
            inbox.fail(server_stopping())
        try:
            yield
        finally:
            self._inboxes.discard(inbox)

    def _fail_all(self) -> None:
        for inbox in self._inboxes:
            inbox.fail(server_stopping())


class DrainGate:
    """ASGI middleware: counts running requests, and refuses new ones while the server stops."""

    def __init__(self, app: ASGIApp, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in STILL_ANSWERED:
            await self._app(scope, receive, send)
            return
        if self._draining.is_on:
            await server_stopping().response()(scope, receive, send)
            return
        with self._draining.inside():
            await self._app(scope, receive, send)


def server_stopping() -> ApiError:
    message = "The server is stopping; send the request again."
    return ApiError(503, "server_stopping", message, retry_after_s=1.0, headers={"connection": "close"})
