"""The FastAPI dependency that reads a request's JSON body. Decides what is read on the event loop and what is not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from adapters_store.parsing.strict_json import shown
from server.api.auth import CallerDep
from server.api.context import ContextDep
from server.api.wire.errors import ApiError
from server.api.wire.json_body import parse_body
from server.api.wire.json_text import WHOLE_BYTES

M = TypeVar("M", bound=BaseModel)

SMALL_BYTES = 1 << 20  # of bodies that hold settings; the largest is a job with a pattern for each module


def is_json(request: Request) -> bool:
    """By its Content-Type."""
    return _media_type(request) == "application/json"


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_body(model: type[M], *, max_bytes: int | None = SMALL_BYTES) -> Callable[..., Awaitable[M]]:
    """A dependency that yields the body as `model`. max_bytes None: what the server allows for all bodies.

    Raises ApiError 400, 413, or 415 for another content type. A long body is read and checked off the event loop.
    """

    async def read(request: Request, caller: CallerDep, context: ContextDep) -> M:
        if not is_json(request):
            media_type = _media_type(request)
            message = f"Content-Type must be application/json, got {shown(media_type)}"
            raise ApiError(415, "unsupported_media_type", message)
        body = await request.body() if max_bytes is None else await _read(request, max_bytes)
        if len(body) <= WHOLE_BYTES:
            return parse_body(model, body)
        return await context.heavy.run(caller.tenant, lambda: parse_body(model, body))

    return read


async def _read(request: Request, max_bytes: int) -> bytes:
    """A path that takes uploads lets larger bodies in: they are not kept up to their end."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(413, "too_large", f"the body must have at most {max_bytes} bytes, got {len(body)} or more")
    return bytes(body)
