"""Bounds that uvicorn lacks: a target's size and characters, a body's size, and the time in which a body must arrive.
Knows no route but those that take large bodies."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.settings import ApiSettings
from server.api.wire.body_coding import GzipBody, is_gzip
from server.api.wire.errors import ApiError

UPLOAD_PATH = "/v1/adapters"
FILES_PATH = "/v1/files"
_FORM_OVERHEAD_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class BodyLimit:
    max_bytes: int
    total_s: float


class RequestLimits:
    """ASGI middleware. Refusals are ApiErrors: here for what shows in the headers, out of `receive` for the rest.
    max_file_bytes: of an uploaded file."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, max_file_bytes: int) -> None:
        self._app = app
        self._settings = settings
        form_bytes = {UPLOAD_PATH: settings.max_adapter_bytes + settings.max_config_bytes, FILES_PATH: max_file_bytes}
        self._uploads = {
            path: BodyLimit(num_bytes + _FORM_OVERHEAD_BYTES, settings.upload_timeout_s)
            for path, num_bytes in form_bytes.items()
        }
        self._json = BodyLimit(settings.max_body_bytes, settings.body_timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._uploads.get(scope["path"], self._json)
        headers = Headers(scope=scope)
        try:
            self._check_head(scope, headers, limit)
            must_decode = is_gzip(headers)
        except ApiError as error:
            await error.response()(scope, receive, _closing(send, headers))
            return
        body = BoundedBody(receive, limit, self._settings.idle_timeout_s)
        read = GzipBody(body.receive, limit.max_bytes).receive if must_decode else body.receive
        await self._app(scope, read, _closing(send, headers, body))

    def _check_head(self, scope: Scope, headers: Headers, limit: BodyLimit) -> None:
        settings = self._settings
        num_target_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        if num_target_bytes > settings.max_target_bytes:
            raise _too_much(414, "uri_too_long", "the request target", num_target_bytes, settings.max_target_bytes)
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            raise _nul_in_target(scope)
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit.max_bytes:
            raise _too_much(413, "too_large", "the body", int(length[:20]), limit.max_bytes)


class BoundedBody:
    """A `receive` that refuses a body that is too large or too slow. After the body it only waits for the hang-up."""

    def __init__(self, receive: Receive, limit: BodyLimit, idle_timeout_s: float) -> None:
        self._receive = receive
        self._limit = limit
        self._idle_timeout_s = idle_timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + limit.total_s
        self._num_bytes = 0
        self._is_complete = False
        self.is_asked_for = False

    async def receive(self) -> Message:
        self.is_asked_for = True
        if self._is_complete:
            return await self._receive()
        message = await self._next()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._limit.max_bytes:
            raise _too_much(413, "too_large", "the body", self._num_bytes, self._limit.max_bytes)
        self._is_complete = not message.get("more_body", False)
        return message

    async def _next(self) -> Message:
        now_s = asyncio.get_running_loop().time()
        wait_s = min(self._idle_timeout_s, self._deadline_s - now_s)
        try:
            async with asyncio.timeout(wait_s):
                return await self._receive()
        except TimeoutError:
            message = (
                f"the body must arrive within {self._limit.total_s:g} s, without a pause of {self._idle_timeout_s:g} s"
            )
            raise ApiError(408, "request_timeout", message, headers={"connection": "close"}) from None


def _closing(send: Send, headers: Headers, body: BoundedBody | None = None) -> Send:
    """A `send` that closes the connection if a client that waits for "100 Continue" gets an answer instead: the body
    does not follow, and the next bytes must not be read as the body."""
    if headers.get("expect", "").lower() != "100-continue":
        return send

    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start" and not (body is not None and body.is_asked_for):
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await send(message)

    return send_and_close


def _nul_in_target(scope: Scope) -> ApiError:
    """PostgreSQL has no text that holds one, so nothing can have such a name: a path with one leads nowhere."""
    if "\0" in scope["path"]:
        return ApiError(404, "not_found", "the path must hold no NUL character (%00)")
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    name = next(name for name, value in query if "\0" in name + value)
    param = None if "\0" in name else name
    return ApiError(400, "invalid_value", f"{param or 'the query'}: must hold no NUL character (%00)", param=param)


def _too_much(status: int, code: str, what: str, size: int, limit: int) -> ApiError:
    return ApiError(status, code, f"{what} must have at most {limit} bytes, got {size}")
