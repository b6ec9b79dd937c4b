"""The `model` of a request for text: one name, or several adapters with weights. Knows forms; knows no adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from adapters_store.packed.mix import MAX_PARTS, MAX_WEIGHT
from adapters_store.parsing.strict_json import shown
from server.api.wire.body import Body

Name = Annotated[str, Field(min_length=1, max_length=256)]


class WeightedName(Body):
    """One of several adapters. Its change of the base is multiplied by the weight."""

    name: Name
    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)] = 1.0

    def __str__(self) -> str:
        return f"{self.weight:g}*{self.name}"


def model_text(model: str | Sequence[WeightedName]) -> str:
    """As answers repeat it: "style", or "0.7*style + -0.3*law"."""
    return model if isinstance(model, str) else " + ".join(map(str, model))


def _each_once(parts: list[WeightedName]) -> list[WeightedName]:
    names = [part.name for part in parts]
    repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if repeated is not None:
        raise PydanticCustomError("invalid_value", "names {name} more than once", {"name": shown(repeated)})
    return parts


def _form(value: Any) -> str:
    return "several" if isinstance(value, list) else "one"


_Several = Annotated[
    list[WeightedName], Field(min_length=1, max_length=MAX_PARTS), AfterValidator(_each_once), Tag("several")
]
Model = Annotated[Annotated[Name, Tag("one")] | _Several, Discriminator(_form)]
