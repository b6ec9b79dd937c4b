"""The fields of chat requests for tools: definitions, choice, calls and results in the history. Knows no dialect."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from adapters_store.dialects.dialect import (
    MAX_CALL_ID_CHARS,
    MAX_DESCRIPTION_CHARS,
    MAX_SCHEMA_DEPTH,
    MAX_TOOLS_CHARS,
    TOOL_NAME,
    is_deeper,
)
from server.api.wire.body import Body

ToolName = Annotated[str, Field(pattern=TOOL_NAME)]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_CALL_ID_CHARS)]
Description = Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)]


def _of_objects(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type", "object") != "object":
        raise PydanticCustomError("invalid_value", "the schema of a tool's parameters must be of type object")
    if is_deeper(value, MAX_SCHEMA_DEPTH):
        raise PydanticCustomError("invalid_value", "must be nested {limit} deep at most", {"limit": MAX_SCHEMA_DEPTH})
    return value


ParametersSchema = Annotated[dict[str, Any], AfterValidator(_of_objects)]


def _object_text(arguments: str) -> str:
    """Clients replay a call without arguments as no text at all."""
    if not arguments.strip():
        return "{}"
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise PydanticCustomError("invalid_value", "must be a JSON object as text")
    return arguments


Arguments = Annotated[str, AfterValidator(_object_text)]


class Function(Body):
    """strict: arguments always follow the schema; if true, `uniqueItems` is refused and else it is a note."""

    name: ToolName
    description: Description | None = None
    parameters: ParametersSchema | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    @property
    def weight(self) -> int:
        """What it takes to render and tokenise, in characters."""
        return len(json.dumps(self.for_template()))

    def for_grammar(self) -> dict[str, Any]:
        """As grammars read it: with `strict`, which no template shows."""
        tool = self.for_template()
        return {**tool, "function": {**tool["function"], "strict": bool(self.function.strict)}}

    def for_template(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        if self.function.parameters is not None:
            function["parameters"] = self.function.parameters
        return {"type": "function", "function": function}


class _NamedFunction(Body):
    name: ToolName


class NamedTool(Body):
    type: Literal["function"]
    function: _NamedFunction


class FunctionCall(Body):
    name: ToolName
    arguments: Arguments


class ToolCall(Body):
    """A call in the history, as this server or another wrote it."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # some clients keep it from a stream

    def for_template(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function.model_dump()}


def checked_tools(tools: list[Tool]) -> list[Tool]:
    """Raises PydanticCustomError for duplicate names, or for more text than one grammar may have."""
    seen: set[str] = set()
    for tool in tools:
        if tool.function.name in seen:
            raise PydanticCustomError("invalid_value", "duplicate name {name}", {"name": tool.function.name})
        seen.add(tool.function.name)
    size = sum(tool.weight for tool in tools)
    if size > MAX_TOOLS_CHARS:
        limits = {"limit": MAX_TOOLS_CHARS, "size": size}
        raise PydanticCustomError("invalid_value", "must have at most {limit} characters as JSON, has {size}", limits)
    return tools
