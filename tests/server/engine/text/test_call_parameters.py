"""A tool's parameters are closed where its author leaves it open whether there are more, and untouched elsewhere."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from adapters_store.dialects.catalog import DIALECTS
from adapters_store.dialects.parameters import arguments_schema
from server.engine.text.call_grammar import CallsPart, answer_grammar
from support.models import real_tokenizers as real
from support.models.call_walks import Walker

PLACE: dict[str, Any] = {"type": "object", "properties": {"lat": {"type": "number"}}}
OPEN: dict[str, Any] = {
    "type": "object",
    "properties": {
        "properties": {"type": "string", "enum": ["a"], "default": {"properties": {}}},
        "place": PLACE,
        "places": {"type": "array", "items": PLACE},
        "maybe": {"anyOf": [PLACE, {"type": "null"}]},
        "named": {"$ref": "#/$defs/named"},
        "tags": {"type": "object"},
        "counts": {"type": "object", "properties": {"n": {}}, "additionalProperties": {"type": "integer"}},
    },
    "$defs": {"named": PLACE},
}


@pytest.fixture(scope="module")
def walker() -> Walker:
    return Walker(real.demo(), "<|end_of_turn|>")


def accepts(walker: Walker, parameters: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Whether the grammar allows a call with these arguments."""
    dialect = DIALECTS["json"]
    tools = [{"type": "function", "function": {"name": "t", "parameters": parameters}}]
    lark = answer_grammar({}, calls=CallsPart(dialect=dialect, tools=tools, choice="required"))
    answer = dialect.written([("t", json.dumps(arguments))])
    matcher = walker.matcher(lark)
    return bool(matcher.consume_tokens(walker.tokenizer.encode(answer, add_special_tokens=False))) and bool(
        matcher.is_accepting()
    )


def test_objects_that_list_their_properties_have_no_others(walker: Walker) -> None:
    schema = arguments_schema({"name": "t", "parameters": OPEN})
    fine = {"place": {"lat": 1.5}, "places": [{"lat": 2}], "maybe": None, "named": {}, "tags": {"x": 1}}
    fine |= {"counts": {"m": 2}}
    jsonschema.validate(fine, schema)
    assert accepts(walker, OPEN, fine)
    for place in ("", "place", "places", "maybe", "named"):
        more: dict[str, Any] = {place: [{"x": 1}] if place == "places" else {"x": 1}} if place else {"x": 1}
        assert jsonschema.Draft202012Validator(OPEN).is_valid(more), "the author's own schema leaves it open"
        assert not jsonschema.Draft202012Validator(schema).is_valid(more), place
        assert not accepts(walker, OPEN, more), place


def test_what_the_author_says_of_others_stays_and_values_are_not_schemas() -> None:
    schema = arguments_schema({"name": "t", "parameters": OPEN})
    assert schema["properties"]["properties"] == OPEN["properties"]["properties"]
    assert schema["properties"]["counts"] == OPEN["properties"]["counts"]
    assert schema["properties"]["tags"] == {"type": "object"}
    says_so = {**OPEN, "additionalProperties": True}
    assert arguments_schema({"name": "t", "parameters": says_so})["additionalProperties"] is True


@pytest.mark.parametrize(
    "combined",
    [
        {"allOf": [PLACE, {"type": "object", "properties": {"lon": {"type": "number"}}}]},
        {**PLACE, "anyOf": [{"required": ["lat"]}, {"required": ["lon"]}]},
        {"properties": {"place": {**PLACE, "$ref": "#/$defs/more"}}, "$defs": {"more": PLACE}},
    ],
)
def test_an_object_that_is_described_in_several_places_stays_open(combined: dict[str, Any]) -> None:
    assert arguments_schema({"name": "t", "parameters": combined}) == {**combined, "type": "object"}


def test_a_tool_without_parameters_takes_no_arguments(walker: Walker) -> None:
    assert arguments_schema({"name": "t"}) == arguments_schema({"name": "t", "parameters": {}})
    assert accepts(walker, {}, {})
    assert not accepts(walker, {}, {"x": 1})


LOOSE: dict[str, dict[str, Any]] = {  # as tools are described by programs that no strict reader has checked
    "formats of their own": {"a": {"type": "string", "format": "password"}, "b": {"type": "number", "format": "float"}},
    "null for what is not used": {"a": {"type": "string", "enum": None, "format": None, "items": None}},
    "names that may be any": {"a": {"type": "object", "propertyNames": {"type": "string"}}},
    "items that may repeat": {"a": {"type": "array", "items": {"type": "string"}, "uniqueItems": False}},
    "sets": {"a": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}},
    "notes": {"a": {"type": "string", "optional": True, "example": "x", "nullable": False, "required": True}},
}
VALUES: dict[str, dict[str, Any]] = {
    "formats of their own": {"a": "x", "b": 1.5},
    "names that may be any": {"a": {"x": 1}},
    "items that may repeat": {"a": ["x", "x"]},
    "sets": {"a": ["x", "x"]},
}


@pytest.mark.parametrize("name", LOOSE)
def test_what_tools_say_without_effect_refuses_no_tool(walker: Walker, name: str) -> None:
    parameters = {"type": "object", "properties": LOOSE[name], "required": None if "null" in name else ["a"]}
    fine = VALUES.get(name, {"a": "x"})
    assert accepts(walker, parameters, fine)
    assert not accepts(walker, parameters, {**fine, "more": 1})


def test_a_default_or_constant_null_is_a_value_and_formats_of_the_standard_hold(walker: Walker) -> None:
    parameters = {"type": "object", "properties": {"a": {"const": None}, "b": {"type": "string", "format": "date"}}}
    assert accepts(walker, parameters, {"a": None, "b": "2026-11-30"})
    assert not accepts(walker, parameters, {"a": 1})
    assert not accepts(walker, parameters, {"b": "x"})


def test_an_argument_that_is_required_and_not_described_may_be_anything(walker: Walker) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["b"]}
    assert accepts(walker, parameters, {"a": "x", "b": [1]})
    assert not accepts(walker, parameters, {"a": "x"})
    assert not accepts(walker, parameters, {"b": 1, "c": 1})
