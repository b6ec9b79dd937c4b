"""Pages of long lists, as OpenAI has them: `limit` and `after`, answered with `has_more`. Knows no listed object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query

from server.api.wire.errors import ApiError

Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str | None, Query(max_length=256)]

DEFAULT_LIMIT = 100


def page(items: Sequence[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """The `limit` objects behind the one with id `after`. Raises ApiError 400 if there is no such id."""
    start = 0 if after is None else _position(items, after) + 1
    shown = items[start : start + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + limit < len(items),
    }


def _position(items: Sequence[dict[str, Any]], wanted: str) -> int:
    for index, item in enumerate(items):
        if item["id"] == wanted:
            return index
    raise ApiError(400, "invalid_value", f"after: there is no {wanted!r} in this list", param="after")
