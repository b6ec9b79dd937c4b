"""POST /v1/messages over the real engine, through the stock anthropic client: whole, streamed, with tools, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pytest

from server.api.engine_client import EngineClient

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"name": "weather", "description": "Of a city.", "input_schema": CITY}
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 80, "messages": [{"role": "user", "content": "Rain?"}]}
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0.0}}  # a field that newer clients do not name
CHOICE = {"type": "any", "disable_parallel_tool_use": True}

# Required by Anthropic's OpenAPI description, which llm-comply brings.
REQUIRED = {
    "message": "id type role content model stop_reason stop_sequence stop_details usage container",
    "usage": """cache_creation cache_creation_input_tokens cache_read_input_tokens inference_geo input_tokens
    output_tokens output_tokens_details server_tool_use service_tier""",
    "tool_use": "caller id input name type",
    "delta": "container stop_details stop_reason stop_sequence",
}


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


@pytest.fixture(scope="module")
def claude(url: str, keys: dict[str, str]) -> Iterator[anthropic.Anthropic]:
    """The stock client: it sends the key as x-api-key."""
    with anthropic.Anthropic(base_url=url, api_key=keys["acme"], max_retries=0) as client:
        yield client


def test_a_text_is_answered_and_streamed_in_the_official_order(claude: anthropic.Anthropic, ai: openai.OpenAI) -> None:
    fields: dict[str, Any] = {**ASK, "system": "Be brief.", "max_tokens": 10, **GREEDY}
    whole = claude.messages.create(**fields)
    [block] = whole.content
    assert block.type == "text"
    messages: Any = [{"role": "system", "content": "Be brief."}, *ASK["messages"]]
    chat = ai.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=10)
    assert block.text == chat.choices[0].message.content
    assert (whole.type, whole.role, whole.model) == ("message", "assistant", "tiny")
    assert whole.stop_reason in ("max_tokens", "end_turn")
    raw = list(claude.messages.create(**fields, stream=True))
    types = [event.type for event in raw]
    assert types[:2] == ["message_start", "content_block_start"]
    assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(types[2:-3]) == {"content_block_delta"}
    with claude.messages.stream(**fields) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert chat.usage is not None
    assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens


def test_a_tool_is_called_and_its_result_goes_back(claude: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {**ASK, "tools": [TOOL], "tool_choice": CHOICE, **GREEDY}
    answer = claude.messages.create(**fields)
    assert answer.stop_reason == "tool_use"
    [call] = answer.content
    assert call.type == "tool_use"
    assert call.name == "weather"
    jsonschema.validate(call.input, CITY)
    with claude.messages.stream(**fields) as stream:
        for _ in stream:
            pass
        [streamed] = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "wet"}]}
    history: Any = [*ASK["messages"], {"role": "assistant", "content": answer.content}]
    history.append({"role": "user", "content": [result, {"type": "text", "text": "And now?"}]})
    after = claude.messages.count_tokens(model="tiny", messages=history, tools=[TOOL])
    before = claude.messages.count_tokens(model="tiny", messages=ASK["messages"], tools=[TOOL])
    assert after.input_tokens > before.input_tokens
    last = claude.messages.create(**{**ASK, "messages": history, "max_tokens": 3}, tools=[TOOL])
    assert last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0) == after.input_tokens


def test_a_message_has_every_field_that_its_description_requires(client: httpx.Client) -> None:
    fields = {**ASK, "tools": [TOOL], "tool_choice": CHOICE}
    whole = client.post("/v1/messages", json=fields).json()
    stream = client.post("/v1/messages", json={**fields, "stream": True}).text
    sent = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    begun = sent[0]["message"]
    [block] = [event["content_block"] for event in sent if event["type"] == "content_block_start"]
    [end] = [event for event in sent if event["type"] == "message_delta"]
    for kind, each in (
        *(("message", message) for message in (whole, begun)),
        *(("usage", usage) for usage in (whole["usage"], begun["usage"], end["usage"])),
        *(("tool_use", block) for block in (block, *whole["content"])),
        ("delta", end["delta"]),
    ):
        assert set(REQUIRED[kind].split()) - set(each) == set(), kind


def test_an_output_format_is_followed(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(**ASK, output_config={"format": {"type": "json_schema", "schema": CITY}})
    [block] = answer.content
    assert block.type == "text"
    jsonschema.validate(json.loads(block.text), CITY)


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(**{**ASK, "max_tokens": 30, **GREEDY})
    [block] = answer.content
    assert block.type == "text"
    stop = block.text[3:5]
    cut = claude.messages.create(**{**ASK, "max_tokens": 30, **GREEDY}, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)


def test_errors_come_in_the_clients_own_form(url: str, claude: anthropic.Anthropic, client: httpx.Client) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(**{**ASK, "model": "nobody"})
    body: Any = unknown.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0).messages.create(**ASK)
    with pytest.raises(anthropic.BadRequestError, match="stop_sequences"):
        claude.messages.create(**ASK, stop_sequences=[""])
    with pytest.raises(anthropic.BadRequestError, match="container"):
        claude.messages.create(**ASK, extra_body={"container": "x"})
    with pytest.raises(anthropic.BadRequestError, match="context length"):
        claude.messages.create(**{**ASK, "max_tokens": 2_000})
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content"):
        claude.messages.create(**{**ASK, "messages": image})
    twice = [("x-api-key", "a"), ("x-api-key", "b")]
    assert httpx.post(f"{url}/v1/messages", json=ASK, headers=twice).json()["error"]["code"] == "invalid_api_key"
    both = {"authorization": "Bearer wrong", "x-api-key": client.headers["authorization"].partition(" ")[2]}
    assert httpx.post(f"{url}/v1/messages", json=ASK, headers=both).status_code == 401, "one key decides"
    elsewhere = client.post("/v1/chat/completions", json={"model": "tiny"}).json()
    assert "type" not in elsewhere, "the form of one API does not reach another"
