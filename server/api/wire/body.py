"""What every JSON body is made of: strict models, and the types that several of them share. Knows no route."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.wire.json_text import json_text

MAX_USER_CHARS = 512
MAX_METADATA_ENTRIES = 16


class Body(BaseModel):
    """Strict: no number from a string, no bool as an int, no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field_is_enough(cls, value: Any) -> Any:
        """A refusal names one field, so an object with a hundred thousand unknown ones makes one error, not as many."""
        if not isinstance(value, dict) or value.keys() <= cls.model_fields.keys():
            return value
        names = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = next((name for name in value if name not in names), None)
        if unknown is None:
            return value
        return {**{name: value[name] for name in names if name in value}, unknown: value[unknown]}


def neutral(*values: Any) -> Any:
    """Accepts the values under which a feature we lack changes nothing; refuses the others by the field's name."""
    allowed = (None, *values)

    def check(value: Any) -> None:
        if value not in allowed:
            given = {"allowed": " or ".join(map(json_text, allowed))}
            raise PydanticCustomError("unsupported_parameter", "not supported; leave it out or send {allowed}", given)

    return PlainValidator(check, json_schema_input_type=Any)


Empty = Annotated[None, neutral([])]
Absent = Annotated[None, neutral()]


def at_most(limit: int) -> Any:
    """Counts an object's members before any is looked at: pydantic's own bound looks at all of them first."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            given = {"limit": limit, "count": len(value)}
            raise PydanticCustomError("too_many_entries", "must have at most {limit} entries, has {count}", given)
        return value

    return BeforeValidator(check)


Text = Annotated[str, Field(max_length=MAX_USER_CHARS)]
Metadata = Annotated[dict[Text, Text], Field(max_length=MAX_METADATA_ENTRIES), at_most(MAX_METADATA_ENTRIES)]
