"""One line for each answer, and the request's id on every line that is written on its behalf. Knows no format.

What is known of a request gathers in a context variable, because it belongs to the call from its first to its last
frame, threads included, and the layers between need not carry it.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

_fields: ContextVar[dict[str, Any] | None] = ContextVar("multilora_request", default=None)
_access = logging.getLogger("server.api.access")
_QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines


def begin(request_id: str) -> None:
    """A request begins in this context."""
    _fields.set({"request_id": request_id})


def note(**fields: Any) -> None:
    """Something to say of this request in its line; None is left out."""
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
