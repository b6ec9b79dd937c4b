"""Puts right what Ray's HTTP proxy does otherwise than our own server: one request id, our error for a lost replica.

`in_the_proxy` is for RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, which Ray reads when a proxy starts.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.wire.errors import ApiError

_RETRY_AFTER_S = 1


class OneRequestId:
    """Around the app in a replica: Ray's proxy adds the request's id to every answer, so the app's own is one too many.

    Both are the same: the app takes the id that the proxy gives the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message["headers"]))
                del headers["x-request-id"]
                message = {**message, "headers": headers.raw}
            await send(message)

        await self._app(scope, receive, send_on)


class LostReplica:
    """Around Ray's proxy: if a replica died or there is none, clients get our 503 with Retry-After, and not Ray's plain
    text. Answers of the app pass: they are never plain text with such a status.

    Ray begins no answer if the replica dies before the app's; its HTTP server would write a plain 500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = is_replaced = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun, is_replaced
            has_begun = True
            if message["type"] == "http.response.start" and _is_rays(message):
                is_replaced = True
                await _replica_lost(_request_id(message)).response()(scope, receive, send)
            elif not is_replaced:
                await send(message)

        await self._app(scope, receive, send_on)
        if scope["type"] == "http" and not has_begun:
            await _replica_lost({}).response()(scope, receive, send)


def _replica_lost(headers: dict[str, str]) -> ApiError:
    message = "The replica that had this request is gone; send it again."
    return ApiError(503, "replica_lost", message, retry_after_s=_RETRY_AFTER_S, headers=headers)


def in_the_proxy() -> list[Middleware]:
    return [Middleware(LostReplica)]


def _is_rays(start: Message) -> bool:
    headers = Headers(raw=list(start["headers"]))
    return start["status"] in (500, 503) and headers.get("content-type", "").startswith("text/plain")


def _request_id(start: Message) -> dict[str, str]:
    found = Headers(raw=list(start["headers"])).get("x-request-id")
    return {} if found is None else {"x-request-id": found}
