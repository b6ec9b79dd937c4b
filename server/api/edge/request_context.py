"""What a request collects on its way: the fields of its log line, its id for other lines, headers of its answer.

Context variables hold it, because it belongs to a request in every frame, threads included. The outermost layer begins
and ends it outside of any route, so no dependency can carry it. Knows no log format.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

_fields: ContextVar[dict[str, Any] | None] = ContextVar("multilora_request", default=None)
_headers: ContextVar[dict[str, str] | None] = ContextVar("multilora_answer_headers", default=None)
_access = logging.getLogger("server.api.access")
_QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines


def begin(request_id: str) -> None:
    """A request begins in this context."""
    _fields.set({"request_id": request_id})


def note(**fields: Any) -> None:
    """Add fields to this request's log line; None is left out."""
    known = _fields.get()
    if known is not None:
        known.update((name, value) for name, value in fields.items() if value is not None)


def end(*, method: str, route: str, status: int, duration_s: float) -> None:
    """The request's line."""
    level = logging.DEBUG if route in _QUIET else logging.INFO
    if not _access.isEnabledFor(level):
        return
    fields = {"method": method, "route": route, "status": status, "ms": round(duration_s * 1000, 1)}
    note(**fields)
    known = _fields.get() or {}
    words = (f"{name}={value}" for name, value in known.items() if name not in fields and name != "request_id")
    message = f"{method} {route} {status} {fields['ms']} ms {' '.join(words)}".rstrip()
    _access.log(level, "%s", message, extra={"fields": known})


class RequestIdFilter(logging.Filter):
    """Puts `request_id` on every record: of the request that this context works for, else "-"."""

    def filter(self, record: logging.LogRecord) -> bool:
        known = _fields.get()
        record.request_id = "-" if known is None else known["request_id"]
        return True


def collect_headers() -> dict[str, str]:
    """For the outermost layer: a dict that `answer_with` fills until the answer begins."""
    headers: dict[str, str] = {}
    _headers.set(headers)
    return headers


def answer_with(headers: Mapping[str, str]) -> None:
    """Put these headers on the answer of the current request, success or failure."""
    collected = _headers.get()
    if collected is not None:
        collected.update(headers)
