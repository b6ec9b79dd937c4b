"""What a generation request is refused for: always 400 (or 404, 415), naming the field."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.api.engine_client import EngineClient
from support.worlds.fake_engine import FakeEngine

COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}

# field, value, code, words that the message holds
BOTH: list[tuple[str, Any, str, str]] = [
    ("temperature", 2.5, "invalid_value", "[0.0, 2.0]"),
    ("temperature", "1", "invalid_type", "number"),
    ("temperature", True, "invalid_type", "number"),
    ("temperature", 1e999, "invalid_value", "inf"),
    ("top_p", -0.1, "invalid_value", "[0.0, 1.0]"),
    ("top_k", -2, "invalid_value", "-1"),
    ("top_k", 1.5, "invalid_type", "integer"),
    ("min_p", 1.01, "invalid_value", "[0.0, 1.0]"),
    ("repetition_penalty", 0, "invalid_value", "(0.0, 10.0]"),
    ("temperature", 1e-46, "invalid_value", "1e-46"),
    ("top_p", 1e-46, "invalid_value", "float32"),
    ("min_p", 1e-39, "invalid_value", "float32"),
    ("repetition_penalty", 1e-46, "invalid_value", "1.18e-38"),
    ("presence_penalty", -1e-46, "invalid_value", "float32"),
    ("frequency_penalty", 1e-300, "invalid_value", "float32"),
    ("logit_bias", {"1": 1e-46}, "invalid_value", "float32"),
    ("presence_penalty", -3, "invalid_value", "[-2.0, 2.0]"),
    ("frequency_penalty", 3, "invalid_value", "[-2.0, 2.0]"),
    ("n", 0, "invalid_value", "1"),
    ("n", 17, "invalid_value", "16"),
    ("n", 10**30, "invalid_value", "16"),
    ("n", True, "invalid_type", "integer"),
    ("n", "2", "invalid_type", "integer"),
    ("max_tokens", -1, "invalid_value", "-1"),
    ("max_tokens", 10**6, "context_length_exceeded", "512"),
    ("min_tokens", 2, "invalid_value", "[0, 1]"),
    ("seed", 2**63, "invalid_value", "9223372036854775808"),
    ("seed", 1.0, "invalid_type", "integer"),
    ("stop", "", "invalid_value", "1024"),
    ("stop", "x" * 1025, "invalid_value", "1024"),
    ("stop", ["x"] * 17, "invalid_value", "16"),
    ("stop", [1], "invalid_type", "string"),
    ("stop", {"a": 1}, "invalid_type", "string"),
    ("stop_token_ids", [10**9], "invalid_value", "1000000000"),
    ("stop_token_ids", [-1], "invalid_value", "-1"),
    ("stop_token_ids", [1] * 129, "invalid_value", "128"),
    ("logit_bias", {"x": 1}, "invalid_value", "token id"),
    ("logit_bias", {"-1": 1}, "invalid_value", "token id"),
    ("logit_bias", {"99999999": 1}, "invalid_value", "99999999"),
    ("logit_bias", {"1": 101}, "invalid_value", "100"),
    ("logit_bias", [1], "invalid_type", "dictionary"),
    ("stream", 1, "invalid_type", "boolean"),
    ("stream_options", {"include_usage": True}, "invalid_value", "stream"),
    ("user", "x" * 513, "invalid_value", "512"),
    ("metadata", {"a": 1}, "invalid_type", "string"),
    ("model", "", "invalid_value", "1"),
    ("model", None, "invalid_type", "string"),
    ("frobnicate", 1, "unknown_parameter", "frobnicate"),
    ("ignore_eos", "yes", "invalid_type", "boolean"),
]

COMPLETION_ONLY: list[tuple[str, Any, str, str]] = [
    ("suffix", "end", "unsupported_parameter", "suffix"),
    ("best_of", 2, "invalid_value", "best_of"),
    ("logprobs", 21, "invalid_value", "20"),
    ("logprobs", True, "invalid_type", "integer"),
    ("max_tokens", 0, "invalid_value", "echo"),
    ("prompt", [], "invalid_type", "prompt"),
    ("prompt", None, "invalid_type", "prompt"),
    ("prompt", 5, "invalid_type", "prompt"),
    ("prompt", [[]], "invalid_value", "1 token"),
    ("prompt", "", "invalid_value", "1 token"),
    ("prompt", [1, "a"], "invalid_type", "integers"),
    ("prompt", [1, True], "invalid_type", "integers"),
    ("prompt", [1.0], "invalid_type", "prompt"),
    ("prompt", [-1], "invalid_value", "-1"),
    ("prompt", [10**12], "invalid_value", "1000000000000"),
    ("prompt", ["x"] * 65, "invalid_value", "64"),
    ("prompt", [1] * 513, "context_length_exceeded", "512"),
    ("prompt", "x " * 100_000, "context_length_exceeded", "characters"),
    ("prompt", "\ud800", "invalid_value", "Unicode"),
    ("messages", [], "unknown_parameter", "messages"),
]

CHAT_ONLY: list[tuple[str, Any, str, str]] = [
    ("tools", {"type": "function"}, "invalid_type", "list"),
    ("tool_choice", "required", "invalid_value", "tools"),
    ("functions", [{"name": "f"}], "unsupported_parameter", "functions"),
    ("response_format", {"type": "structural_tag"}, "invalid_value", "response_format.type"),
    ("response_format", {"type": "json_schema"}, "invalid_value", "response_format.json_schema is required"),
    ("modalities", ["audio"], "unsupported_parameter", "modalities"),
    ("reasoning_effort", "high", "unsupported_parameter", "reasoning_effort"),
    ("web_search_options", {}, "unsupported_parameter", "web_search_options"),
    ("top_logprobs", 2, "invalid_value", "logprobs"),
    ("logprobs", 1, "invalid_type", "boolean"),
    ("max_tokens", 0, "invalid_value", "1"),
    ("max_completion_tokens", 2, "invalid_value", "send only one"),
    ("messages", [], "invalid_value", "1"),
    ("messages", "hello", "invalid_type", "list"),
    ("prompt", "hello", "unknown_parameter", "prompt"),
    ("echo", True, "unknown_parameter", "echo"),
]

# what is inside messages[0], the field named, code
MESSAGES: list[tuple[dict[str, Any], str, str]] = [
    ({"role": "tool", "content": "x"}, "messages.0", "invalid_value"),
    ({"role": "function", "content": "x"}, "messages.0.role", "invalid_value"),
    ({"role": "user"}, "messages.0.content", "missing_required_parameter"),
    ({"role": "user", "content": None}, "messages.0.content", "invalid_type"),
    ({"role": "user", "content": []}, "messages.0.content", "invalid_type"),
    ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content", "unsupported_value"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content", "invalid_value"),
    ({"role": "user", "content": ["x"]}, "messages.0.content", "invalid_type"),
    (
        {"role": "assistant", "content": "x", "tool_calls": [{}]},
        "messages.0.tool_calls.0.id",
        "missing_required_parameter",
    ),
    ({"role": "user", "content": "x", "colour": 1}, "messages.0.colour", "unknown_parameter"),
]

BOTH_ROUTES = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]


def refusal(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    # httpx refuses to send infinities and lone surrogates; json.dumps does not
    headers = {"content-type": "application/json"}
    response = client.post(path, content=json.dumps(body).replace("Infinity", "1e999"), headers=headers)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(("path", "good"), BOTH_ROUTES)
@pytest.mark.parametrize(("field", "value", "code", "words"), BOTH)
def test_shared_field_is_refused_by_name(
    client: httpx.Client, path: str, good: dict[str, Any], field: str, value: Any, code: str, words: str
) -> None:
    error = refusal(client, path, {**good, field: value})
    assert error["code"] == code
    assert words in error["message"]
    named = {error["param"], *error["message"].replace(":", " ").split()}
    assert field in named or error["param"].startswith(f"{field}.") or code == "context_length_exceeded"


@pytest.mark.parametrize(("field", "value", "code", "words"), COMPLETION_ONLY)
def test_completion_field_is_refused_by_name(
    client: httpx.Client, field: str, value: Any, code: str, words: str
) -> None:
    error = refusal(client, "/v1/completions", {**COMPLETION, field: value})
    assert (error["param"], error["code"]) == (field, code)
    assert words in error["message"]


@pytest.mark.parametrize(("field", "value", "code", "words"), CHAT_ONLY)
def test_chat_field_is_refused_by_name(client: httpx.Client, field: str, value: Any, code: str, words: str) -> None:
    error = refusal(client, "/v1/chat/completions", {**CHAT, field: value})
    assert error["code"] == code
    assert error["param"].partition(".")[0] in (field, "max_tokens")
    assert words in error["message"]


@pytest.mark.parametrize(("message", "param", "code"), MESSAGES)
def test_message_is_refused_by_its_place(client: httpx.Client, message: dict[str, Any], param: str, code: str) -> None:
    error = refusal(client, "/v1/chat/completions", {**CHAT, "messages": [message]})
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(("path", "field"), [(path, field) for path, good in BOTH_ROUTES for field in list(good)[:2]])
def test_missing_field_is_named(client: httpx.Client, path: str, field: str) -> None:
    error = refusal(client, path, {name: value for name, value in dict(BOTH_ROUTES)[path].items() if name != field})
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"model": "tiny"', "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "JSON object"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"model": "tiny", "prompt": "x", "temperature": -Infinity}', "Infinity"),
        (b'{"model": "tiny", "prompt": "x", "prompt": "y"}', "duplicate key 'prompt': given 2 times"),
        (b'{"model": "tiny", "prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests deeper"),
        (b'{"prompt": ' + b"[" * 30 + b"]" * 30 + b"}", "nests deeper"),
        (b'{"n": ' + b"9" * 5000 + b"}", "too long"),
    ],
)
def test_malformed_json_is_refused(client: httpx.Client, text: bytes, words: str) -> None:
    response = client.post("/v1/completions", content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_refused(client: httpx.Client, content_type: str) -> None:
    response = client.post("/v1/completions", content=b"{}", headers={"content-type": content_type})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


def test_prompts_times_n_is_bounded(client: httpx.Client) -> None:
    error = refusal(client, "/v1/completions", {**COMPLETION, "prompt": ["x"] * 10, "n": 13})
    assert error["param"] == "n"
    assert "128" in error["message"]
    assert "130" in error["message"]


def test_a_prompt_that_fills_the_context_is_refused_with_both_counts(
    client: httpx.Client, engine: EngineClient
) -> None:
    body = {**COMPLETION, "prompt": [300] * engine.max_model_len}
    error = refusal(client, "/v1/completions", body)
    assert error["code"] == "context_length_exceeded"
    assert f"{engine.max_model_len} in the prompt and 1 for the completion" in error["message"]


def test_a_long_value_is_not_repeated_whole(client: httpx.Client) -> None:
    error = refusal(client, "/v1/completions", {**COMPLETION, "user": "secret" * 1000})
    assert len(error["message"]) < 300


@pytest.mark.parametrize("model", ["nobody", "nobody@1", "law@0", "law@x", "globex/law", "../etc", "a/b/c", "@", "é"])
def test_unknown_model_is_a_404_and_never_the_bases_answer(client: httpx.Client, model: str) -> None:
    response = client.post("/v1/completions", json={**COMPLETION, "model": model})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {**COMPLETION, "prompt": "the née 中"}, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": ["hello", "née 中"]}, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": [10, 417]}, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": "née 中", "echo": True, "max_tokens": 0, "logprobs": 1}, "prompt"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "née 中"}]}, "messages"),
        ("/v1/chat/completions", {**CHAT, "messages": CHAT["messages"], "logit_bias": {"417": 1}}, "logit_bias"),
        ("/v1/completions", {**COMPLETION, "stop_token_ids": [417]}, "stop_token_ids"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_the_model_has_no_embedding_row_for_is_refused_by_name(
    client: httpx.Client,
    fake_engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    param: str,
    stream: bool,
) -> None:
    monkeypatch.setattr(fake_engine, "vocabulary", fake_engine.tokenizer.vocabulary(417))
    error = refusal(client, path, {**body, "stream": stream})
    assert (error["param"], error["code"]) == (param, "invalid_value")
    words = "token id 417 is 'née 中', for which the model has no embedding row (it has 417)"
    assert error["message"] == f"{param}: {words}"


CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
LISTED = {"type": "array"}  # a schema that no tool may have


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("completions", {"prompt": "hi", "guided_json": 5}, "guided_json"),
        ("chat/completions", {"tool_choice": "sometimes"}, "tool_choice"),
        ("chat/completions", {"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ("chat/completions", {"metadata": {"a": 5}}, "metadata.a"),
        ("responses", {"input": [{"role": "user", "content": 5}]}, "input.0.content"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "text"}]}]}, "input.0.content.0.text"),
        ("responses", {"input": [{"role": "user", "content": "x", "odd": 1}]}, "input.0.odd"),
        (
            "responses",
            {
                "instructions": "Be brief.",
                "input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "[]"}],
            },
            "input.0.arguments",
        ),
        (
            "responses",
            {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": LISTED}]},
            "tools.0.parameters",
        ),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": 5}]}]},
            "messages.0.content.0.signature",
        ),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0"),
        ("messages", {"system": "Be brief.", "messages": [{"role": "user", "content": [CALL]}]}, "messages.0"),
        ("messages", {"tools": [{"name": "f", "input_schema": LISTED}]}, "tools.0.input_schema"),
    ],
)
def test_a_refusal_names_the_field_as_the_client_sent_it(
    client: httpx.Client, route: str, fields: dict[str, Any], param: str
) -> None:
    """Also a field that may have several forms, and one that becomes a part of a chat."""
    limit = {"responses": "max_output_tokens"}.get(route, "max_tokens")
    prompt = {} if route in ("completions", "responses") else {"messages": CHAT["messages"]}
    response = client.post(f"/v1/{route}", json={"model": "tiny", limit: 1, **prompt, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["message"].startswith((f"{param}: ", f"Unknown parameter: '{param}'", "Missing required")), error
