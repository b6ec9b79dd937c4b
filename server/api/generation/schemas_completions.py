"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.api.generation.schemas import Absent, GenerationBody

Prompt = str | tuple[int, ...]


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
    """OpenAI's completions request, and the usual fields beyond. best_of is accepted where it changes nothing."""

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
