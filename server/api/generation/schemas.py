"""What the generation routes accept. A field is listed or refused; a listed field is honoured or must be neutral."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.generation.fields.structured_output import StructuredFields
from server.api.wire.body import Absent, Body, Empty, Metadata, Text, at_most, neutral
from server.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS
from server.engine.text.chat_options import MAX_TEMPLATE_VARIABLES, TemplateValue

MAX_STOP_TOKEN_IDS = 128
MAX_MESSAGES = 4096
MESSAGE_WEIGHT = 32  # of a template's step for one message, next to a character to tokenise

Role = Literal["system", "developer", "user", "assistant"]
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

    model: Annotated[str, Field(min_length=1, max_length=256)]
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


class CompletionBody(GenerationBody):
    """OpenAI's completions request, and the usual fields beyond. best_of is accepted if it changes nothing."""

    prompt: Annotated[
        tuple[Prompt, ...],
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
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
    the same as absent, in every field. An assistant's turn may have no content.
    """

    role: Role
    content: Content
    name: Text | None = None
    refusal: Absent = None
    annotations: Empty = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: Empty = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        given = {name: value for name, value in turn.items() if value is not None or name in ("role", "content")}
        if given.get("role") == "assistant" and given.get("content") is None:
            given["content"] = ""
        return given

    @property
    def weight(self) -> int:
        """What it takes to render and tokenise, in characters."""
        return len(self.content) + len(self.name or "") + MESSAGE_WEIGHT

    def for_template(self) -> dict[str, str]:
        named = {"name": self.name} if self.name is not None else {}
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content, **named}


TemplateVariables = Annotated[
    dict[str, TemplateValue], Field(max_length=MAX_TEMPLATE_VARIABLES), at_most(MAX_TEMPLATE_VARIABLES)
]


class ChatBody(GenerationBody):
    """OpenAI's chat request, and the usual fields beyond."""

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
    tool_choice: Annotated[None, neutral("none", "auto")] = None
    tools: Empty = None
    verbosity: Annotated[None, neutral("medium")] = None
    web_search_options: Absent = None
