"""What both generation routes accept. A field is listed or refused; a listed field is honoured or must be neutral."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.wire.json_text import json_text
from server.engine.sampling_params import MAX_LOGIT_BIAS

MAX_USER_CHARS = 512
MAX_METADATA_ENTRIES = 16
MAX_STOP_TOKEN_IDS = 128


class Body(BaseModel):
    """Strict: no number from a string, no bool as an int, no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field_is_enough(cls, value: Any) -> Any:
        """A refusal names one field, so an object with a hundred thousand unknown ones makes one error, not as many."""
        if not isinstance(value, dict) or value.keys() <= cls.model_fields.keys():
            return value
        unknown = next(name for name in value if name not in cls.model_fields)
        return {**{name: value[name] for name in cls.model_fields if name in value}, unknown: value[unknown]}


class _Neutral:
    """Accepts the values under which a feature we lack changes nothing; refuses the others by the field's name."""

    def __init__(self, *values: Any) -> None:
        self.values = (None, *values)

    def __call__(self, value: Any) -> None:
        if value not in self.values:
            allowed = " or ".join(map(json_text, self.values))
            raise PydanticCustomError(
                "unsupported_parameter", "not supported here; leave it out or send {allowed}", {"allowed": allowed}
            )


def neutral(*values: Any) -> Any:
    return PlainValidator(_Neutral(*values), json_schema_input_type=Any)


Empty = Annotated[None, neutral([])]
Absent = Annotated[None, neutral()]


def _stop_strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(member, str) for member in value):
        return tuple(value)
    raise PydanticCustomError("invalid_type", "must be a string or a list of strings")


Stop = Annotated[tuple[str, ...], PlainValidator(_stop_strings, json_schema_input_type=str | list[str] | None)]


def at_most(limit: int) -> Any:
    """Counts an object's members before any is looked at: pydantic's own bound looks at all of them first."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            given = {"limit": limit, "count": len(value)}
            raise PydanticCustomError("too_many_entries", "takes at most {limit} entries, has {count}", given)
        return value

    return BeforeValidator(check)


Text = Annotated[str, Field(max_length=MAX_USER_CHARS)]
Metadata = Annotated[dict[Text, Text], Field(max_length=MAX_METADATA_ENTRIES), at_most(MAX_METADATA_ENTRIES)]


class StreamOptions(Body):
    """include_usage: one last chunk with the whole call's usage. continuous_usage_stats: usage so far on every chunk.
    include_obfuscation asks for padding against traffic analysis; the text is the same without, and we never pad."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(Body):
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
        """Who asks, as far as the client says it: OpenAI's older field, or one of those that took its place."""
        return self.user or self.safety_identifier or self.prompt_cache_key

    @property
    def num_choices(self) -> int:
        return self.n or 1
