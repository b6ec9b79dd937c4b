"""The JSON Schema that a call's arguments follow: the tool's own, as its author means it. Knows no grammar.

Tools come from many programs, and their schemas are loose where OpenAI's strict calls are not. Clients leave
`additionalProperties` out and mean that there are none: taken by the letter, a weak model would add fields until its
answer is cut. They write null for a keyword that they do not use, formats of their own (`password`, `byte`), which are
notes in JSON Schema, and require arguments that they do not describe. `uniqueItems: true`, which pydantic writes for a
set, is a note too, because no grammar can hold to it, unless the tool is `strict`: then the compiler refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters_store.parsing.json_schema import Schema, mapped, schemas_in, without_idle_keywords

NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_SAYS_MORE = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_COMBINES = ("allOf", "anyOf", "oneOf", "$ref", "if")
_MAY_BE_NULL = ("default", "const")
# Source: JSON Schema 2020-12, validation, section 7.3.
_FORMATS = {
    "date", "date-time", "duration", "email", "hostname", "idn-email", "idn-hostname", "ipv4", "ipv6", "iri",
    "iri-reference", "json-pointer", "regex", "relative-json-pointer", "time", "uri", "uri-reference", "uri-template",
    "uuid",
}  # fmt: skip


def arguments_schema(function: Mapping[str, Any]) -> Schema:
    """Of a tool's `function`. An object that lists its properties and says nothing of others has no others, unless some
    object of the schema is described in several places: closed, one of these would forbid what another one asks."""
    schema = function.get("parameters")
    if not schema:
        return dict(NO_ARGUMENTS)
    meant = mapped(schema, _as_meant)
    if not function.get("strict"):
        meant = mapped(meant, _without_notes)
    whole = {**without_idle_keywords(meant), "type": "object"}
    if any(_is_combined(each) for each in schemas_in(whole)):
        return whole
    closed: Schema = mapped(whole, _closed)
    return closed


def _as_meant(schema: Schema) -> Schema:
    """Without keywords that are null, and without formats that JSON Schema does not define."""
    given = {word: value for word, value in schema.items() if value is not None or word in _MAY_BE_NULL}
    if isinstance(given.get("format"), str) and given["format"] not in _FORMATS:
        del given["format"]
    return given


def _without_notes(schema: Schema) -> Schema:
    return {word: value for word, value in schema.items() if word != "uniqueItems" or value is not True}


def _is_combined(schema: Schema) -> bool:
    parts = schema.get("allOf")
    is_beside = "properties" in schema and any(word in schema for word in _COMBINES)
    return is_beside or (isinstance(parts, list) and len(parts) > 1)


def _closed(schema: Schema) -> Schema:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or any(word in schema for word in _SAYS_MORE):
        return schema
    asked = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    listed = properties | {name: {} for name in asked if name not in properties}
    return {**schema, "properties": listed, "additionalProperties": False}
