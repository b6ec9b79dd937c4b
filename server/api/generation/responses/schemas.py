"""What POST /v1/responses accepts, and the chat request that it means. Stateless: nothing is stored or looked up."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.generation.fields.structured_output import JsonSchemaFormat
from server.api.generation.fields.tools import Arguments, CallId, Description, ParametersSchema, ToolName
from server.api.generation.schemas import MAX_MESSAGES, ChatBody
from server.api.wire.body import Absent, Body, Empty, Metadata, Text, neutral
from server.api.wire.errors import ApiError
from server.api.wire.json_body import checked
from server.api.wire.model_field import Model

MAX_TEXT_PARTS = 4096
FIELDS = {  # of chats: as they are called here
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}


class _TextPart(Body):
    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Parts = Annotated[list[_TextPart], Field(max_length=MAX_TEXT_PARTS)]


class Item(Body):
    """One item of the input: a message, a call, its result, or reasoning. Items of an answer may come back as they are.

    id, status, phase, summary and encrypted_content are not read.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Parts | None = None
    call_id: CallId | None = None
    name: ToolName | None = None
    arguments: Arguments | None = None
    output: str | Parts | None = None
    id: Text | None = None
    status: Text | None = None
    phase: Text | None = None
    summary: Parts | None = None
    encrypted_content: str | None = None
    namespace: Absent = None
    parsed_arguments: Any = None


class FunctionTool(Body):
    """strict: as in a chat's tools."""

    type: Literal["function"]
    name: ToolName
    description: Description | None = None
    parameters: ParametersSchema | None = None
    strict: bool | None = None


class _NamedFunction(Body):
    type: Literal["function"]
    name: ToolName


class _TextFormat(Body):
    type: Literal["text"]


class _ObjectFormat(Body):
    type: Literal["json_object"]


class _SchemaFormat(JsonSchemaFormat):
    type: Literal["json_schema"]


class _TextField(Body):
    format: _TextFormat | _ObjectFormat | _SchemaFormat | None = None
    verbosity: Annotated[None, neutral("medium")] = None


class _StreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponsesBody(Body):
    """store: may be false or absent, which is the same here."""

    model: Model
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: _TextField | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    metadata: Metadata | None = None
    service_tier: Text | None = None
    store: Annotated[None, neutral(False)] = None
    background: Annotated[None, neutral(False)] = None
    truncation: Annotated[None, neutral("disabled")] = None
    include: Empty = None
    previous_response_id: Absent = None
    conversation: Absent = None
    prompt: Absent = None
    reasoning: Absent = None
    top_logprobs: Annotated[None, neutral(0)] = None
    max_tool_calls: Absent = None

    @property
    def format(self) -> dict[str, Any]:
        """The text's format as answers repeat it."""
        given = self.text.format if self.text else None
        return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_none=True)

    def chat(self) -> ChatBody:
        """The same as a chat. Raises ApiError 400."""
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("model", "temperature", "top_p", "stream", "user", "safety_identifier", "prompt_cache_key")
        }
        fields |= {
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "parallel_tool_calls": self.parallel_tool_calls,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": self._choice(),
            "response_format": self._response_format(),
        }
        return checked(ChatBody, {name: value for name, value in fields.items() if value is not None})

    def _choice(self) -> Any:
        if isinstance(self.tool_choice, _NamedFunction):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _response_format(self) -> dict[str, Any] | None:
        given = self.format
        if given["type"] != "json_schema":
            return given
        return {"type": "json_schema", "json_schema": {key: each for key, each in given.items() if key != "type"}}

    def _messages(self) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        return [*messages, *_turns(self.input)]


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _turns(items: list[Item]) -> list[dict[str, Any]]:
    """A call joins the assistant's message before it, as in a chat; reasoning joins the one after it."""
    turns: list[dict[str, Any]] = []
    thought = ""
    for index, item in enumerate(items):
        kind = item.type or "message"
        if kind == "reasoning":
            thought += _text(item.content)
        elif kind == "function_call":
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": ""})
            turns[-1].setdefault("tool_calls", []).append(_call(item, index))
        elif kind == "function_call_output":
            id_ = _given(item.call_id, index, "call_id")
            turns.append({"role": "tool", "tool_call_id": id_, "content": _text(_given(item.output, index, "output"))})
        else:
            role = _given(item.role, index, "role")
            turns.append({"role": role, "content": _text(_given(item.content, index, "content"))})
        if thought and turns and kind != "reasoning" and turns[-1]["role"] == "assistant":
            turns[-1].setdefault("reasoning_content", thought)
            thought = ""
    return turns


def _call(item: Item, index: int) -> dict[str, Any]:
    function = {
        "name": _given(item.name, index, "name"),
        "arguments": _given(item.arguments, index, "arguments"),
    }
    return {"id": _given(item.call_id, index, "call_id"), "type": "function", "function": function}


def _text(content: str | list[_TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _given(value: Any, index: int, field: str) -> Any:
    if value is None:
        param = f"input.{index}.{field}"
        raise ApiError(400, "missing_required_parameter", f"Missing required parameter: {param!r}.", param=param)
    return value
