"""Reasoning over HTTP with a base whose chat template opens it: what an answer must follow, and what is counted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

from server.engine.text.tokenizer import Tokenizer
from support.models.real_tokenizers import with_markers
from support.models.tokenizer_zoo import byte_level, wrapped
from support.worlds.fake_engine import FakeEngine

THINKS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}<think>{% endif %}{# </think> #}"
)
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Rain?"}], "max_tokens": 3}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
AS_FORMAT = {"type": "json_schema", "json_schema": {"name": "case", "schema": SCHEMA}}

pytestmark = pytest.mark.usefixtures("fake_engine")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    core = with_markers(byte_level, ["<think>", "</think>"], is_special=True)
    return Tokenizer(wrapped(core, chat_template=THINKS))


@pytest.mark.parametrize("budget", [{}, {"reasoning_budget": 8}])
@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"response_format": AS_FORMAT}, '{"n":7}'),
        ({"response_format": {"type": "json_object"}}, '{"a":7}'),
        ({"guided_regex": "[0-9]{3}"}, "123"),
        ({"guided_choice": ["yes", "no"]}, "yes"),
        ({"guided_grammar": 'start: "a" /[0-9]+/ "b"'}, "a12b"),
    ],
)
@pytest.mark.parametrize("blank", ["", "\n\n"])
def test_an_answer_follows_its_format_behind_its_reasoning(
    client: httpx.Client,
    fake_engine: FakeEngine,
    tokenizer: Tokenizer,
    *,
    fields: dict[str, Any],
    answer: str,
    budget: dict[str, Any],
    blank: str,
) -> None:
    response = client.post("/v1/chat/completions", json={**ASK, **fields, **budget})
    assert response.status_code == 200, response.text
    constraint = fake_engine.seen[-1].constraint
    assert constraint is not None

    def may_follow(text: str) -> bool:
        allowed = np.unpackbits(constraint.allowed(), bitorder="little")
        return bool(allowed[tokenizer.encode(text, add_special_tokens=False)[0]])

    assert may_follow("x")
    read = tokenizer.encode(f"so xy</think>{blank}", add_special_tokens=False)
    constraint.advance(read)
    assert not may_follow("x")
    for id_ in tokenizer.encode(answer, add_special_tokens=False):
        read.append(id_)
        constraint.advance(read)
        assert constraint.failure is None, (answer, read)
    assert may_follow("</s>")


def test_an_answer_in_another_form_is_billed_to_its_last_token(
    client: httpx.Client, fake_engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens without a text make no event; they are in the usage all the same."""
    monkeypatch.setattr(fake_engine, "step_s", 0.05)  # or all of them could come with the first event
    marks = tokenizer.encode("</think>", add_special_tokens=False)
    for route, limit in (("messages", "max_tokens"), ("responses", "max_output_tokens")):
        prompt = {"messages": ASK["messages"]} if route == "messages" else {"input": "Rain?"}
        before = client.get("/v1/usage").json()["total"]["completion_tokens"]
        fake_engine.say_next(marks)
        body = {"model": "tiny", **prompt, limit: 5, "temperature": 0.0, "stream": True}
        client.post(f"/v1/{route}", json=body).raise_for_status()
        assert client.get("/v1/usage").json()["total"]["completion_tokens"] - before == 5, route


@pytest.mark.parametrize(("text", "num_reasoning"), [("so xy</think>yes", 6), ("</think>yes", 1), ("so", 3)])
@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_the_tokens_of_the_reasoning(
    client: httpx.Client, fake_engine: FakeEngine, tokenizer: Tokenizer, *, text: str, num_reasoning: int, stream: bool
) -> None:
    script = [*tokenizer.encode(text, add_special_tokens=False), max(tokenizer.eos_ids)]
    messages = ASK["messages"]
    seen = {}
    for route, body in (
        ("chat/completions", {"messages": messages, "max_tokens": 20}),
        ("responses", {"input": "Rain?", "max_output_tokens": 20}),
        ("messages", {"messages": messages, "max_tokens": 20}),
    ):
        fake_engine.say_next(script)
        options = {"stream_options": {"include_usage": True}} if stream and route == "chat/completions" else {}
        answer = client.post(
            f"/v1/{route}", json={"model": "tiny", "temperature": 0, "stream": stream, **body, **options}
        )
        assert answer.status_code == 200, answer.text
        data = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        usages = [each.get("response", each).get("usage") for each in data] if stream else [answer.json()["usage"]]
        seen[route] = [usage for usage in usages if usage][-1]
    chat, responses, said = seen["chat/completions"], seen["responses"], seen["messages"]
    assert (
        chat["completion_tokens_details"] == responses["output_tokens_details"] == {"reasoning_tokens": num_reasoning}
    )
    assert said["output_tokens_details"] == {"thinking_tokens": num_reasoning}
    assert chat["completion_tokens"] == responses["output_tokens"] == said["output_tokens"] == len(script)


def test_usage_of_each_chunk_says_how_many_tokens_of_reasoning_there_were_so_far(
    client: httpx.Client, fake_engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    fake_engine.say_next(tokenizer.encode("ab</think>yes", add_special_tokens=False))
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**ASK, "max_tokens": 6, "temperature": 0, "stream": True, "stream_options": options}
    answer = client.post("/v1/chat/completions", json=body)
    data = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    counts = [each["usage"]["completion_tokens_details"]["reasoning_tokens"] for each in data]
    assert sorted(counts) == counts
    assert set(counts) == {1, 2, 3}


def test_reasoning_between_marks_of_several_tokens_is_not_counted(
    client: httpx.Client, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token may hold the end of a mark and the beginning of the answer."""
    monkeypatch.setattr(fake_engine, "tokenizer", Tokenizer(wrapped(byte_level(), chat_template=THINKS)))
    chat = client.post("/v1/chat/completions", json=ASK).json()
    assert "completion_tokens_details" not in chat["usage"]
    responses = client.post("/v1/responses", json={"model": "tiny", "input": "Rain?"}).json()
    assert responses["usage"]["output_tokens_details"] == {"reasoning_tokens": None}
    said = client.post("/v1/messages", json={"model": "tiny", "messages": ASK["messages"], "max_tokens": 3}).json()
    assert said["usage"]["output_tokens_details"] is None


def test_no_adapters_own_template_is_rendered_on_the_event_loop(
    client: httpx.Client, upload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process renders it, and every stream would wait for that."""
    assert upload(client, "own", fields={"chat_template": THINKS}).status_code == 201
    encode_chat, on_loop = Tokenizer.encode_chat, list[bool]()

    def encode(tokenizer: Tokenizer, *arguments: Any) -> list[int]:
        on_loop.append(asyncio._get_running_loop() is not None)
        return encode_chat(tokenizer, *arguments)

    monkeypatch.setattr(Tokenizer, "encode_chat", encode)
    for route in ("chat/completions", "messages", "messages/count_tokens"):
        limits = {} if route.endswith("count_tokens") else {"max_tokens": 1}
        body = {"model": "own", "messages": ASK["messages"], **limits}
        client.post(f"/v1/{route}", json=body).raise_for_status()
    assert on_loop == [False, False, False]
