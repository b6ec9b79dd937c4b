"""Whatever a dialect's grammar accepts, the reader reads: nothing lost, however the answer is cut.

The short form walks some hundreds of answers; MULTILORA_CALL_WALKS=100000 is the long form, which adds Mistral NeMo's
131,072 tokens.
"""

from __future__ import annotations

import json
import os
from functools import cache
from random import Random
from typing import Any

import jsonschema
import pytest

from adapters_store.dialects.catalog import DIALECTS
from adapters_store.dialects.dialect import Dialect, Marker, Maybe, text_of
from adapters_store.dialects.parameters import arguments_schema
from adapters_store.dialects.reasoning import ReasoningMarks
from server.engine.request import Mark, SamplingParams
from server.engine.text.answer_reader import AnswerForm, AnswerReader, Piece
from server.engine.text.call_grammar import CallsPart, ReasoningPart, answer_grammar
from server.engine.text.output import OutputState
from support.models import real_tokenizers as real
from support.models.call_walks import Walker

Events = list[tuple[str, tuple[Mark, ...]]]  # text and marks
NUM_WALKS = int(os.environ.get("MULTILORA_CALL_WALKS", "210"))
MAX_TOKENS = 160
THINK = ReasoningMarks("<think>", "</think>")
NAMES = tuple(sorted({name for dialect in DIALECTS.values() for name in dialect.markers} | {THINK.open, THINK.close}))
VOCABULARIES = {  # tokenizer, the token that ends an answer, and how markers are among its tokens
    "demo": (real.demo, "<|end_of_turn|>", None),
    "demo, Qwen's markers": (real.demo, "<|end_of_turn|>", False),
    "SmolLM2": (real.smollm2, "<|im_end|>", None),
    "SmolLM2, special markers": (real.smollm2, "<|im_end|>", True),
    "Mistral 7B v0.3": (real.mistral_v3, "</s>", None),
} | ({"Mistral NeMo": (real.tekken, "</s>", None)} if NUM_WALKS >= 10_000 else {})


def _tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | ({"parameters": parameters} if parameters else {})}


TOOLS = [
    _tool("get", None),
    _tool("get_weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
    _tool(
        "book-2",
        {
            "properties": {
                "seats": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
                "class": {"enum": ["first", '}"]{\\', "</tool_call>"]},
                "guest": {"type": "object", "properties": {"vip": {"type": "boolean"}}, "additionalProperties": False},
            },
            "required": ["class", "seats"],
            "additionalProperties": False,
        },
    ),
    _tool("any", {"type": "object"}),
]
SCHEMAS = {tool["function"]["name"]: arguments_schema(tool["function"]) for tool in TOOLS}


@cache
def _walker(vocabulary: str) -> Walker:
    make, end_name, are_special = VOCABULARIES[vocabulary]
    core = make() if are_special is None else real.with_markers(make, NAMES, is_special=are_special)
    return Walker(core, end_name)


def _form(walker: Walker, dialect: Dialect, *, starts_in_reasoning: bool | None) -> AnswerForm:
    ids = walker.tokenizer.added_ids(NAMES)
    return AnswerForm(
        marker_ids=ids,
        shown={id_: "" if id_ in walker.special_ids else name for name, id_ in ids.items()},
        dialect=dialect,
        reasoning=None if starts_in_reasoning is None else THINK,
        starts_in_reasoning=bool(starts_in_reasoning),
    )


def _preferred(walker: Walker, form: AnswerForm) -> list[int]:
    """Tokens with which calls begin and end."""
    assert form.dialect is not None
    first = form.dialect.trigger
    text = first.name if isinstance(first, Marker) else first
    return [*form.marker_ids.values(), *walker.tokenizer.encode(text, add_special_tokens=False)[:1]] * 3


def _events(walker: Walker, form: AnswerForm, ids: list[int], stop: tuple[str, ...] = ()) -> Events:
    """Text and marks as the engine reports them."""
    params = SamplingParams(max_tokens=max(1, len(ids)), mark_ids=form.mark_ids, stop=stop)
    output, events = OutputState(params, walker.tokenizer.token_texts, frozenset()), []
    for id_ in ids:
        delta = output.append(id_)
        events.append((delta.text, delta.marks))
        if delta.finish_reason == "stop":
            break
    return events


def _joined(pieces: list[Piece]) -> list[tuple[str, int, str]]:
    joined: dict[tuple[str, int], str] = {}
    for piece in pieces:
        joined[piece.kind, piece.number] = joined.get((piece.kind, piece.number), "") + piece.text
    return [(kind, number, text) for (kind, number), text in joined.items()]


def _whole(form: AnswerForm, events: Events) -> list[tuple[str, int, str]]:
    reader, text, marks = AnswerReader(form), "", list[Mark]()
    for part, found in events:
        marks += [(len(text) + place, id_) for place, id_ in found]
        text += part
    return _joined(reader.feed(text, marks) + reader.finish())


def _streamed(form: AnswerForm, events: Events) -> list[tuple[str, int, str]]:
    """Character by character."""
    reader, pieces = AnswerReader(form), list[Piece]()
    for text, marks in events:
        for place in range(len(text) + 1):
            pieces += reader.feed("", [(0, id_) for at, id_ in marks if at == place])
            pieces += reader.feed(text[place : place + 1])
    return _joined(pieces + reader.finish())


def _raw(walker: Walker, ids: list[int]) -> str:
    return b"".join(walker.tokenizer.token_texts.token_bytes(id_) for id_ in ids).decode("utf-8", "replace")


def _check_calls(read: list[tuple[str, int, str]]) -> list[tuple[str, str]]:
    """Names of the list, arguments by their schemas."""
    names = [text for kind, _, text in read if kind == "name"]
    arguments = [text for kind, _, text in read if kind == "arguments"]
    assert len(names) == len(arguments)
    for name, text in zip(names, arguments, strict=True):
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    return list(zip(names, arguments, strict=True))


def _spellings(dialect: Dialect, calls: list[tuple[str, str]]) -> set[str]:
    """The calls as the model may write them: with and without what may be left out."""
    written = dialect.written(calls) if calls else ""
    if not calls or not any(isinstance(part, Maybe) for part in dialect.begin):
        return {written}
    first, maybe = dialect.begin[:2]
    assert isinstance(first, Marker)
    assert isinstance(maybe, Maybe)
    return {written, first.name + maybe.text + written.removeprefix(first.name)}


CASES = [(vocabulary, name) for vocabulary in VOCABULARIES for name in DIALECTS]


@pytest.mark.parametrize(("vocabulary", "dialect_name"), CASES)
def test_every_answer_that_the_grammar_accepts_is_read_back_whole_and_streamed(
    vocabulary: str, dialect_name: str
) -> None:
    walker, dialect, random = _walker(vocabulary), DIALECTS[dialect_name], Random(f"{vocabulary} {dialect_name}")
    num_walks, num_calls, num_finished = -(-NUM_WALKS // len(CASES)), 0, 0
    for number in range(num_walks):
        choice = ("auto", "required")[number % 2]
        form = _form(walker, dialect, starts_in_reasoning=None)
        grammar = answer_grammar(form.marker_ids, calls=CallsPart(dialect=dialect, tools=TOOLS, choice=choice))
        ids = walker.walk(grammar, random, preferred=_preferred(walker, form), max_tokens=MAX_TOKENS)
        events = _events(walker, form, ids)
        read = _whole(form, events)
        assert read == _streamed(form, events), ids
        if len(ids) == MAX_TOKENS:
            continue
        num_finished += 1
        calls = _check_calls(read)
        num_calls += len(calls)
        assert choice == "auto" or calls
        text = "".join(text for kind, _, text in read if kind == "text")
        assert _raw(walker, ids).strip() in {(text + calls).strip() for calls in _spellings(dialect, calls)}, ids
    assert num_calls > 0
    assert 2 * num_finished >= num_walks


KINDS = ("name", "arguments")
TWO_CALLS = [("get_weather", '{"city": "Oslo, [\\"N\\"]"}'), ("get", "{}")]


@pytest.mark.parametrize("vocabulary", ["demo", "demo, Qwen's markers"])
@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_an_answer_that_is_cut_anywhere_shows_its_calls_so_far_and_no_part_of_their_frame(
    vocabulary: str, dialect_name: str
) -> None:
    """As `max_tokens` or a stop string cuts it: also after the comma between two calls of a list."""
    walker, dialect = _walker(vocabulary), DIALECTS[dialect_name]
    form = _form(walker, dialect, starts_in_reasoning=None)
    calls = TWO_CALLS if dialect.between is not None else TWO_CALLS[:1]
    ids = walker.tokenizer.encode(dialect.written(calls), add_special_tokens=False)
    events = [
        (part[at : at + 1], tuple(mark for mark in marks if mark[0] == at))
        for part, marks in _events(walker, form, ids)
        for at in range(len(part) + 1)
    ]
    whole = [(kind, number, text) for number, call in enumerate(calls) for kind, text in zip(KINDS, call, strict=True)]
    for length in range(len(events) + 1):
        read = _whole(form, events[:length])
        assert read == _streamed(form, events[:length])
        if read and read[0][0] == "text":  # cut in the marker with which calls begin
            assert len(read) == 1
            assert isinstance(dialect.trigger, str) or read[0][2] != dialect.trigger.name
            assert text_of([dialect.trigger]).startswith(read[0][2])
            continue
        *before, last = read or [whole[0]]
        assert before == whole[: len(before)]
        assert last[:2] == whole[len(before)][:2]
        assert whole[len(before)][2].startswith(last[2])
    assert read == whole


@pytest.mark.parametrize("vocabulary", ["demo", "demo, Qwen's markers"])
@pytest.mark.parametrize("is_open", [True, False])
def test_reasoning_text_and_calls_are_told_apart_whole_and_streamed(vocabulary: str, is_open: bool) -> None:
    walker, random, kinds = _walker(vocabulary), Random(f"{vocabulary} {is_open}"), set[str]()
    for dialect in DIALECTS.values():
        form = _form(walker, dialect, starts_in_reasoning=is_open)
        reasoning = ReasoningPart(marks=THINK, is_open=is_open)
        close = "" if THINK.close in form.marker_ids else "so</think>"  # a walk would not spell it
        think = walker.tokenizer.encode(close if is_open else f"<think>{close}", add_special_tokens=False)
        for number in range(4):
            calls = CallsPart(dialect=dialect, tools=TOOLS, choice=("auto", "required")[number % 2], is_parallel=False)
            grammar = answer_grammar(form.marker_ids, reasoning=reasoning, calls=calls)
            ids = think + walker.walk(
                grammar, random, preferred=_preferred(walker, form), max_tokens=MAX_TOKENS, start=think
            )
            events = _events(walker, form, ids)
            read = _whole(form, events)
            assert read == _streamed(form, events), ids
            kinds |= {kind for kind, _, _ in read}
            if len(ids) < MAX_TOKENS:
                assert len(_check_calls(read)) <= 1
    assert kinds == {"reasoning", "text", "name", "arguments"}


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_reasoning_has_at_most_its_budget_of_tokens(budget: int) -> None:
    walker, random = _walker("demo, Qwen's markers"), Random(budget)
    ids = walker.tokenizer.added_ids(NAMES)
    shut_ids = (*walker.special_ids, *ids.values())
    part = ReasoningPart(marks=THINK, is_open=True, budget=budget, shut_ids=shut_ids)
    for _ in range(20):
        walked = walker.walk(answer_grammar(ids, reasoning=part), random, max_tokens=40)
        assert ids[THINK.close] in walked[: budget + 1]
    large = ReasoningPart(marks=THINK, is_open=True, budget=100_000, shut_ids=shut_ids)
    assert not walker.matcher(answer_grammar(ids, reasoning=large)).is_error()


@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_a_marker_that_ordinary_tokens_spell_is_text_on_both_sides(dialect_name: str) -> None:
    """With the marker's token, the same characters in ordinary tokens never begin a call."""
    walker, dialect = _walker("demo, Qwen's markers"), DIALECTS[dialect_name]
    if not isinstance(dialect.trigger, Marker):
        return
    form = _form(walker, dialect, starts_in_reasoning=None)
    letters = [walker.tokenizer.encode(letter, add_special_tokens=False) for letter in dialect.trigger.name]
    spelled = [id_ for ids in letters for id_ in ids]
    assert form.marker_ids[dialect.trigger.name] not in spelled
    calls = CallsPart(dialect=dialect, tools=TOOLS, choice="auto")
    matcher = walker.matcher(answer_grammar(form.marker_ids, calls=calls))
    assert matcher.consume_tokens(spelled)
    assert walker.end_id in walker.allowed(matcher)
    read = _streamed(form, _events(walker, form, spelled))
    assert read == [("text", 0, dialect.trigger.name)]


@pytest.mark.parametrize("dialect_name", DIALECTS)
def test_without_calls_allowed_no_answer_holds_one(dialect_name: str) -> None:
    for vocabulary in ("demo", "demo, Qwen's markers"):
        walker, dialect = _walker(vocabulary), DIALECTS[dialect_name]
        form = _form(walker, dialect, starts_in_reasoning=None)
        grammar = answer_grammar(form.marker_ids, calls=CallsPart(dialect=dialect, tools=TOOLS, choice="none"))
        call = walker.tokenizer.encode(dialect.written([("get", "{}")]), add_special_tokens=False)
        assert not walker.matcher(grammar).consume_tokens(call)
        text = walker.tokenizer.encode('A list: [1, {"a": 2}] <b>', add_special_tokens=False)
        assert walker.matcher(grammar).consume_tokens(text)


def test_marks_keep_their_place_when_a_stop_string_holds_text_back() -> None:
    walker, dialect = _walker("demo, Qwen's markers"), DIALECTS["hermes"]
    form = _form(walker, dialect, starts_in_reasoning=None)
    text = 'So: ENDIN<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
    ids = walker.tokenizer.encode(text, add_special_tokens=False)
    assert form.mark_ids & set(ids)
    held = _events(walker, form, ids, stop=("ENDING", "}\n\n"))
    assert _streamed(form, held) == [("text", 0, "So: ENDIN"), ("name", 0, "get"), ("arguments", 0, "{}")]
    cut = _events(walker, form, ids, stop=("N<tool",))
    assert _streamed(form, cut) == [("text", 0, "So: ENDI")]
