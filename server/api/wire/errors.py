"""Every failure as OpenAI's error body. Decides status, type and headers; knows no route and no engine.

{"error": {"message": str, "type": str, "param": str | null, "code": str}}

Under /v1/messages the body is Anthropic's: {"type": "error", "error": {...}}, with that API's types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters_store.errors import UserError
from adapters_store.parsing.strict_json import shown
from server.api.wire.json_text import json_bytes
from server.engine.request import RequestError

CLIENT_CLOSED_REQUEST = 499  # no client reads it; logs and metrics count it

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_MAX_SHOWN = 200
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(UserError):
    """One answer that is not a success. `retry_after_s` asks the client to come back; without it a 409 or 5xx
    tells clients not to retry by themselves, because the same request would fail again."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, message, param=param)
        self.status = status
        self.retry_after_s = retry_after_s
        self.extra_headers = dict(headers or {})

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is not None:
            seconds = max(1, math.ceil(self.retry_after_s))
            return {"retry-after": str(seconds), "x-should-retry": "true", **self.extra_headers}
        if self.status == 409 or self.status >= 500:
            return {"x-should-retry": "false", **self.extra_headers}
        return self.extra_headers

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """As Anthropic's clients read it."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {**self.body["error"], "type": kind}}

    def response(self) -> Response:
        return _ErrorResponse(self)


class _ErrorResponse(Response):
    """In the form of the API that was called."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(json_bytes(error.body), error.status, error.headers, media_type="application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not str(scope.get("path", "")).startswith(ANTHROPIC_PATH):
            return await super().__call__(scope, receive, send)
        body = json_bytes(self._error.anthropic_body)
        same = Response(body, self.status_code, self._error.headers, media_type="application/json")
        return await same(scope, receive, send)


class ClientGone(Exception):
    """The client hung up; no answer is needed."""


def internal_error(request_id: str) -> ApiError:
    """What a client may know of an internal error."""
    return ApiError(500, "internal_error", f"The server failed on this request (x-request-id {request_id}).")


def engine_dead() -> ApiError:
    return ApiError(503, "engine_dead", "The engine's thread has ended; the server must be restarted.")


def from_engine(error: RequestError) -> ApiError:
    """An engine's failure event as an answer. A full queue and a store that is away invite a retry: a damaged adapter
    stays damaged."""
    retry_after_s = 1.0 if error.status == 429 else error.retry_after_s
    return ApiError(error.status, error.code, error.message, retry_after_s=retry_after_s)


@singledispatch
def to_api_error(error: Exception) -> ApiError:
    """The answer to any error this module knows. Anything else is raised again: it is a bug."""
    raise error


@to_api_error.register
def _(error: ApiError) -> ApiError:
    return error


@to_api_error.register
def _(error: UserError) -> ApiError:
    """Its own status; one that is for operators alone is a fault of ours to a client."""
    if error.status == 500:
        raise error
    return ApiError(error.status, error.code, error.message, param=error.param, retry_after_s=error.retry_after_s)


@to_api_error.register
def _(error: RequestValidationError) -> ApiError:
    """Query and path parameters; bodies are checked in `json_body`."""
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return ApiError(400, "invalid_value", f"{param}: {first['msg']}, got {shown(first.get('input'))}", param=param)


@to_api_error.register
def _(error: HTTPException) -> ApiError:
    """Routing's own refusals: unknown path, wrong method."""
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    return ApiError(error.status_code, code, str(error.detail), headers=error.headers)


@to_api_error.register(ClientGone)
@to_api_error.register(ClientDisconnect)
def _(_error: Exception) -> ApiError:
    return ApiError(CLIENT_CLOSED_REQUEST, "client_closed_request", "The client closed the connection.")


async def _answer(_request: Request, error: Exception) -> Response:
    return to_api_error(error).response()


async def _answer_no_route(request: Request, error: Exception) -> Response:
    """Names method and path: they show a base URL with one `/v1` too many."""
    assert isinstance(error, HTTPException)
    answer = to_api_error(error)
    called = f"{request.method} {request.url.path}"[:_MAX_SHOWN]
    headers = error.headers
    return ApiError(answer.status, answer.code, f"{called}: {answer.message}", headers=headers).response()


def install(app: FastAPI) -> None:
    """Answer every known failure in OpenAI's shape. Unknown ones are `boundary`'s."""
    for known in to_api_error.registry:
        if known is not object:
            app.add_exception_handler(known, _answer_no_route if known is HTTPException else _answer)
