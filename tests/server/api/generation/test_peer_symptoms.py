"""What users of vLLM and SGLang reported of tool calls, tried here: cut calls, ids, choices, stops, replays.

The same answer is asked for whole and streamed; a tiny random base calls at random, in the dialect of an adapter.
"""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from server.api.engine_client import EngineClient
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "day", "parameters": {"properties": {"n": {"enum": [1, 2]}}}}},
]
ASK: dict[str, Any] = {
    "model": "caller",
    "messages": [{"role": "user", "content": "Rain?"}],
    "tools": TOOLS,
    "tool_choice": "required",
    "temperature": 1.0,
}
ID = {"hermes": r"call_[0-9a-f]{24}", "mistral": r"[0-9a-zA-Z]{9}"}
Read = tuple[str, list[tuple[str, str]], str | None]  # content, calls, finish reason


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


@pytest.fixture(scope="module", params=list(ID))
def caller(request: pytest.FixtureRequest, engine: EngineClient, url: str, keys: dict[str, str]) -> Any:
    """The dialect, and a client of a tenant whose adapter `caller` speaks it."""
    files = {"config": config_bytes(), "weights": safetensors_bytes(lora_tensors(engine.base, seed=0))}
    files["tool_dialect"] = request.param.encode()
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {keys['acme']}"}, timeout=300) as client:
        assert client.post("/v1/adapters", data={"name": "caller"}, files=files).status_code == 201
        yield request.param, client


def whole(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/chat/completions", json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return sorted(response.json()["choices"], key=lambda choice: choice["index"])


def read(choice: dict[str, Any]) -> Read:
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["content"] or "", calls, choice["finish_reason"]


def streamed(client: httpx.Client, **fields: Any) -> dict[int, Read]:
    """By choice."""
    text = client.post("/v1/chat/completions", json={**ASK, **fields, "stream": True}).text
    assert text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    found: dict[int, Read] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        content, calls, _ = found.get(choice["index"], ("", [], None))
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append((call["function"]["name"], ""))
            name, arguments = calls[call["index"]]
            calls[call["index"]] = name, arguments + call["function"]["arguments"]
        content += choice["delta"].get("content") or ""
        found[choice["index"]] = content, calls, choice["finish_reason"]
    return found


def test_a_call_that_max_tokens_cuts_ends_with_length_streamed_too(caller: tuple[str, httpx.Client]) -> None:
    """vLLM 53269: streamed, a cut call was called complete; SGLang 31915: what was held back was lost."""
    _, client = caller
    [full] = whole(client, max_tokens=200, seed=2)
    _, calls, _ = read(full)
    assert calls
    for max_tokens in range(1, 41, 8):
        [choice] = whole(client, max_tokens=max_tokens, seed=2)
        content, some, reason = read(choice)
        assert streamed(client, max_tokens=max_tokens, seed=2) == {0: (content, some, reason)}
        assert not content or not some
        assert reason in ("length", "tool_calls")
        for (name, arguments), (own, given) in zip(some, calls, strict=False):
            assert name == own
            assert given.startswith(arguments)
            assert reason == "length" or arguments == given


def test_choices_have_their_own_calls_with_ids_that_the_template_takes(caller: tuple[str, httpx.Client]) -> None:
    """vLLM 47734: required calls, streamed, had ids that Mistral's template refuses; 11312: n > 1 broke the grammar."""
    dialect, client = caller
    choices = whole(client, max_tokens=200, seed=4, n=3)
    ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(ID[dialect], each) for each in ids)
    assert streamed(client, max_tokens=200, seed=4, n=3) == {choice["index"]: read(choice) for choice in choices}


@pytest.mark.parametrize("stop", ['"arguments"', "}"])
def test_a_stop_string_within_a_call_cuts_it_and_fails_nothing(caller: tuple[str, httpx.Client], stop: str) -> None:
    _, client = caller
    [choice] = whole(client, max_tokens=60, seed=5, stop=stop)
    assert streamed(client, max_tokens=60, seed=5, stop=stop) == {0: read(choice)}


def test_results_as_parts_and_calls_without_text_are_a_history(caller: tuple[str, httpx.Client]) -> None:
    """vLLM 25001: a result as a list of parts was refused; 38738: so was an assistant's turn of calls alone."""
    _, client = caller
    ids = ["a1b2c3d4e", "b1b2c3d4e"]
    calls = [{"id": id_, "type": "function", "function": {"name": "now", "arguments": "{}"}} for id_ in ids]
    results = [{"role": "tool", "tool_call_id": id_, "content": [{"type": "text", "text": "noon"}]} for id_ in ids]
    turns = [*ASK["messages"], {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    [choice] = whole(client, messages=turns, max_tokens=1)
    assert choice["finish_reason"] == "length"


def test_streamed_items_of_responses_hold_their_own_arguments_whole(caller: tuple[str, httpx.Client]) -> None:
    """vLLM 55284: arguments of one call came between those of another, in an item without a name."""
    _, client = caller
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    fields = {"model": "caller", "input": "Rain?", "tools": tools, "tool_choice": "required", "max_output_tokens": 200}
    text = client.post("/v1/responses", json={**fields, "stream": True}).text
    sent = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    arguments: dict[str, str] = {}
    for event in sent:
        match event["type"]:
            case "response.output_item.added":
                arguments[event["item"]["id"]] = ""
                assert event["item"]["name"] in ("now", "day")
            case "response.function_call_arguments.delta":
                assert event["item_id"] == list(arguments)[-1]
                arguments[event["item_id"]] += event["delta"]
    output = sent[-1]["response"]["output"]
    assert output
    assert {item["id"]: item["arguments"] for item in output} == arguments


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_reference", "tool_name": "now"}]},
        {"type": "tool_result", "content": "noon"},
        {"type": "tool_use", "id": "a", "name": "now"},
        {"type": "tool_use", "id": "a", "name": None, "input": {}},
        {"type": "image"},
    ],
)
def test_a_block_of_messages_that_is_not_served_is_named(caller: tuple[str, httpx.Client], block: Any) -> None:
    """vLLM 52489 and 47746: answered with 500."""
    _, client = caller
    messages = [{"role": "user", "content": "Rain?"}, {"role": "user", "content": [block]}]
    response = client.post("/v1/messages", json={"model": "caller", "max_tokens": 5, "messages": messages})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith("messages.1.content"), error


def test_an_adapter_is_deleted_after_answers_of_several_choices(caller: tuple[str, httpx.Client]) -> None:
    """SGLang 36894: after n > 1, an adapter's end stopped the server. The last test here: it deletes the adapter."""
    _, client = caller
    whole(client, max_tokens=8, n=8)
    assert client.delete("/v1/adapters/caller").status_code == 200
    assert client.post("/v1/chat/completions", json={**ASK, "max_tokens": 1}).status_code == 404
    base = {**ASK, "model": "tiny", "max_tokens": 4}
    assert client.post("/v1/chat/completions", json=base).status_code == 200
