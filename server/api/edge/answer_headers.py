"""Headers that a call's answer carries whatever it turns out to be. Knows no route and no header."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

_headers: ContextVar[dict[str, str] | None] = ContextVar("multilora_answer_headers", default=None)


def collect_headers() -> dict[str, str]:
    """For the outermost layer: the headers that this call will have asked for by the time it is answered."""
    headers: dict[str, str] = {}
    _headers.set(headers)
    return headers


def answer_with(headers: Mapping[str, str]) -> None:
    """From anywhere inside the call: put these on its answer, success or failure."""
    collected = _headers.get()
    if collected is not None:
        collected.update(headers)
