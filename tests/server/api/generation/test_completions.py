"""POST /v1/completions over the socket, whole and streamed."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import httpx
import pytest

from server.api.engine_client import EngineClient
from support.models.token_names import raw_token

GREEDY = {"model": "tiny", "temperature": 0}


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={**GREEDY, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The stream's chunks; the [DONE] at its end is checked here."""
    response = client.post("/v1/completions", json={**GREEDY, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = complete(client, prompt="hello", max_tokens=5)
    assert answer.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_are_the_default(client: httpx.Client) -> None:
    assert complete(client, prompt="hello", ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_default_length_shrinks_to_the_room_left_in_the_context(client: httpx.Client, engine: EngineClient) -> None:
    prompt = [300] * (engine.max_model_len - 3)
    assert complete(client, prompt=prompt, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_choices_are_ordered_by_prompt_then_n(client: httpx.Client) -> None:
    answer = complete(client, prompt=["one", "two"], n=3, echo=True, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"][:3] for choice in answer["choices"]] == ["one"] * 3 + ["two"] * 3


def test_usage_counts_a_prompt_once_however_many_choices(client: httpx.Client, engine: EngineClient) -> None:
    usage = complete(client, prompt=["one", "three"], n=3, max_tokens=2)["usage"]
    num_prompt_tokens = len(engine.tokenizer.encode("one")) + len(engine.tokenizer.encode("three"))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt_tokens, 12)
    assert usage["total_tokens"] == num_prompt_tokens + 12


@pytest.mark.parametrize("wrap", [lambda ids: ids, lambda ids: [ids]])
def test_token_ids_are_a_prompt_as_they_are(client: httpx.Client, engine: EngineClient, wrap: Any) -> None:
    ids = engine.tokenizer.encode("hello")
    by_text = complete(client, prompt="hello", max_tokens=12)
    by_ids = complete(client, prompt=wrap(ids), max_tokens=12)
    assert by_ids["choices"] == by_text["choices"]
    assert by_ids["usage"]["prompt_tokens"] == len(ids)


def test_texts_and_token_ids_mix_in_one_call(client: httpx.Client, engine: EngineClient) -> None:
    answer = complete(client, prompt=["hello", engine.tokenizer.encode("hello")], max_tokens=8)
    assert answer["choices"][0]["text"] == answer["choices"][1]["text"]


@pytest.mark.parametrize("prompt", ["hello wörld", "日本👍🏽 née", " ", "x" * 400])
def test_echo_returns_the_prompt_in_front(client: httpx.Client, prompt: str) -> None:
    plain = complete(client, prompt=prompt, max_tokens=3)["choices"][0]["text"]
    echoed = complete(client, prompt=prompt, max_tokens=3, echo=True)["choices"][0]["text"]
    assert echoed == prompt + plain


def test_logprobs_come_as_parallel_lists_that_add_up_to_the_text(client: httpx.Client) -> None:
    [choice] = complete(client, prompt="hello", max_tokens=9, logprobs=3)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs.keys() == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert {len(values) for values in logprobs.values()} == {9}
    assert b"".join(map(raw_token, logprobs["tokens"])).decode(errors="replace") == choice["text"]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        # bytes that no character came of show as U+FFFD only once the next token settles it
        assert token.startswith("bytes:") or choice["text"][offset:].lstrip("\ufffd").startswith(token)
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert 3 <= len(top) <= 4


def test_logprobs_zero_reports_the_chosen_tokens_only(client: httpx.Client) -> None:
    [choice] = complete(client, prompt="hello", max_tokens=4, logprobs=0)["choices"]
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [[t] for t in choice["logprobs"]["tokens"]]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompt_is_scored_as_lm_eval_asks_for_it(client: httpx.Client, engine: EngineClient, max_tokens: int) -> None:
    prompts = [engine.tokenizer.encode(text) for text in ("the lease ends", "on 31 May")]
    body = {"prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "seed": 1234}
    answer = complete(client, **body)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(prompt) + max_tokens
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert all(isinstance(value, float) for value in logprobs["token_logprobs"][1:])
        greedy = [max(top, key=top.__getitem__) for top in logprobs["top_logprobs"][1:]]
        assert len(greedy) == len(prompt) - 1 + max_tokens


def test_tokens_inside_a_character_are_named_by_their_bytes(client: httpx.Client) -> None:
    [choice] = complete(client, prompt="a👩b", max_tokens=0, logprobs=0, echo=True)["choices"]
    logprobs = choice["logprobs"]
    broken = [token for token in logprobs["tokens"] if token.startswith("bytes:")]
    assert "".join(broken).replace("bytes:", "") == "\\xf0\\x9f\\x91\\xa9"
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][-1] == 2


@pytest.mark.parametrize("wrap", [lambda stop: stop, lambda stop: ["nowhere", stop]])
def test_text_ends_before_a_stop_string(client: httpx.Client, wrap: Any) -> None:
    [free] = complete(client, prompt="hello", max_tokens=40)["choices"]
    stop = next(pair for pair in map("".join, pairwise(free["text"][2:])) if pair.isascii() and pair.isalpha())
    [choice] = complete(client, prompt="hello", max_tokens=40, stop=wrap(stop))["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == free["text"][: free["text"].index(stop)]


def test_end_of_sequence_is_stop_and_ignore_eos_runs_on(client: httpx.Client, engine: EngineClient) -> None:
    bias = {str(max(engine.tokenizer.eos_ids)): 100}
    ended = complete(client, prompt="hi", max_tokens=9, logit_bias=bias)
    run_on = complete(client, prompt="hi", max_tokens=9, logit_bias=bias, ignore_eos=True)
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", 1)
    assert (run_on["choices"][0]["finish_reason"], run_on["usage"]["completion_tokens"]) == ("length", 9)


def test_stop_token_ids_end_and_min_tokens_hold_off(client: httpx.Client, engine: EngineClient) -> None:
    [stop_id] = engine.tokenizer.encode("Z", add_special_tokens=False)
    body = {"prompt": "hello", "max_tokens": 9, "stop_token_ids": [stop_id], "logit_bias": {str(stop_id): 100}}
    at_once, held = complete(client, **body), complete(client, **body, min_tokens=2)
    assert (at_once["usage"]["completion_tokens"], at_once["choices"][0]["finish_reason"]) == (1, "stop")
    assert held["usage"]["completion_tokens"] > 1


def test_a_seed_repeats_itself_and_its_choices_differ(client: httpx.Client) -> None:
    body = {"prompt": "hello", "temperature": 1.0, "seed": 7, "n": 4, "max_tokens": 12}
    first, second = complete(client, **body), complete(client, **body)
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in second["choices"]]
    assert len(set(texts)) == 4


def test_logit_bias_keys_are_token_ids_in_strings(client: httpx.Client, engine: EngineClient) -> None:
    [wanted] = engine.tokenizer.encode("Z", add_special_tokens=False)
    [choice] = complete(client, prompt="hello", max_tokens=3, logit_bias={str(wanted): 100})["choices"]
    assert choice["text"] == "ZZZ"


def test_second_identical_prompt_reports_cached_tokens(client: httpx.Client) -> None:
    first = complete(client, prompt="hello there, cache" * 4, max_tokens=2)
    second = complete(client, prompt="hello there, cache" * 4, max_tokens=2)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < second["usage"]["prompt_tokens_details"]["cached_tokens"] < second["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "hello", "max_tokens": 20},
        {"prompt": ["one", "two"], "n": 3, "max_tokens": 7, "temperature": 1.0, "seed": 3},
        {"prompt": "日本👍🏽", "max_tokens": 30, "echo": True, "logprobs": 2},
        {"prompt": "hello", "max_tokens": 40, "stop": ["heard"]},
        {"prompt": "hello", "max_tokens": 0, "echo": True, "logprobs": 1},
    ],
)
def test_stream_adds_up_to_the_whole_answer(client: httpx.Client, options: dict[str, Any]) -> None:
    whole = complete(client, **options)
    texts: dict[int, str] = {}
    finish: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    offsets: dict[int, list[int]] = {}
    for chunk in stream(client, **options):
        assert chunk.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        [choice] = chunk["choices"]
        index = choice["index"]
        assert index not in finish, "a choice went on after it had finished"
        texts[index] = texts.get(index, "") + choice["text"]
        if choice["finish_reason"] is not None:
            finish[index] = choice["finish_reason"]
        if choice["logprobs"] is not None:
            tokens.setdefault(index, []).extend(choice["logprobs"]["tokens"])
            offsets.setdefault(index, []).extend(choice["logprobs"]["text_offset"])
    for choice in whole["choices"]:
        index = choice["index"]
        assert (texts[index], finish[index]) == (choice["text"], choice["finish_reason"])
        if choice["logprobs"] is not None:
            assert tokens[index] == choice["logprobs"]["tokens"]
            assert offsets[index] == choice["logprobs"]["text_offset"]


def test_include_usage_sends_one_last_chunk_without_choices(client: httpx.Client) -> None:
    *chunks, last = stream(client, prompt="hello", n=2, max_tokens=6, stream_options={"include_usage": True})
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 5
    assert last["usage"]["completion_tokens"] == 12


def test_continuous_usage_counts_up_chunk_by_chunk(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, prompt="hello", max_tokens=6, ignore_eos=True, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6, 6]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {5}
