"""Tool calls and reasoning over HTTP: the real engine with a tiny random base, the stock openai client, two tenants.

A random model calls tools at random; what it writes follows the grammar, so every call is whole and valid.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from server.api.engine_client import EngineClient
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 80,
    "temperature": 1.0,
    "messages": [{"role": "user", "content": "Rain?"}],
}
THINKS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}<think>{% endif %}{# </think> #}"
)


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


def check_calls(calls: list[dict[str, Any]]) -> None:
    for call in calls:
        assert call["type"] == "function"
        assert call["function"]["name"] in ("weather", "now")
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, WEATHER if call["function"]["name"] == "weather" else {"maxProperties": 0})


def asked(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={**ASK, "tools": TOOLS, **fields})
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return dict(choice)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_or_named_tool_is_called_with_valid_arguments(client: httpx.Client, choice: Any) -> None:
    for seed in range(2):
        answer = asked(client, tool_choice=choice, parallel_tool_calls=False, seed=seed)
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        assert len(answer["message"]["tool_calls"]) == 1
        check_calls(answer["message"]["tool_calls"])
        if choice != "required":
            assert answer["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_streamed_calls_are_the_whole_ones(ai: openai.OpenAI) -> None:
    fields: dict[str, Any] = {**ASK, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 5}
    whole = ai.chat.completions.create(**fields).choices[0]
    names, arguments, reasons = [], "", []
    for chunk in ai.chat.completions.create(**fields, stream=True):
        [choice] = chunk.choices
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            assert call.function is not None
            if call.id is not None:
                names.append(call.function.name)
            arguments += call.function.arguments or ""
    assert whole.message.tool_calls is not None
    [call] = whole.message.tool_calls
    assert call.type == "function"
    assert (names, arguments) == ([call.function.name], call.function.arguments)
    assert reasons[-1] == whole.finish_reason == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_a_call_and_its_result_go_back_as_history(ai: openai.OpenAI) -> None:
    first = ai.chat.completions.create(**ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=1)
    message = first.choices[0].message
    assert message.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 degrees"}
    history: Any = [*ASK["messages"], message, result]
    answer = ai.chat.completions.create(**{**ASK, "messages": history, "max_tokens": 5}, tools=TOOLS)
    alone = ai.chat.completions.create(**{**ASK, "messages": history[:1], "max_tokens": 5}, tools=TOOLS)
    assert answer.usage is not None
    assert alone.usage is not None
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens


def test_a_call_that_is_replayed_without_arguments_is_one_without_arguments(ai: openai.OpenAI) -> None:
    """As clients keep a stream's call whose arguments brought no piece."""
    counts = []
    for arguments in ("", "{}"):
        call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": arguments}}
        result = {"role": "tool", "tool_call_id": "a", "content": "noon"}
        history: Any = [*ASK["messages"], {"role": "assistant", "tool_calls": [call]}, result]
        answer = ai.chat.completions.create(**{**ASK, "messages": history, "max_tokens": 1}, tools=TOOLS)
        assert answer.usage is not None
        counts.append(answer.usage.prompt_tokens)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function", "Missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "duplicate name weather"),
        ({"tools": [TOOLS[1]] * 129}, "tools", "128"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters",
            "object",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "tools", "not"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "only with tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice", "other"),
        ({"tool_choice": "sometimes"}, "tool_choice", "required"),
        ({"response_format": {"type": "json_object"}}, "response_format", "send only one"),
        ({"reasoning_budget": 5}, "reasoning_budget", "marks no reasoning"),
        ({"reasoning_budget": 5, "thinking_token_budget": 6}, "reasoning_budget", "differ"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages.0", "tool_call_id"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[]"}}]}
                ]
            },
            "messages.0.tool_calls",
            "JSON object",
        ),
    ],
)
def test_what_is_wrong_about_tools_is_refused_by_name(
    client: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    response = client.post("/v1/chat/completions", json={**ASK, "tools": TOOLS, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param), error
    assert words in error["message"], error


class Order(BaseModel):
    tags: set[str]  # for pydantic an array of unique items, which no grammar can hold to


def test_unique_items_are_a_note_of_a_tool_and_refused_if_it_is_strict(client: httpx.Client) -> None:
    tool: dict[str, Any] = {**openai.pydantic_function_tool(Order)}
    name, schema = tool["function"]["name"], tool["function"]["parameters"]
    assert schema["properties"]["tags"]["uniqueItems"] is True
    assert tool["function"]["strict"] is True
    hello = {"role": "user", "content": "x"}
    strict: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": [hello], "tools": [tool]},
        "responses": {"input": "x", "tools": [{"type": "function", **tool["function"]}]},
        "messages": {"messages": [hello], "tools": [{"name": name, "input_schema": schema, "strict": True}]},
    }
    for route, fields in strict.items():
        limit = "max_output_tokens" if route == "responses" else "max_tokens"
        response = client.post(f"/v1/{route}", json={"model": "tiny", limit: 4, **fields})
        assert response.status_code == 400, (route, response.text)
        assert "keywords that are not served: uniqueItems" in response.text
    loose = {"type": "function", "function": {**tool["function"], "strict": False}}
    answer = asked(client, tools=[loose], tool_choice="required", max_tokens=4, messages=[hello])
    assert answer["message"]["role"] == "assistant"


@pytest.fixture(scope="module")
def push(engine: EngineClient) -> Callable[..., httpx.Response]:
    """push(client, name, tool_dialect=..., chat_template=...): a small adapter with these parts beside it."""
    weights = safetensors_bytes(lora_tensors(engine.base, seed=0))

    def post(client: httpx.Client, name: str, **parts: str) -> httpx.Response:
        files = {"config": config_bytes(), "weights": weights} | {key: text.encode() for key, text in parts.items()}
        return client.post("/v1/adapters", data={"name": name}, files=files)

    return post


def test_two_tenants_call_tools_in_their_own_dialects_in_one_batch(
    push: Callable[..., httpx.Response], connect: Callable[..., httpx.Client], keys: dict[str, str]
) -> None:
    """Each answer is read in its own dialect only, whatever runs beside it."""
    acme, globex = connect(keys["acme"]), connect(keys["globex"])
    made = [
        push(acme, "hermes-tools", tool_dialect="hermes").json(),
        push(
            globex, "phi-tools", tool_dialect="phi", chat_template=THINKS.partition("<think>")[0] + "{% endif %}"
        ).json(),
    ]
    assert [each["tool_dialect"] for each in made] == ["hermes", "phi"]
    assert made[0]["chat_template"] is None
    assert made[1]["chat_template"].startswith("sha256:")
    assert acme.get("/v1/adapters/hermes-tools").json()["tool_dialect"] == "hermes"
    answers: list[dict[str, Any]] = []

    def ask(client: httpx.Client, model: str, seed: int) -> None:
        answers.append(asked(client, model=model, tool_choice="required", parallel_tool_calls=False, seed=seed))

    threads = [
        threading.Thread(target=ask, args=(client, model, seed))
        for seed in range(2)
        for client, model in ((acme, "hermes-tools"), (globex, "phi-tools"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    for answer in answers:
        assert answer["finish_reason"] == "tool_calls"
        check_calls(answer["message"]["tool_calls"])


def test_reasoning_is_kept_apart_whole_and_streamed(push: Callable[..., httpx.Response], client: httpx.Client) -> None:
    assert push(client, "thinker", chat_template=THINKS).status_code == 201
    fields = {**ASK, "model": "thinker", "tools": None, "max_tokens": 20, "seed": 3}
    whole = asked(client, **fields)["message"]
    assert whole["reasoning_content"]
    assert whole["content"] == ""
    streamed = ""
    with client.stream("POST", "/v1/chat/completions", json={**fields, "stream": True}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                streamed += json.loads(line[6:])["choices"][0]["delta"].get("reasoning_content", "")
    assert streamed == whole["reasoning_content"]


def test_a_hostile_template_is_bounded_and_its_words_stay_with_its_tenant(
    push: Callable[..., httpx.Response], connect: Callable[..., httpx.Client], keys: dict[str, str]
) -> None:
    acme, globex = connect(keys["acme"]), connect(keys["globex"])
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    refusals = {
        "x" * 65_537: "too_large",
        "{% if %}": "bad_chat_template",
        "{{ ''.__class__.__mro__ }}": "bad_chat_template",
        "{{ 'a' * 10 ** 10 }}": "bad_chat_template",
        loop: "bad_chat_template",
    }
    for template, code in refusals.items():
        answer = push(acme, "hostile", chat_template=template)
        assert answer.json()["error"]["code"] == code, answer.text
    assert push(acme, "odd", tool_dialect="klingon").json()["error"]["code"] == "unknown_tool_dialect"
    late = (
        "{% if messages[0].content == 'now' %}"
        + loop
        + "{% endif %}{{ raise_exception('SECRET of acme') if messages|length > 3 }}ok"
    )
    assert push(acme, "late", chat_template=late).status_code == 201
    slow = acme.post(
        "/v1/chat/completions", json={**ASK, "model": "late", "messages": [{"role": "user", "content": "now"}]}
    )
    assert slow.status_code == 400
    assert "processor time" in slow.json()["error"]["message"]
    own = acme.post("/v1/chat/completions", json={**ASK, "model": "late", "messages": ASK["messages"] * 4})
    assert "SECRET" in own.json()["error"]["message"]
    others = globex.post("/v1/chat/completions", json={**ASK, "model": "late", "messages": ASK["messages"] * 4})
    assert others.status_code == 404
    assert "SECRET" not in others.text


def test_the_script_of_the_page_runs(
    url: str, keys: dict[str, str], push: Callable[..., httpx.Response], client: httpx.Client
) -> None:
    assert push(client, "paged", tool_dialect="hermes").status_code == 201
    page = (Path(__file__).parents[4] / "docs" / "tools.md").read_text()
    script = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"url": url, "key": keys["acme"], "model": "paged"}
    exec(script, names)
    assert names["call"].function.name == "forecast"
    assert json.loads(names["call"].function.arguments)["city"] in ("Oslo", "Rome")
