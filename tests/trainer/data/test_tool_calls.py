"""Lines with tools: what is learned is the answer that the server's grammar lets through, behind the served prompt."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from adapters_store.dialects.catalog import DIALECTS, dialect_of
from adapters_store.dialects.dialect import Marker
from server.engine.text.call_grammar import CallsPart, answer_grammar
from server.engine.text.chat_options import ChatOptions
from server.engine.text.tokenizer import Tokenizer
from support.models import real_tokenizers as real
from support.models.call_walks import Walker
from support.trainers.tool_data import DROPS_TEXT, FORECAST, QWEN, TOOLS, call, calling, line, result
from support.trainers.training_data import CHATML as OTHERS_CHATML
from support.trainers.training_data import demo_tokenizer
from trainer.data.encode import Encoder
from trainer.data.problems import LineRefused
from trainer.data.records import Record, parse_record
from trainer.data.sample import runs_of
from trainer.data.template import template_digest
from trainer.data.types import EncodedExample

OSLO = call("forecast", {"units": "metric", "city": "Oslo", "place": {"lon": 10.7, "lat": 59.9}})
ORDERED = '{"city": "Oslo", "units": "metric", "place": {"lat": 59.9, "lon": 10.7}}'
ANSWER = {"role": "assistant", "content": "It rains."}
CHATML = OTHERS_CHATML.replace("<|im_end|>", "<|end_of_turn|>")
FORMS = {  # how a base shows tools, and the dialect and the chat template that an adapter has of its own
    "its own template": (QWEN, None, None),
    **{f"{name} over another template": (CHATML, name, None) for name in DIALECTS},
    "an adapter's template": (CHATML, None, QWEN),
    "an adapter's template and dialect": (QWEN, "phi", CHATML),
}


def record_of(body: dict[str, Any]) -> Record:
    return parse_record(json.dumps(body).encode())


@cache
def walker_of(template: str) -> Walker:
    return Walker(marked(template).backend_tokenizer, "<|end_of_turn|>")


@cache
def marked(template: str) -> PreTrainedTokenizerFast:
    markers = sorted({name for dialect in DIALECTS.values() for name in dialect.markers})
    core = real.with_markers(real.demo, markers, is_special=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end_of_turn|>", chat_template=template)


def encoded(body: dict[str, Any], template: str, dialect: str | None = None, own: str | None = None) -> EncodedExample:
    encoder = Encoder(marked(template), max_sequence_length=4096, tool_dialect=dialect, chat_template=own)
    [example] = encoder.encode(record_of(body))
    return example


def learned(example: EncodedExample, template: str) -> list[str]:
    return [run.text for run in runs_of(example, marked(template)) if run.weight]


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_follows_the_served_prompt_and_the_servers_grammar_accepts_it(form: str) -> None:
    template, name, own = FORMS[form]
    dialect = DIALECTS[name] if name else dialect_of(own or template)
    body = line(
        {"role": "system", "content": "Be brief."}, "Rain?", calling(OSLO), result("wet"), "Warm?", calling(OSLO)
    )
    example = encoded(body, template, name, own)
    served = Tokenizer(marked(template))
    starts = [at for at in range(1, len(example)) if example.supervised[at] and not example.supervised[at - 1]]
    assert len(starts) == 2
    walker = walker_of(template)
    markers = served.added_ids(dialect.markers)
    part = CallsPart(dialect=dialect, tools=record_of(body).tools, choice="auto")
    for start, end in zip(starts, (2, 5), strict=True):
        messages = [message.rendered_from() for message in record_of(body).messages[:end]]
        prompt = served.encode_chat(messages, ChatOptions(tools=TOOLS, dialect=dialect, template=own))
        assert example.input_ids[:start].tolist() == prompt
        stop = next((at for at in range(start, len(example)) if not example.supervised[at]), len(example))
        answer = example.input_ids[start:stop].tolist()
        assert answer[-1] == walker.end_id
        matcher = walker.matcher(answer_grammar(markers, calls=part))
        assert matcher.consume_tokens(answer[:-1]), matcher.get_error()
        assert matcher.is_accepting()
        assert ORDERED in walker.tokenizer.decode(answer, skip_special_tokens=False)


def test_an_own_template_is_rendered_within_the_limits_of_service_and_names_the_line() -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for own, reason in ((loops, "processor time"), ("{{ messages[0].content.nothing.here }}", "nothing")):
        with pytest.raises(LineRefused, match=f"the spec's chat template refused the messages: .*{reason}"):
            encoded(line("Rain?", ANSWER), CHATML, own=own)


def test_provenance_names_the_template_that_was_trained_on() -> None:
    digests = {template_digest(marked(CHATML), own) for own in (None, QWEN, "{{ messages }}")}
    assert len(digests) == 3
    assert template_digest(marked(QWEN)) == template_digest(marked(CHATML), QWEN)


def test_only_the_assistants_words_and_calls_are_learned() -> None:
    again = call("now", {}, "call_2")
    body = line("Rain?", calling(OSLO, again, content="I look."), result("wet"), result("noon", "call_2"), ANSWER)
    first, last = learned(encoded(body, QWEN), QWEN)
    assert first == (
        f'I look.\n<tool_call>\n{{"name": "forecast", "arguments": {ORDERED}}}\n</tool_call>'
        '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|end_of_turn|>'
    )
    assert last == "It rains.<|end_of_turn|>"
    body["messages"][1]["weight"] = 0
    assert learned(encoded(body, QWEN), QWEN) == [last]


def test_what_the_file_spells_otherwise_is_the_same_line() -> None:
    as_object = {**OSLO, "function": {**OSLO["function"], "arguments": json.loads(OSLO["function"]["arguments"])}}
    nulls = {"name": None, "tool_call_id": None, "function_call": None}
    plain = record_of(line("Rain?", calling(OSLO)))
    assert plain.messages[1].calls[0].arguments == ORDERED
    for other in (
        line("Rain?", calling(as_object)),
        line({"role": "user", "content": "Rain?", "tool_calls": None}, calling(OSLO, **nulls), functions=None),
        {**line("Rain?", {"role": "assistant", "tool_calls": [OSLO]}), "parallel_tool_calls": False},
    ):
        assert record_of(other) == plain
        assert record_of(other).digest() == plain.digest()
    bare = {**OSLO, "function": {"name": "now", "arguments": ""}}
    assert record_of(line("Now?", calling(bare))).messages[1].calls[0].arguments == "{}"
    another = record_of(line("Rain?", calling(OSLO), tools=[FORECAST]))
    assert another.digest() != plain.digest()
    assert (
        record_of(line("Rain?", ANSWER, tools=[])).digest()
        == record_of({"messages": line("Rain?", ANSWER)["messages"]}).digest()
    )


def tool(name: str, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


BAD: list[tuple[dict[str, Any], str, str]] = [
    (line("a", calling(call("rain", {}))), "bad_tool_call", "messages[1].tool_calls[0].function.name"),
    (line("a", calling(OSLO), tools=[]), "bad_tool_call", "the line has no tools"),
    (line("a", calling(call("forecast", {}))), "bad_tool_call", "'city' is required"),
    (line("a", calling(call("forecast", {"city": 3}))), "bad_tool_call", "of type string, got 3"),
    (line("a", calling(call("forecast", {"city": "x", "days": 1.5}))), "bad_tool_call", "integer, got 1.5"),
    (line("a", calling(call("forecast", {"city": "x", "days": True}))), "bad_tool_call", "integer, got True"),
    (line("a", calling(call("forecast", {"city": "x", "units": "k"}))), "bad_tool_call", "one of 'metric', 'imperial'"),
    (line("a", calling(call("forecast", {"town": "x", "city": "y"}))), "bad_tool_call", "unknown argument 'town'"),
    (line("a", calling(call("now", {"x": 1}))), "bad_tool_call", "known: none"),
    (line("a", calling({**OSLO, "function": {"name": "now", "arguments": "{"}})), "bad_tool_call", "not JSON"),
    (line("a", calling({**OSLO, "function": {"name": "now", "arguments": "[]"}})), "bad_tool_call", "type object"),
    (line("a", calling({**OSLO, "function": {"name": "now"}})), "wrong_type", "a JSON object as text, got None"),
    (line("a", calling({**OSLO, "id": None})), "bad_tool_call", "id must be a string of 1 to 64"),
    (line("a", calling({**OSLO, "id": "x" * 65})), "bad_tool_call", "1 to 64"),
    (line("a", calling(OSLO, OSLO)), "bad_tool_call", "same id"),
    (line("a", calling(OSLO, call("now", {}, "b")), parallel_tool_calls=False), "bad_tool_call", "at most 1 fit"),
    (line("a", calling(*(call("now", {}, str(at)) for at in range(129)))), "bad_tool_call", "at most 128 fit"),
    (line("a", calling(OSLO), result("x", "call_9"), ANSWER), "bad_tool_call", "'call_9'"),
    (line("a", calling(OSLO), result("x"), result("x"), ANSWER), "bad_tool_call", "messages[3].tool_call_id"),
    (line("a", calling(OSLO), result("x")), "wrong_role", "the last message"),
    (line("a", calling(OSLO), {"role": "tool", "content": "x"}, ANSWER), "bad_tool_call", "tool_call_id must be"),
    (line({"role": "user", "content": "a", "tool_calls": [OSLO]}, ANSWER), "unknown_key", "tool_calls"),
    (line("a", ANSWER, tools=[NOW_TWICE := TOOLS[1], NOW_TWICE]), "bad_tools", "duplicate name now"),
    (line("a", ANSWER, tools=[tool("a b")]), "bad_tools", "got 'a b'"),
    (line("a", ANSWER, tools=[tool("a", schema={})]), "bad_tools", "'schema'"),
    (line("a", ANSWER, tools=[tool("a", parameters=[])]), "bad_tools", "object"),
    (line("a", ANSWER, tools=[{"name": "a"}]), "bad_tools", "tools[0]"),
    (line("a", ANSWER, tools=[tool(f"t{n}") for n in range(129)]), "bad_tools", "128"),
    (line("a", ANSWER, tools=[tool("a", parameters={"x": "y" * 50_000})]), "bad_tools", "at most 49152 characters"),
    ({**line("a", ANSWER), "tools": "[]"}, "wrong_type", "tools must be a list"),
    ({**line("a", ANSWER), "parallel_tool_calls": 1}, "wrong_type", "parallel_tool_calls"),
    ({**line("a", ANSWER), "tool_choice": "auto"}, "unknown_key", "'tool_choice'"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "words"), BAD)
def test_a_bad_line_with_tools_is_refused_by_field_and_value(body: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(LineRefused) as refused:
        record_of(body)
    assert refused.value.code == code
    assert words in refused.value.message
    assert refused.value.param or code == "unknown_key"
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    ("body", "template", "dialect", "code", "words"),
    [
        (line("a", calling(OSLO, content="So.")), DROPS_TEXT, None, "template_omits", "messages[1].content"),
        (line("a", {**ANSWER, "reasoning_content": "Hm."}), QWEN, None, "template_omits", "reasoning_content"),
        (line("a", calling(OSLO, call("now", {}, "b"))), CHATML, "llama3_json", "bad_tool_call", "at most, got 2"),
        (line("a", calling(OSLO, content="So.")), CHATML, "json", "bad_tool_call", "text or calls, not both"),
    ],
)  # fmt: skip
def test_what_no_served_answer_can_hold_is_refused_and_not_dropped(
    body: dict[str, Any], template: str, dialect: str | None, code: str, words: str
) -> None:
    with pytest.raises(LineRefused) as refused:
        encoded(body, template, dialect)
    assert refused.value.code == code
    assert words in refused.value.message


def test_reasoning_is_learned_where_the_template_shows_it() -> None:
    thinks = CHATML.replace(
        "m['content']", "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m['content']"
    )
    body = line("a", {**ANSWER, "reasoning_content": "Clouds."}, tools=[])
    assert learned(encoded(body, thinks), thinks) == ["<think>Clouds.</think>It rains.<|end_of_turn|>"]
    opens = thinks.replace("assistant\n'", "assistant\n<think>\n'").replace("m.reasoning_content else", "false else")
    assert learned(encoded(body, opens), opens) == ["Clouds.\n</think>\n\nIt rains.<|end_of_turn|>"]


def test_ids_that_mistrals_templates_refuse_are_shown_in_their_form() -> None:
    strict = (
        "{# tools [TOOL_CALLS] #}{% for m in messages %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{% if call.id|length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        "{{ '[TOOL_CALLS] [{\"name\": \"' + call.function.name + '\"}]' + call.id }}{% endfor %}"
        "{{ m.tool_call_id }}{{ '<|end_of_turn|>' }}{% endfor %}"
    )
    body = line("a", calling(OSLO), result("wet"), ANSWER)
    text = marked(strict).decode(encoded(body, strict).input_ids.tolist())
    shown = text.partition("}]")[2][:9]
    assert text.count(shown) == 2
    assert shown.isalnum()


def test_the_demos_template_shows_tools_as_plain_json() -> None:
    example = Encoder(demo_tokenizer(), max_sequence_length=2048).encode(record_of(line("Rain?", calling(OSLO))))[0]
    [answer] = [run.text for run in runs_of(example, demo_tokenizer()) if run.weight]
    assert answer == f'{{"name": "forecast", "arguments": {ORDERED}}}<|end_of_turn|>'
    assert not isinstance(dialect_of(demo_tokenizer().chat_template).trigger, Marker)
