"""Refusals of a chat's fields under the names that another API gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from server.api.wire.errors import ApiError, to_api_error
from server.engine.request import InvalidRequest


@contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """names: of chats' fields, as the client wrote them. Raises ApiError in place of what names a chat's field."""
    try:
        yield
    except (ApiError, InvalidRequest) as error:
        found = to_api_error(error)
        field, dot, rest = (found.param or "").partition(".")
        if field not in names:
            raise
        message = found.message.replace(field, names[field], 1)
        param = f"{names[field]}{dot}{rest}"
        raise ApiError(found.status, found.code, message, param=param, retry_after_s=found.retry_after_s) from error
