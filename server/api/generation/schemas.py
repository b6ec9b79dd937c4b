"""What the generation routes accept. A field is listed or refused; a listed field is honoured or must be neutral."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from adapters_store.dialects.dialect import MAX_CALLS, MAX_TOOLS
from server.api.generation.fields.structured_output import StructuredFields
from server.api.generation.fields.tools import CallId, NamedTool, Tool, ToolCall, checked_tools
from server.api.wire.body import Absent, Body, Empty, Metadata, Text, at_most, neutral
from server.api.wire.model_field import Model
from server.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS
from server.engine.text.chat_options import MAX_TEMPLATE_VARIABLES, TemplateValue

MAX_STOP_TOKEN_IDS = 128
MAX_MESSAGES = 4096
MAX_REASONING_BUDGET = 1 << 20
MESSAGE_WEIGHT = 32  # of a template's step for one message, next to a character to tokenise

Role = Literal["system", "developer", "user", "assistant", "tool"]
Prompt = str | tuple[int, ...]


def _stop_strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(member, str) for member in value):
        return tuple(value)
    raise PydanticCustomError("invalid_type", "must be a string or a list of strings")


Stop = Annotated[tuple[str, ...], PlainValidator(_stop_strings, json_schema_input_type=str | list[str] | None)]


class StreamOptions(Body):
    """include_usage: one last chunk with the whole call's usage. continuous_usage_stats: usage so far on every chunk.
    include_obfuscation asks for padding against traffic analysis; the text is the same without, and we never pad."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(StructuredFields):
    """Fields that completions and chat share. None is the default; ranges are SamplingParams' business."""

    model: Model
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS), at_most(MAX_LOGIT_BIAS)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    user: Text | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None

    @property
    def sticky(self) -> str | None:
        """The end user's name, if the client sends one: OpenAI's older field, or one of its replacements."""
        return self.user or self.safety_identifier or self.prompt_cache_key

    @property
    def num_choices(self) -> int:
        return self.n or 1


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("invalid_type", "must be a string, a list of token ids, or a list of either")
    if type(value[0]) is int:
        return (_token_ids(value),)
    return tuple(member if isinstance(member, str) else _token_ids(member) for member in value)


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise PydanticCustomError("invalid_type", "a prompt must be a string or a list of integers")
    return tuple(value)


Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionBody(GenerationBody):
    """OpenAI's completions request, and the usual fields beyond. best_of is accepted if it changes nothing."""

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool | None = None
    suffix: Absent = None


def _content_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return "".join(map(_part_text, value))
    raise PydanticCustomError("invalid_type", "must be a string or a list of text parts")


def _part_text(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise PydanticCustomError("invalid_type", "a content part must be an object with a type")
    if part["type"] != "text":
        kind = part["type"][:40]
        raise PydanticCustomError("unsupported_value", "content parts of type {kind} are not supported", {"kind": kind})
    given = {name for name, value in part.items() if value is not None}
    if not isinstance(part.get("text"), str) or given != {"type", "text"}:
        raise PydanticCustomError("invalid_value", "a text part must have exactly the fields type and text")
    text: str = part["text"]
    return text


Content = Annotated[str, PlainValidator(_content_text, json_schema_input_type=str | list[dict[str, str]])]


class Message(Body):
    """One turn. `developer` is today's name of `system`. Fields of this server's answers may come back unchanged.

    Client libraries replay an answer with null for every field that they know and that the answer lacked. So null is
    the same as absent, in every field. An assistant's turn may have no content. tool_calls and reasoning_content are an
    assistant's; tool_call_id names the call whose result a turn of role tool brings.
    """

    role: Role
    content: Content
    name: Text | None = None
    refusal: Absent = None
    annotations: Empty = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: CallId | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        given = {name: value for name, value in turn.items() if value is not None or name in ("role", "content")}
        if given.get("role") == "assistant" and given.get("content") is None:
            given["content"] = ""
        return given

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> Message:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            field = "tool_calls" if self.tool_calls else "reasoning_content"
            raise PydanticCustomError("invalid_value", "{field} is allowed only with role assistant", {"field": field})
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise PydanticCustomError("invalid_value", "tool_call_id is needed with role tool, and allowed only there")
        return self

    @property
    def num_chars(self) -> int:
        """Of all that a template may show."""
        calls = sum(len(call.function.name) + len(call.function.arguments) for call in self.tool_calls or ())
        return len(self.content) + len(self.reasoning_content or "") + calls

    @property
    def weight(self) -> int:
        """What it takes to render and tokenise, in characters."""
        return self.num_chars + len(self.name or "") + MESSAGE_WEIGHT

    def for_template(self) -> dict[str, Any]:
        fields = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        given = {name: value for name, value in fields.items() if value is not None}
        calls = {"tool_calls": [call.for_template() for call in self.tool_calls]} if self.tool_calls else {}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content, **given, **calls}


TemplateVariables = Annotated[
    dict[str, TemplateValue], Field(max_length=MAX_TEMPLATE_VARIABLES), at_most(MAX_TEMPLATE_VARIABLES)
]


ReasoningBudget = Annotated[int, Field(ge=0, le=MAX_REASONING_BUDGET)] | None


class ChatBody(GenerationBody):
    """OpenAI's chat request, and the usual fields beyond. thinking_token_budget is vLLM's name of reasoning_budget."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    parallel_tool_calls: bool | None = None
    audio: Absent = None
    function_call: Annotated[None, neutral("none", "auto")] = None
    functions: Empty = None
    modalities: Annotated[None, neutral(["text"])] = None
    prediction: Absent = None
    reasoning_effort: Annotated[None, neutral("none")] = None
    reasoning_budget: ReasoningBudget = None
    thinking_token_budget: ReasoningBudget = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(checked_tools)] | None = None
    verbosity: Annotated[None, neutral("medium")] = None
    web_search_options: Absent = None
