"""Parses a JSON body into a schema, and words its errors as OpenAI does. Knows no request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.api.wire.errors import ApiError
from server.api.wire.json_text import MalformedJson, parse_json

M = TypeVar("M", bound=BaseModel)

_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
_OWN_CODES = frozenset({"unsupported_parameter", "unsupported_value", "invalid_type", "invalid_value"})
_MAX_SHOWN = 80


def parse_body(model: type[M], body: bytes) -> M:
    """The body as `model`. Raises ApiError 400 with the field, its value and the limit."""
    try:
        value = parse_json(body)
    except MalformedJson as error:
        raise ApiError(400, "invalid_json", f"{error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_type", f"the body must be a JSON object, got {_shown(value)}")
    return checked(model, value)


def checked(model: type[M], value: dict[str, Any]) -> M:
    """Raises ApiError 400 with the field, its value and the limit."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(error, value) from None


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The body's schema for OpenAPI."""
    content = {"application/json": {"schema": model.model_json_schema(mode="validation")}}
    return {"requestBody": {"required": True, "content": content}}


def _refusal(error: ValidationError, body: dict[str, Any]) -> ApiError:
    """Of the first problem. A field that may have several forms has one problem or more for each: the one deepest in
    the body belongs to the form that the client meant."""
    problems = [(_fields(body, each["loc"], each["type"]), each) for each in error.errors(include_url=False)]
    first, _ = problems[0]
    same_field = [each for each in problems if each[0][: len(first)] == first]
    fields, problem = max(same_field, key=lambda each: len(each[0]))
    num_more = sum(fields[: len(other)] != other for other, _ in problems)
    param = ".".join(str(part)[:_MAX_SHOWN] for part in fields) or None
    more = f" (and {num_more} more)" if num_more else ""
    return ApiError(400, _code(problem["type"]), f"{_sentence(problem, param)}{more}", param=param)


def _fields(value: Any, loc: Sequence[int | str], kind: str) -> tuple[int | str, ...]:
    """The parts of `loc` that are fields and places in the body; pydantic names the forms of a field among them."""
    if not loc:
        return ()
    part, rest = loc[0], loc[1:]
    if kind == "missing" and not rest and isinstance(value, dict):
        return (part,)
    passed_over = _fields(value, rest, kind)
    is_inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
    return max(passed_over, (part, *_fields(value[part], rest, kind)), key=len) if is_inside else passed_over


def _code(kind: str) -> str:
    if kind in _OWN_CODES:
        return kind
    return _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")


def _sentence(problem: ErrorDetails, param: str | None) -> str:
    if problem["type"] == "extra_forbidden":
        return f"Unknown parameter: {param!r}."
    if problem["type"] == "missing":
        return f"Missing required parameter: {param!r}."
    return f"{param or 'the body'}: {problem['msg']}, got {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    """A value short enough to repeat. A long list or text is described, never rendered whole."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value[:_MAX_SHOWN]) if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_SHOWN + 2 else f"{text[:_MAX_SHOWN]}..."
