"""POST /v1/chat/completions over the socket, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.api.engine_client import EngineClient
from server.engine.text.tokenizer import Tokenizer
from support.models.token_names import raw_token
from support.models.tokenizer_zoo import byte_level, wrapped
from support.trainers.training_data import CHATML
from support.worlds.fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": "tiny", "temperature": 0, "messages": HELLO}


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={**GREEDY, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/chat/completions", json={**GREEDY, "stream": True, **body})
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = chat(client, max_tokens=5)
    assert answer.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == {"role", "content", "refusal", "annotations"}
    assert (choice["message"]["role"], choice["message"]["refusal"]) == ("assistant", None)
    assert (choice["logprobs"], choice["finish_reason"]) == (None, "length")


def test_an_answer_that_ends_by_itself_is_a_stop(client: httpx.Client, engine: EngineClient) -> None:
    [choice] = chat(client, logit_bias={str(max(engine.tokenizer.eos_ids)): 100})["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


def test_without_a_limit_the_context_length_is_the_limit(client: httpx.Client, engine: EngineClient) -> None:
    answer = chat(client, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == engine.max_model_len
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit_hold(client: httpx.Client, field: str) -> None:
    assert chat(client, **{field: 3})["usage"]["completion_tokens"] == 3


def test_content_parts_are_joined_as_they_are(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    by_parts = chat(client, messages=[{"role": "user", "content": parts}])
    assert by_parts["choices"][0]["message"] == chat(client)["choices"][0]["message"]


def test_developer_is_another_word_for_system(client: httpx.Client) -> None:
    answers = [
        chat(client, messages=[{"role": role, "content": "be brief"}, *HELLO], max_tokens=9)
        for role in ("system", "developer")
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_an_answer_goes_back_into_the_conversation_as_it_came(client: httpx.Client) -> None:
    message = chat(client, max_tokens=5)["choices"][0]["message"]
    answer = chat(client, messages=[*HELLO, message, {"role": "user", "content": "more"}], max_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "extra",
    [
        {"content": None},
        {"content": None, "refusal": None, "function_call": None, "tool_calls": None, "audio": None, "name": None},
        {"content": "", "reasoning_content": None, "parsed": None, "provider_specific_fields": None},
        {"content": [{"type": "text", "text": "", "annotations": None, "cache_control": None}]},
        {},
    ],
)
def test_null_in_a_replayed_answer_is_the_same_as_absent(client: httpx.Client, extra: dict[str, Any]) -> None:
    more = {"role": "user", "content": "more", "name": None}
    answers = [
        chat(client, messages=[*HELLO, {"role": "assistant", **turn}, more], max_tokens=9)
        for turn in (extra, {"content": ""})
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_top_p_0_is_greedy(client: httpx.Client) -> None:
    drawn = chat(client, temperature=1.0, top_p=0, seed=5, max_tokens=20)
    assert drawn["choices"] == chat(client, max_tokens=20)["choices"]


@pytest.mark.parametrize("stop", ["<|assistant|>", "hello<|assistant|>"])
def test_a_stop_string_may_name_a_special_token(
    client: httpx.Client, engine: EngineClient, fake_engine: FakeEngine, stop: str
) -> None:
    """The engine repeats its prompt, here with the special token that the stop string names."""
    name = "<|assistant|>"
    [special] = engine.tokenizer.encode(name, add_special_tokens=False)
    told = [*engine.tokenizer.encode("say hello", add_special_tokens=False), special, special]
    fake_engine.say_next(told)
    [choice] = chat(client, stop=stop, max_tokens=40)["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == ("say hello" if stop == name else "say ")


def test_a_conversation_too_long_for_the_context_is_refused(client: httpx.Client) -> None:
    body = {**GREEDY, "messages": [{"role": "user", "content": "x"}] * 3, "max_tokens": 600}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == "messages"


def test_logprobs_have_tokens_bytes_and_alternatives(client: httpx.Client) -> None:
    [choice] = chat(client, max_tokens=6, logprobs=True, top_logprobs=2)["choices"]
    assert choice["logprobs"].keys() == {"content", "refusal"}
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    for entry in content:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert raw_token(entry["token"]) == bytes(entry["bytes"])
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0].keys() == {"token", "logprob", "bytes"}
    said = b"".join(bytes(entry["bytes"]) for entry in content)
    assert said.decode(errors="replace") == choice["message"]["content"]


def test_logprobs_alone_report_no_alternatives(client: httpx.Client) -> None:
    [choice] = chat(client, max_tokens=2, logprobs=True)["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[], []]


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": [], "tool_choice": "none", "functions": None, "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "prediction": None},
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k"},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "seed": None, "logit_bias": None, "stream": None},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "top_p": 1, "stop": []},
    ],
)
def test_fields_that_change_nothing_are_accepted(client: httpx.Client, neutral: dict[str, Any]) -> None:
    assert len(chat(client, max_tokens=2, **neutral)["choices"]) == 1


def test_stream_says_who_then_what_then_why(client: httpx.Client) -> None:
    whole = chat(client, max_tokens=20, ignore_eos=True)["choices"][0]
    chunks = stream(client, max_tokens=20, ignore_eos=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[-1] == {}
    assert {tuple(delta) for delta in deltas[1:-1]} == {("content",)}
    assert "".join(delta["content"] for delta in deltas[:-1]) == whole["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_streamed_choices_add_up_to_the_whole_ones(client: httpx.Client) -> None:
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 15, "logprobs": True, "top_logprobs": 1}
    texts, tokens = ["", "", ""], [0, 0, 0]
    for chunk in stream(client, **options):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["logprobs"] is not None:
            tokens[choice["index"]] += len(choice["logprobs"]["content"])
    whole = chat(client, **options)
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert tokens == [15, 15, 15]


def test_streamed_usage_equals_the_whole_answers(client: httpx.Client) -> None:
    *_, last = stream(client, n=2, max_tokens=4, stream_options={"include_usage": True})
    whole = chat(client, n=2, max_tokens=4)["usage"]
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][field] == whole[field]


def test_a_chat_ends_at_the_templates_end_of_turn_and_a_completion_does_not(
    client: httpx.Client, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ChatML base whose configs name another end: an adapter learns `<|im_end|>`, and nothing else says so."""
    core = byte_level()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(wrapped(core, chat_template=CHATML))
    monkeypatch.setattr(fake_engine, "tokenizer", tokenizer)
    monkeypatch.setattr(fake_engine, "vocabulary", tokenizer.vocabulary(tokenizer.vocab_size))
    end = core.token_to_id("<|im_end|>")
    assert end not in tokenizer.eos_ids
    said = [*tokenizer.encode("yes", add_special_tokens=False), end]
    asked: list[dict[str, Any]] = [{}, {"ignore_eos": True}, {"min_tokens": len(said) + 1}]
    found = []
    for body in asked:
        fake_engine.say_next(said)
        [choice] = chat(client, max_tokens=2 * len(said), **body)["choices"]
        found.append((choice["message"]["content"], choice["finish_reason"]))
    assert found == [("yes", "stop"), ("yesyes", "length"), ("yesyes", "stop")]
    fake_engine.say_next(said)
    chunks = stream(client, max_tokens=2 * len(said))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    fake_engine.say_next(said)
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2 * len(said), "temperature": 0}
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("yesyes", "length")
