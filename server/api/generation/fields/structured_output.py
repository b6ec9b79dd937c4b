"""The fields that constrain an answer to a grammar: OpenAI's response_format, and vLLM's names beyond it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.wire.body import Absent, Body, neutral
from server.engine.grammar.compiler import AskedGrammar
from server.engine.grammar.spec import MAX_CHOICES, GrammarKind, GrammarSpec
from server.engine.request import InvalidRequest

_ANY_OBJECT = '{"type":"object"}'

Schema = str | dict[str, Any]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]


class JsonSchemaFormat(Body):
    """strict: true, false and absent are the same, an answer always follows its schema. name, description: not read."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's: free text, any JSON object, or what a JSON schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's: exactly one of json, json_object, regex, choice and grammar (Lark or GBNF).

    disable_any_whitespace: no blanks between JSON tokens. disable_fallback: there is none.
    """

    json_: Annotated[Schema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None
    disable_additional_properties: Annotated[None, neutral(False)] = None
    whitespace_pattern: Absent = None
    structural_tag: Absent = None


class StructuredFields(Body):
    """Fields of a body that constrain its answer; at most one of them may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None


def asked_grammar(body: StructuredFields) -> AskedGrammar | None:
    """What the answer must follow; None for free text. Raises InvalidRequest for more than one."""
    asked = [*_of_response_format(body.response_format), *_of_structured_outputs(body.structured_outputs)]
    asked += _given("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    if len(asked) > 1:
        message = f"{asked[1].field}: {asked[0].field} constrains the answer already; send only one of them"
        raise InvalidRequest(asked[1].field, message)
    return asked[0] if asked else None


def _of_response_format(given: ResponseFormat | None) -> list[AskedGrammar]:
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [AskedGrammar("response_format", GrammarSpec("json_schema", _ANY_OBJECT))]
    if given.json_schema is None:
        field = "response_format.json_schema"
        raise InvalidRequest(field, f"{field} is required with the type json_schema")
    return [AskedGrammar("response_format", GrammarSpec("json_schema", _text(given.json_schema.schema_)))]


def _of_structured_outputs(given: StructuredOutputs | None) -> list[AskedGrammar]:
    if given is None:
        return []
    compact = bool(given.disable_any_whitespace)
    asked = _given("structured_outputs.", given.json_, given.regex, given.choice, given.grammar, compact=compact)
    if given.json_object:
        spec = GrammarSpec("json_schema", _ANY_OBJECT, compact)
        asked.append(AskedGrammar("structured_outputs.json_object", spec))
    if not asked:
        message = "structured_outputs: one of json, json_object, regex, choice and grammar is required"
        raise InvalidRequest("structured_outputs", message)
    return asked


def _given(
    prefix: str,
    schema: Schema | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    *,
    compact: bool = False,
) -> list[AskedGrammar]:
    kinds: list[tuple[str, GrammarKind, Any]] = [
        ("json", "json_schema", schema),
        ("regex", "regex", regex),
        ("choice", "choice", choice),
        ("grammar", "grammar", grammar),
    ]
    return [
        AskedGrammar(f"{prefix}{name}", GrammarSpec(kind, value if isinstance(value, str) else _text(value), compact))
        for name, kind, value in kinds
        if value is not None
    ]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
