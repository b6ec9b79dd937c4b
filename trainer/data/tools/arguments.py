"""A call's arguments against its tool's JSON Schema, as far as that needs no patterns. Knows no line.

Types, required and unknown fields, and choices are checked here; all else by the gate, whose grammar is the server's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.problems import LineRefused, excerpt_of

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int, float),
    "number": (int, float),
}


def in_schema_order(value: Any, schema: object, where: str) -> Any:
    """The value with each object's keys in the schema's order: the server's grammar allows no other.

    Raises LineRefused("bad_tool_call") for what the schema does not allow.
    """
    if not isinstance(schema, Mapping):
        return value
    _check_type(value, schema, where)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and value not in choices:
        raise _refused(where, f"one of {', '.join(map(excerpt_of, choices[:8]))}", value)
    if isinstance(value, dict):
        return _object(value, schema, where)
    if isinstance(value, list):
        return [in_schema_order(each, schema.get("items"), f"{where}[{at}]") for at, each in enumerate(value)]
    return value


def _object(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    properties, required = schema.get("properties"), schema.get("required")
    known: Mapping[str, object] = properties if isinstance(properties, Mapping) else {}
    for name in required if isinstance(required, list) else ():
        if name not in value:
            raise LineRefused("bad_tool_call", f"{where}: {excerpt_of(name)} is required", param=where)
    others = [name for name in value if name not in known]
    if others and schema.get("additionalProperties") is False:
        names = ", ".join(map(excerpt_of, known)) or "none"
        message = f"{where}: unknown argument {excerpt_of(others[0])}; known: {names}"
        raise LineRefused("bad_tool_call", message, param=where)
    return {
        name: in_schema_order(value[name], known.get(name), f"{where}.{name}")
        for name in (*(name for name in known if name in value), *others)
    }


def _check_type(value: Any, schema: Mapping[str, Any], where: str) -> None:
    given = schema.get("type")
    names = [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]
    if names and not any(_is_of(value, name) for name in names):
        raise _refused(where, f"of type {' or '.join(names)}", value)


def _is_of(value: object, name: str) -> bool:
    if name not in _TYPES:
        return True
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, float) and name == "integer":
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _refused(where: str, wanted: str, value: object) -> LineRefused:
    return LineRefused("bad_tool_call", f"{where} must be {wanted}, got {excerpt_of(value)}", param=where)
