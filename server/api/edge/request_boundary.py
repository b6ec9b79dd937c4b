"""The outermost layer: every answer has a request id and is counted, and no internal error shows its cause.

Knows no route. A fault before the answer began becomes a 500 in OpenAI's shape. Afterwards the connection is closed:
bytes sent then would look like a part of the answer.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.edge import request_context as request_log
from server.api.edge.request_context import collect_headers
from server.api.telemetry.metrics import ApiMetrics
from server.api.wire.errors import CLIENT_CLOSED_REQUEST, internal_error

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
UNMATCHED = "unmatched"
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class RequestBoundary:
    """ASGI middleware; the first to see a request and the last to see its answer."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, _request_id(scope), collect_headers())
        scope.setdefault("state", {})["request_id"] = answer.request_id
        request_log.begin(answer.request_id)
        start_s = time.perf_counter()
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            logger.exception("request %s failed", answer.request_id)
            if answer.status is not None:
                raise
            await internal_error(answer.request_id).response()(scope, receive, answer.send)
        finally:
            self._count(scope, answer.status, time.perf_counter() - start_s)

    def _count(self, scope: Scope, status: int | None, duration_s: float) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(route, method, str(status or CLIENT_CLOSED_REQUEST)).inc()
        self._metrics.http_seconds.labels(route).observe(duration_s)
        request_log.end(method=method, route=route, status=status or CLIENT_CLOSED_REQUEST, duration_s=duration_s)


class _Answer:
    """Adds the request id and the headers collected on the way to the answer's head; remembers its status."""

    def __init__(self, send: Send, request_id: str, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = headers
        self.request_id = request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {**self._headers, "x-request-id": self.request_id}
            added = [(name.encode("ascii"), value.encode("ascii")) for name, value in own.items()]
            message["headers"] = [*message.get("headers", ()), *added]
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """The client's own id if it is safe to log, so that its log and the server's can be joined."""
    offered = Headers(scope=scope).get("x-request-id", "")
    return offered if _REQUEST_ID.fullmatch(offered) else f"req_{uuid4().hex}"
