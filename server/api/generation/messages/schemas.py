"""What POST /v1/messages accepts, as Anthropic's clients send it, and the chat request that it means."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.generation.fields.tools import CallId, Description, ParametersSchema, ToolName
from server.api.generation.schemas import MAX_MESSAGES, ChatBody
from server.api.wire.body import Absent, Body, Empty, Text, neutral
from server.api.wire.errors import ApiError
from server.api.wire.json_body import checked
from server.api.wire.model_field import Model

MAX_BLOCKS = 4096
FIELDS = {  # of chats: as they are called here
    "max_completion_tokens": "max_tokens",
    "reasoning_budget": "thinking.budget_tokens",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}


class _Cached(Body):
    """cache_control is accepted: prompts are cached without it."""

    cache_control: dict[str, Any] | None = None


class _TextBlock(_Cached):
    type: Literal["text"]
    text: str
    citations: Empty = None


Texts = Annotated[list[_TextBlock], Field(max_length=MAX_BLOCKS)]


class _ToolUse(_Cached):
    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: dict[str, Any]
    caller: Any = None


class _ToolResult(_Cached):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: str | Texts | None = None
    is_error: bool | None = None


class _Thinking(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


Block = Annotated[_TextBlock | _ToolUse | _ToolResult | _Thinking, Field(discriminator="type")]
_REFUSED: dict[str, tuple[type[Body], ...]] = {"user": (_ToolUse, _Thinking), "assistant": (_ToolResult,)}


class MessageParam(Body):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=MAX_BLOCKS)]

    @model_validator(mode="after")
    def _blocks_fit_the_role(self) -> Self:
        blocks = [] if isinstance(self.content, str) else self.content
        refused = next((block for block in blocks if isinstance(block, _REFUSED[self.role])), None)
        if refused is not None:
            given = {"kind": refused.type, "role": self.role}
            raise PydanticCustomError("invalid_value", "{kind} is not allowed with role {role}", given)
        return self


class ToolParam(_Cached):
    type: Literal["custom"] | None = None
    name: ToolName
    description: Description | None = None
    input_schema: ParametersSchema
    strict: bool | None = None


class _ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class _Metadata(Body):
    user_id: Text | None = None


class _ThinkingSetting(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    display: Text | None = None

    def variables(self) -> dict[str, bool] | None:
        """The names that chat templates have for it. A template that reads neither always thinks, or never."""
        return {"enable_thinking": False, "thinking": False} if self.type == "disabled" else None


class _OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class _OutputConfig(Body):
    format: _OutputFormat | None = None
    effort: Absent = None


class PromptBody(_Cached):
    """What makes a prompt: all of a request to count its tokens."""

    model: Model
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Texts | None = None
    tools: list[ToolParam] | None = None
    tool_choice: _ToolChoice | None = None
    thinking: _ThinkingSetting | None = None
    output_config: _OutputConfig | None = None

    def chat(self) -> ChatBody:
        """The same as a chat. Raises ApiError 400."""
        fields = self._fields()
        return checked(ChatBody, {name: value for name, value in fields.items() if value is not None})

    def _fields(self) -> dict[str, Any]:
        choice = self.tool_choice
        is_single = choice is not None and choice.disable_parallel_tool_use
        return {
            "model": self.model,
            "messages": [*self._system(), *(turn for each in self.messages for turn in _turns(each))],
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": None if choice is None else _chat_choice(choice),
            "parallel_tool_calls": False if is_single else None,
            "reasoning_budget": None if self.thinking is None else self.thinking.budget_tokens,
            "chat_template_kwargs": self.thinking.variables() if self.thinking else None,
            "response_format": self._format(),
        }

    def _format(self) -> dict[str, Any] | None:
        given = self.output_config.format if self.output_config else None
        if given is None:
            return None
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given.schema_}}

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": _text(self.system)}] if self.system else []


class MessagesBody(PromptBody):
    """Anthropic's request."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    metadata: _Metadata | None = None
    service_tier: Annotated[None, neutral("auto", "standard_only")] = None
    container: Absent = None
    inference_geo: Absent = None

    def _fields(self) -> dict[str, Any]:
        return super()._fields() | {
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "user": None if self.metadata is None else self.metadata.user_id,
        }


def _turns(message: MessageParam) -> list[dict[str, Any]]:
    """Each result becomes a message of its own, before the user's text."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts = [block.text for block in message.content if isinstance(block, _TextBlock)]
    thoughts = [block.thinking for block in message.content if isinstance(block, _Thinking)]
    calls = [_call(block) for block in message.content if isinstance(block, _ToolUse)]
    results = [_result(block) for block in message.content if isinstance(block, _ToolResult)]
    turn: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
    turn |= {"tool_calls": calls} if calls else {}
    turn |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
    return [*results, *([turn] if texts or calls or thoughts or not results else [])]


def _call(block: _ToolUse) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _result(block: _ToolResult) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}


def _text(content: str | list[_TextBlock] | None) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content or ())


def _chat_tool(tool: ToolParam) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    function["strict"] = tool.strict
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _chat_choice(choice: _ToolChoice) -> Any:
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if choice.name is None:
        field = "tool_choice.name"
        raise ApiError(400, "missing_required_parameter", f"Missing required parameter: {field!r}.", param=field)
    return {"type": "function", "function": {"name": choice.name}}
