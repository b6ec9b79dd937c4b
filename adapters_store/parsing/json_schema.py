"""JSON Schemas as values: every schema within one, and what is written in one without effect. Knows no grammar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Schema = dict[str, Any]

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_ALONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {  # values with which a keyword forbids nothing
    "uniqueItems": (False,),
    "propertyNames": (True, {"type": "string"}),  # zod writes it for each record
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "not": (False,),
}


def schemas_in(schema: Any) -> Iterator[Schema]:
    """The schema and all that it holds."""
    if not isinstance(schema, dict):
        return
    yield schema
    for word in _BY_NAME:
        if isinstance(schema.get(word), dict):
            for member in schema[word].values():
                yield from schemas_in(member)
    for word in _IN_LISTS:
        if isinstance(schema.get(word), list):
            for member in schema[word]:
                yield from schemas_in(member)
    for word in _ALONE:
        yield from schemas_in(schema.get(word))


def mapped(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """The schema with each schema in it changed, inner ones first. What is no object is no schema, and stays."""
    if not isinstance(schema, dict):
        return schema
    made: Schema = dict(schema)
    for word, value in schema.items():
        if word in _BY_NAME and isinstance(value, dict):
            made[word] = {name: mapped(member, change) for name, member in value.items()}
        elif word in _IN_LISTS and isinstance(value, list):
            made[word] = [mapped(member, change) for member in value]
        elif word in _ALONE:
            made[word] = mapped(value, change)
    return change(made)


def without_idle_keywords(schema: Any) -> Any:
    """The same schema without keywords that forbid nothing: a compiler that lacks them need not refuse them."""
    return mapped(schema, _without_idle)


def _without_idle(schema: Schema) -> Schema:
    return {word: value for word, value in schema.items() if not _is_idle(word, value)}


def _is_idle(word: str, value: Any) -> bool:
    return any(type(value) is type(idle) and value == idle for idle in _WITHOUT_EFFECT.get(word, ()))
