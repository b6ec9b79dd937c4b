"""POST /v1/responses over the real engine, through the stock openai client: whole, streamed, parsed, with tools."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from server.engine.startup.generation_config import SamplingDefaults

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
ASK: dict[str, Any] = {"model": "tiny", "input": "Rain?", "max_output_tokens": 80, "temperature": 1.0}
FORCED: dict[str, Any] = {**ASK, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


# Required by the ResponseResource of Open Responses' OpenAPI description, which llm-comply brings.
REQUIRED = """id object created_at completed_at status incomplete_details model previous_response_id instructions output
error tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty top_logprobs
temperature reasoning usage max_output_tokens max_tool_calls store background service_tier metadata safety_identifier
prompt_cache_key"""
NUMBERS = ("top_p", "presence_penalty", "frequency_penalty", "top_logprobs", "temperature")


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    sure: bool


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


def test_a_text_is_answered_and_streamed_in_the_official_order(ai: openai.OpenAI) -> None:
    fields: dict[str, Any] = {**ASK, "instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0}
    whole = ai.responses.create(**fields)
    assert (whole.object, whole.model, whole.instructions, whole.store) == ("response", "tiny", "Be brief.", False)
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert (whole.status, whole.incomplete_details is None) in [("completed", True), ("incomplete", False)]
    events = list(ai.responses.create(**fields, stream=True))
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert set(types[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert last.response.usage.total_tokens == whole.usage.total_tokens


def test_a_response_has_every_field_that_its_description_requires(client: httpx.Client) -> None:
    fields = {"model": "tiny", "input": "Rain?", "max_output_tokens": 2}
    whole = client.post("/v1/responses", json=fields).json()
    stream = client.post("/v1/responses", json={**fields, "stream": True}).text
    sent = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    for response in (whole, sent[0]["response"], sent[-1]["response"]):
        assert set(REQUIRED.split()) - set(response) == set()
        assert all(isinstance(response[name], int | float) for name in NUMBERS)
        assert (response["completed_at"] is not None) == (response["status"] == "completed")


def test_a_required_tool_is_called_and_its_result_goes_back(ai: openai.OpenAI) -> None:
    fields: dict[str, Any] = {**FORCED, "temperature": 0}
    answer = ai.responses.create(**fields)
    [call] = answer.output
    assert call.type == "function_call"
    assert call.name == "weather"
    jsonschema.validate(json.loads(call.arguments), CITY)
    with ai.responses.stream(**fields) as stream:
        types = [event.type for event in stream]
        [streamed] = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    assert types[2] == "response.output_item.added"
    assert types[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "wet"}
    history: Any = [{"role": "user", "content": "Rain?"}, call, result]
    after = ai.responses.create(**{**ASK, "input": history, "max_output_tokens": 3}, tools=[TOOL])
    before = ai.responses.create(**{**ASK, "max_output_tokens": 3}, tools=[TOOL])
    assert after.usage is not None
    assert before.usage is not None
    assert after.usage.input_tokens > before.usage.input_tokens


def test_a_structured_answer_is_parsed(ai: openai.OpenAI) -> None:
    answer = ai.responses.parse(**ASK, text_format=Weather)
    assert isinstance(answer.output_parsed, Weather)
    as_object = ai.responses.create(**{**ASK, "max_output_tokens": 40}, text={"format": {"type": "json_object"}})
    assert as_object.output_text.startswith("{")


def test_it_is_the_chat_of_the_same_words(client: httpx.Client, ai: openai.OpenAI) -> None:
    told = ai.responses.create(**{**ASK, "temperature": 0, "instructions": "Be brief.", "max_output_tokens": 10})
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    chat = ai.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=10)
    assert told.output_text == chat.choices[0].message.content
    again: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]}, *told.output]
    again.append({"role": "user", "content": "Sure?"})
    later = ai.responses.create(**{**ASK, "input": again, "max_output_tokens": 3})
    assert later.usage is not None
    assert told.usage is not None
    assert later.usage.input_tokens > told.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"max_output_tokens": 100_000}, "input"),
        ({"temperature": 9.0}, "temperature"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"seed": 1}, "seed"),
    ],
)
def test_what_it_cannot_do_is_refused_by_its_own_names(
    client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    answer = client.post("/v1/responses", json={**ASK, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param), error
    assert param.split(".", maxsplit=1)[0] in error["message"], error


def test_a_response_repeats_the_parameters_that_made_it(
    engine: EngineClient, store: AdapterStore, keys: dict[str, str], data_dir: Path
) -> None:
    """What the client leaves out is the operator's default, and not OpenAI's."""
    defaults = SamplingDefaults(temperature=0.5, top_p=0.75)
    app = create_app(engine=engine, store=store, settings=ApiSettings(data_dir=data_dir, sampling_defaults=defaults))

    async def ask(**fields: Any) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {keys['acme']}"}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://app", headers=headers
        ) as client:
            body = {"model": "tiny", "input": "Rain?", "max_output_tokens": 2, **fields}
            return dict((await client.post("/v1/responses", json=body)).json())

    answer = asyncio.run(ask())
    assert (answer["temperature"], answer["top_p"]) == (0.5, 0.75)
    assert asyncio.run(ask(temperature=1.5))["temperature"] == 1.5
