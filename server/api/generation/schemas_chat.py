"""The body of POST /v1/chat/completions: text in, text out. What would need tools, images or grammars is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.generation.schemas import Absent, Body, Empty, GenerationBody, Text, at_most, neutral
from server.engine.sampling_params import MAX_LOGPROBS
from server.engine.text.chat_options import MAX_TEMPLATE_VARIABLES, TemplateValue

MAX_MESSAGES = 4096
MESSAGE_WEIGHT = 32  # of a template's step for one message, next to a character to tokenise
Role = Literal["system", "developer", "user", "assistant"]


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
        raise PydanticCustomError("invalid_value", "a text part has exactly the fields type and text")
    text: str = part["text"]
    return text


Content = Annotated[str, PlainValidator(_content_text, json_schema_input_type=str | list[dict[str, str]])]


class Message(Body):
    """One turn. `developer` is today's name of `system`. Fields of an answer of ours may come back as they went out.

    A client replays what its library made of an answer, with null for all that the library knows and the answer lacked:
    null is the same as absent, whatever the field. An assistant's turn may have no content.
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
    response_format: Annotated[None, neutral({"type": "text"})] = None
    tool_choice: Annotated[None, neutral("none", "auto")] = None
    tools: Empty = None
    verbosity: Annotated[None, neutral("medium")] = None
    web_search_options: Absent = None
