"""Tools and calls of one training line, in OpenAI's form, checked. Knows no template and no dialect.

Of a call's arguments, types, required and unknown fields, and choices are checked here, as far as that needs no
patterns; all else by the gate, whose grammar is the server's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from adapters_store.dialects.dialect import (
    MAX_CALL_ID_CHARS,
    MAX_CALLS,
    MAX_DESCRIPTION_CHARS,
    MAX_SCHEMA_DEPTH,
    MAX_TOOLS,
    MAX_TOOLS_CHARS,
    TOOL_NAME,
    is_deeper,
)
from adapters_store.dialects.parameters import arguments_schema
from adapters_store.parsing.strict_json import parse_strict_json
from trainer.data.problems import LineRefused, excerpt_of

_NAME = re.compile(TOOL_NAME)
_FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict"})
_MAX_OBJECTS = 8192
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int, float),
    "number": (int, float),
}


@dataclass(frozen=True, slots=True)
class Call:
    """arguments: a JSON object as text, spelled as the server's grammar spells it."""

    id: str
    name: str
    arguments: str

    def for_template(self) -> dict[str, Any]:
        """As the server gives it to templates."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Tools:
    """definitions: as the server gives them to templates. is_parallel: an answer may hold more than one call."""

    definitions: tuple[dict[str, Any], ...] = ()
    is_parallel: bool = True

    def schema_of(self, name: str) -> Mapping[str, object] | None:
        """Of a tool's arguments; None if there is no such tool."""
        found = next((each["function"] for each in self.definitions if each["function"]["name"] == name), None)
        return None if found is None else arguments_schema(found)


def tools_of(line: Mapping[str, object]) -> Tools:
    """From `tools` and `parallel_tool_calls` of a line. Raises LineRefused."""
    is_parallel = line.get("parallel_tool_calls", True)
    if not isinstance(is_parallel, bool):
        _wrong_type("parallel_tool_calls", "true or false", is_parallel)
    given = line.get("tools", [])
    if not isinstance(given, list):
        _wrong_type("tools", "a list", given)
    if len(given) > MAX_TOOLS:
        raise LineRefused("bad_tools", f"tools: at most {MAX_TOOLS} fit, got {len(given)}", param="tools")
    definitions = tuple(_definition(tool, f"tools[{index}]") for index, tool in enumerate(given))
    names = [each["function"]["name"] for each in definitions]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise LineRefused("bad_tools", f"tools: duplicate name {name}", param="tools")
    size = sum(len(json.dumps(each)) for each in definitions)
    if size > MAX_TOOLS_CHARS:
        message = f"tools: at most {MAX_TOOLS_CHARS} characters as JSON, got {size}"
        raise LineRefused("bad_tools", message, param="tools")
    return Tools(definitions, is_parallel)


def _definition(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        message = f'{where} must be an object with "type": "function" and "function"'
        raise LineRefused("bad_tools", message, excerpt=excerpt_of(tool), param=where)
    given = {key: value for key, value in tool["function"].items() if value is not None}
    unknown = next((key for key in given if key not in _FUNCTION_KEYS), None)
    if unknown is not None:
        known = ", ".join(sorted(_FUNCTION_KEYS))
        message = f"{where}.function: unknown key {excerpt_of(unknown)}; known: {known}"
        raise LineRefused("bad_tools", message, param=where)
    function: dict[str, Any] = {"name": _tool_name(given.get("name"), f"{where}.function.name")}
    if "description" in given:
        function["description"] = _description(given["description"], f"{where}.function.description")
    if "parameters" in given:
        function["parameters"] = _parameters(given["parameters"], f"{where}.function.parameters")
    return {"type": "function", "function": function}


def _tool_name(name: object, where: str) -> str:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        message = f"{where} must be 1 to 64 letters, digits, _ or -, got {excerpt_of(name)}"
        raise LineRefused("bad_tools", message, param=where)
    return name


def _description(text: object, where: str) -> str:
    if not isinstance(text, str) or len(text) > MAX_DESCRIPTION_CHARS:
        message = f"{where} must be a string of at most {MAX_DESCRIPTION_CHARS} characters"
        raise LineRefused("bad_tools", message, excerpt=excerpt_of(text), param=where)
    return text


def _parameters(schema: object, where: str) -> dict[str, Any]:
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        message = f"{where} must be a JSON Schema of type object, got {excerpt_of(schema)}"
        raise LineRefused("bad_tools", message, param=where)
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise LineRefused("bad_tools", f"{where} must be nested {MAX_SCHEMA_DEPTH} deep at most", param=where)
    return schema


def calls_of(given: object, where: str, tools: Tools) -> tuple[Call, ...]:
    """From `tool_calls` of an assistant's message. Raises LineRefused."""
    if not isinstance(given, list):
        _wrong_type(where, "a list", given)
    limit = MAX_CALLS if tools.is_parallel else 1
    if len(given) > limit:
        why = "" if tools.is_parallel else " with parallel_tool_calls false"
        raise LineRefused("bad_tool_call", f"{where}: at most {limit} fit{why}, got {len(given)}", param=where)
    calls = tuple(_call(call, f"{where}[{index}]", tools) for index, call in enumerate(given))
    if len({call.id for call in calls}) < len(calls):
        raise LineRefused("bad_tool_call", f"{where}: two calls have the same id", param=where)
    return calls


def _call(given: object, where: str, tools: Tools) -> Call:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(function, dict) or given.get("type", "function") != "function":
        message = f'{where} must be an object with "id", "type": "function" and "function"'
        raise LineRefused("bad_tool_call", message, excerpt=excerpt_of(given), param=where)
    name = function.get("name")
    schema = tools.schema_of(name) if isinstance(name, str) else None
    if schema is None:
        known = ", ".join(each["function"]["name"] for each in tools.definitions[:8]) or "the line has no tools"
        message = f"{where}.function.name is none of the line's tools: {excerpt_of(name)}; {known}"
        raise LineRefused("bad_tool_call", message, param=f"{where}.function.name")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    ordered = _in_schema_order(arguments, schema, f"{where}.function.arguments")
    return Call(call_id(given.get("id"), f"{where}.id"), str(name), json.dumps(ordered, ensure_ascii=False))


def _arguments(given: object, where: str) -> object:
    """OpenAI sends them as JSON text; files of other tools hold the object itself, or no text for no arguments."""
    if isinstance(given, dict):
        return given
    if isinstance(given, str) and not given.strip():
        return {}
    if not isinstance(given, str):
        _wrong_type(where, "a JSON object as text", given)

    def refused(code: str, message: str) -> LineRefused:
        return LineRefused("bad_tool_call", message, excerpt=excerpt_of(given), param=where)

    text = given.encode("utf-8", "surrogatepass")
    return parse_strict_json(text, what=where, max_objects=_MAX_OBJECTS, refused=refused, max_depth=MAX_SCHEMA_DEPTH)


def call_id(given: object, where: str) -> str:
    """Raises LineRefused."""
    if not isinstance(given, str) or not 1 <= len(given) <= MAX_CALL_ID_CHARS:
        message = f"{where} must be a string of 1 to {MAX_CALL_ID_CHARS} characters, got {excerpt_of(given)}"
        raise LineRefused("bad_tool_call", message, param=where)
    return given


def _wrong_type(where: str, wanted: str, got: object) -> NoReturn:
    raise LineRefused("wrong_type", f"{where} must be {wanted}, got {excerpt_of(got)}", param=where)


def _in_schema_order(value: Any, schema: object, where: str) -> Any:
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
        return [_in_schema_order(each, schema.get("items"), f"{where}[{at}]") for at, each in enumerate(value)]
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
        name: _in_schema_order(value[name], known.get(name), f"{where}.{name}")
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
