"""The JSON Schema that a call's arguments follow: the tool's own, with its objects closed. Knows no grammar.

Clients leave `additionalProperties` out and mean that there are none, as OpenAI's strict calls do. Taken by the letter,
a weak model would add fields until its answer is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_ALONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_SAYS_MORE = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_COMBINES = ("allOf", "anyOf", "oneOf", "$ref", "if")
Schema = dict[str, Any]


def arguments_schema(function: Mapping[str, Any]) -> Schema:
    """Of a tool's `function`. An object that lists its properties and says nothing of others has no others, unless some
    object of the schema is described in several places: closed, one of these would forbid what another one asks."""
    schema = function.get("parameters")
    if not schema:
        return dict(NO_ARGUMENTS)
    whole = {**schema, "type": "object"}
    return whole if any(_is_combined(each) for each in _schemas_in(whole)) else _closed(whole)


def _is_combined(schema: Schema) -> bool:
    parts = schema.get("allOf")
    is_beside = "properties" in schema and any(word in schema for word in _COMBINES)
    return is_beside or (isinstance(parts, list) and len(parts) > 1)


def _schemas_in(schema: Any) -> Iterator[Schema]:
    """The schema and all that it holds."""
    if not isinstance(schema, dict):
        return
    yield schema
    for word in _BY_NAME:
        if isinstance(schema.get(word), dict):
            for member in schema[word].values():
                yield from _schemas_in(member)
    for word in _IN_LISTS:
        if isinstance(schema.get(word), list):
            for member in schema[word]:
                yield from _schemas_in(member)
    for word in _ALONE:
        yield from _schemas_in(schema.get(word))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made: Schema = dict(schema)
    for word, value in schema.items():
        if word in _BY_NAME and isinstance(value, dict):
            made[word] = {name: _closed(member) for name, member in value.items()}
        elif word in _IN_LISTS and isinstance(value, list):
            made[word] = [_closed(member) for member in value]
        elif word in _ALONE:
            made[word] = _closed(value)
    if isinstance(schema.get("properties"), dict) and not any(word in schema for word in _SAYS_MORE):
        made["additionalProperties"] = False
    return made
