"""Constrained answers over HTTP: the real engine with a tiny random base, the stock openai client, two tenants."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from server.api.engine_client import EngineClient
from server.engine.grammar.check_pool import CheckPool
from server.engine.grammar.refusals import Refusal
from server.engine.grammar.spec import GrammarSpec

ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 80, "temperature": 1.0, "seed": 7}
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["law", "med"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}
AS_FORMAT = {"type": "json_schema", "json_schema": {"name": "case", "schema": SCHEMA, "strict": True}}


class Case(BaseModel):
    kind: Literal["law", "med"]
    urgent: bool


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


def completed(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={**ASK, "prompt": "a case", **fields})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def refused(client: httpx.Client, **fields: Any) -> tuple[str, str, str]:
    body = json.dumps({**ASK, "messages": HELLO, **fields})  # escaped: httpx cannot send a lone surrogate
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    return error["code"], error["param"], error["message"]


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": AS_FORMAT}, r"\{\s*\"n\"\s*:\s*\d+\s*,\s*\"kind\"\s*:\s*\"(law|med)\"\s*\}"),
        ({"guided_json": SCHEMA}, r"\{\s*\"n\"\s*:\s*\d+\s*,\s*\"kind\"\s*:\s*\"(law|med)\"\s*\}"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}}, r"\{\"n\":\d+,\S+\}"),
        ({"structured_outputs": {"regex": "[a-c]{5}x"}}, "[a-c]{5}x"),
        ({"guided_regex": "[0-9]{3}-[0-9]{2}"}, "[0-9]{3}-[0-9]{2}"),
        ({"structured_outputs": {"choice": ["yes", "no \"quoted\"", "né\n"]}}, "yes|no \"quoted\"|né\n"),
        ({"guided_choice": ["only this"]}, "only this"),
        ({"structured_outputs": {"grammar": 'start: "a" /[0-9]+/ "b"'}}, "a[0-9]+b"),
        ({"guided_grammar": 'root ::= "x" ("y" | "z") "!"'}, "x[yz]!"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)  # fmt: skip
def test_each_field_constrains_the_answer(client: httpx.Client, fields: dict[str, Any], pattern: str) -> None:
    choice = completed(client, **fields)
    assert choice["finish_reason"] in ("stop", "length")
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, choice["text"])
    else:
        assert choice["text"].startswith(("{", "a"))


def test_the_stock_client_parses_an_answer_into_its_own_model(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.parse(model="tiny", messages=HELLO, response_format=Case, max_tokens=200, n=3)  # type: ignore[arg-type]
    assert all(isinstance(choice.message.parsed, Case) for choice in answer.choices)


def test_the_stock_clients_stream_ends_with_the_parsed_model(ai: openai.OpenAI) -> None:
    with ai.chat.completions.stream(model="tiny", messages=HELLO, response_format=Case, max_tokens=200) as stream:  # type: ignore[arg-type]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Case)
    assert final.choices[0].finish_reason == "stop"


def test_a_json_object_is_one(client: httpx.Client) -> None:
    bias = {str(id_): 8 for id_ in range(80, 100)}
    body = {**ASK, "messages": HELLO, "max_tokens": 300, "response_format": {"type": "json_object"}, "logit_bias": bias}
    choices = client.post("/v1/chat/completions", json={**body, "n": 4}).json()["choices"]
    assert all(choice["message"]["content"].startswith("{") for choice in choices)
    for choice in choices:
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_an_adapters_answer_is_constrained_as_the_bases_is(client: httpx.Client, upload: Any) -> None:
    assert upload(client, "law", seed=4).status_code == 201
    assert completed(client, model="law", guided_choice=["only this"])["text"] == "only this"


def test_free_text_stays_free(client: httpx.Client) -> None:
    free = client.post("/v1/chat/completions", json={**ASK, "messages": HELLO}).json()["choices"]
    as_text = {**ASK, "messages": HELLO, "response_format": {"type": "text"}}
    assert client.post("/v1/chat/completions", json=as_text).json()["choices"] == free


def test_a_refused_grammar_is_a_named_400_that_quotes_nothing(client: httpx.Client) -> None:
    unique = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"uniqueItems": True, "title": "secret"}}}
    for fields, code, param in (
        ({"response_format": unique}, "unsupported_grammar", "response_format"),
        ({"guided_regex": "secret((("}, "invalid_grammar", "guided_regex"),
        ({"guided_regex": "\ud800"}, "invalid_value", "guided_regex"),
        ({"structured_outputs": {"grammar": "start: secret"}}, "invalid_grammar", "structured_outputs.grammar"),
        ({"guided_json": "secret"}, "invalid_grammar", "guided_json"),
        ({"guided_regex": "x" * 70_000}, "grammar_too_complex", "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["secret"]}}, "invalid_value", "structured_outputs.choice"),
        ({"guided_regex": "a", "response_format": AS_FORMAT}, "invalid_value", "guided_regex"),
        ({"structured_outputs": {"json": {}, "json_object": True}}, "invalid_value", "structured_outputs.json_object"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "unsupported_parameter", "structured_outputs.structural_tag"),
        ({"guided_choice": []}, "invalid_value", "guided_choice"),
        ({"guided_choice": [""]}, "invalid_value", "guided_choice.0"),
    ):
        found = refused(client, **fields)
        assert found[:2] == (code, param), found
        assert "secret" not in found[2]


def test_one_tenants_grammar_changes_no_other_tenants_answers(client: httpx.Client, other: httpx.Client) -> None:
    plain = completed(other, temperature=0)["text"]
    assert completed(client, guided_regex="acme-secret-[0-9]")["text"].startswith("acme-secret-")
    assert completed(other, temperature=0)["text"] == plain
    response = other.post("/v1/completions", json={**ASK, "prompt": "x", "guided_regex": "((("})
    assert "acme" not in response.text


def test_a_grammar_that_is_still_compiling_holds_back_no_other_answer(
    client: httpx.Client, other: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own request waits for it; free and constrained ones of both tenants are answered meanwhile."""
    slow, check = "[a-d]{4}slow", CheckPool.check
    has_begun, may_end = threading.Event(), threading.Event()

    def check_when_allowed(pool: CheckPool, tenant: str, spec: GrammarSpec) -> str | Refusal:
        if spec.text == slow:
            has_begun.set()
            assert may_end.wait(300)
        return check(pool, tenant, spec)

    monkeypatch.setattr(CheckPool, "check", check_when_allowed)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(completed, client, guided_regex=slow)
        try:
            assert has_begun.wait(300)
            assert completed(client)["finish_reason"] == "length"
            assert completed(other)["finish_reason"] == "length"
            assert re.fullmatch("[e-h]{4}quick", completed(other, guided_regex="[e-h]{4}quick")["text"])
            assert not waiting.done()
        finally:
            may_end.set()
        assert re.fullmatch(slow, waiting.result(300)["text"])
