"""Routes whose answers are encoded on the thread that made them, so that a long list keeps nothing else waiting."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.responses import Response


class ThreadRoute(APIRoute):
    """FastAPI runs a plain function on a thread, but would encode its answer on the event loop."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        made = endpoint if iscoroutinefunction(endpoint) else _encoding(endpoint, options.get("status_code"))
        super().__init__(path, made, **options)


def _encoding(endpoint: Callable[..., Any], status: int | None) -> Callable[..., Response]:
    @wraps(endpoint)
    def made(*args: Any, **kwargs: Any) -> Response:
        answer = endpoint(*args, **kwargs)
        if isinstance(answer, Response):
            return answer
        return Response(json_in_pieces(answer), status or 200, media_type="application/json")

    return made


def json_in_pieces(answer: dict[str, Any]) -> bytes:
    """Compact JSON, null for what is no number. A list's items are encoded one by one: a call into C holds Python for
    all threads until it returns."""
    members = (_encoded(name) + b":" + _member(value) for name, value in answer.items())
    return b"{" + b",".join(members) + b"}"


def _member(value: Any) -> bytes:
    return b"[" + b",".join(map(_encoded, value)) + b"]" if isinstance(value, list) else _encoded(value)


def _encoded(value: Any) -> bytes:
    return to_json(value, inf_nan_mode="null")
