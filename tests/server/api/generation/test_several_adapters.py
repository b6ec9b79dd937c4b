"""`model` as a list of adapters with weights, on every route for text: what is answered, under whose name, what not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters_store.store import AdapterStore
from server.api.engine_client import EngineClient
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from support.servers.waiting import wait_until

ASK: dict[str, Any] = {"prompt": "the tenant's lease", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
MIX = [{"name": "law", "weight": 0.7}, {"name": "med", "weight": -0.3}]
HEADER = "x-multilora-adapter-version"


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


@pytest.fixture(scope="module", autouse=True)
def adapters(client: httpx.Client, other: httpx.Client, upload: Callable[..., httpx.Response]) -> None:
    for name, seed in (("law", 1), ("med", 2), ("third", 3)):
        assert upload(client, name, seed=seed).status_code == 201
    assert upload(client, "judge", seed=4, alora_invocation_tokens=[70, 71]).status_code == 201
    assert upload(client, "caller", seed=5, fields={"tool_dialect": "hermes"}).status_code == 201
    assert upload(other, "theirs", seed=6).status_code == 201


def say(client: httpx.Client, model: Any, **changes: Any) -> str:
    response = client.post("/v1/completions", json={**ASK, "model": model, **changes})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def error_of(client: httpx.Client, model: Any) -> tuple[int, str, str, str]:
    response = client.post("/v1/completions", json={**ASK, "model": model})
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"], error["message"]


def test_every_route_answers_and_names_what_ran(client: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": "lease"}], "max_tokens": 4}
    for route, body in {
        "completions": ASK,
        "chat/completions": chat,
        "responses": {"input": "lease", "max_output_tokens": 4},
        "messages": chat,
        "embeddings": {"input": "lease"},
    }.items():
        answer = client.post(f"/v1/{route}", json={**body, "model": MIX})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "0.7*law + -0.3*med"
        assert answer.headers[HEADER] == "0.7*law@1 + -0.3*med@1"
    streamed = client.post("/v1/completions", json={**ASK, "model": MIX, "stream": True})
    chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    assert {chunk["model"] for chunk in chunks} == {"0.7*law + -0.3*med"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == say(client, MIX)
    counted = client.post("/v1/messages/count_tokens", json={"model": MIX, "messages": chat["messages"]})
    assert counted.json()["input_tokens"] > 0


def test_weights_decide_and_their_order_does_not(client: httpx.Client) -> None:
    answers = {say(client, model) for model in ("tiny", "law", "med", MIX, [{**MIX[0], "weight": 2}, MIX[1]])}
    assert len(answers) == 5
    assert say(client, MIX[::-1]) == say(client, MIX)
    assert say(client, [{"name": "law"}]) == say(client, "law")
    assert say(client, [{"name": "law", "weight": 0}]) == say(client, "tiny")
    half = [{"name": "law@1", "weight": 0.5}]
    assert say(client, half) != say(client, "law")


@pytest.mark.parametrize(
    ("model", "code", "param", "words"),
    [
        ([], "invalid_value", "model", "at least 1"),
        ([{"name": f"a{index}"} for index in range(5)], "invalid_value", "model", "at most 4"),
        ([{"name": "law"}, {"name": "law", "weight": 2}], "invalid_value", "model", "'law' more than once"),
        ([{"name": "law", "weight": "1"}], "invalid_type", "model.0.weight", "number, got '1'"),
        ([{"name": "law", "weight": True}], "invalid_type", "model.0.weight", "number, got True"),
        ([{"name": "law"}, {"name": "med", "weight": 100.5}], "invalid_value", "model.1.weight", "100, got 100.5"),
        ([{"name": "law", "weight": None}], "invalid_type", "model.0.weight", "number"),
        ([{"name": ""}], "invalid_value", "model.0.name", "at least 1 character"),
        ([{"weight": 1}], "missing_required_parameter", "model.0.name", "Missing"),
        ([{"name": "law", "wight": 1}], "unknown_parameter", "model.0.wight", "Unknown"),
        (["law", "med"], "invalid_type", "model.0", "got 'law'"),
        ({"name": "law"}, "invalid_type", "model", "string"),
        ([{"name": "law"}, {"name": "law@1"}], "adapters_not_combinable", "model", "the same version"),
        ([{"name": "law"}, {"name": "tiny"}], "adapters_not_combinable", "model", "the base is in every answer"),
        ([{"name": "law"}, {"name": "judge"}], "adapters_not_combinable", "model", "alora_invocation_tokens"),
        ([{"name": "law"}, {"name": "caller"}], "adapters_not_combinable", "model", "tool dialects"),
    ],
)
def test_a_list_that_means_nothing_is_refused(
    model: Any, code: str, param: str, words: str, client: httpx.Client
) -> None:
    status, *found, message = error_of(client, model)
    assert (status, *found) == (400, code, param)
    assert words in message, message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_weight_is_finite(number: str, client: httpx.Client) -> None:
    body = json.dumps({**ASK, "model": [{"name": "law", "weight": 7}]}).replace("7", number)
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_json", "invalid_value")


def test_another_tenants_adapter_does_not_exist_in_a_list(
    client: httpx.Client, other: httpx.Client, admin: httpx.Client
) -> None:
    for caller, name in ((client, "theirs"), (client, "globex/theirs"), (other, "law"), (other, "acme/law")):
        own = "law" if caller is client else "theirs"
        status, code, _, message = error_of(caller, [{"name": own}, {"name": name}])
        assert (status, code) == (404, "model_not_found")
        assert message == error_of(caller, name)[3]
    both = [{"name": "acme/law"}, {"name": "globex/theirs"}]
    status, code, _, message = error_of(admin, both)
    assert (status, code) == (400, "adapters_not_combinable")
    assert "different tenants" in message
    assert say(admin, [{**part, "name": f"acme/{part['name']}"} for part in MIX]) == say(client, MIX)


def test_ranks_add_up_to_256_at_most(client: httpx.Client, engine: EngineClient) -> None:
    for name, rank in (("wide", 200), ("wider", 56), ("widest", 57)):
        files = {
            "config": config_bytes(r=rank, lora_alpha=rank),
            "weights": safetensors_bytes(lora_tensors(engine.base, rank=rank)),
        }
        assert client.post("/v1/adapters", data={"name": name}, files=files).status_code == 201
    assert say(client, [{"name": "wide", "weight": 0.1}, {"name": "wider", "weight": 0.1}])
    status, code, _, message = error_of(client, [{"name": "wide"}, {"name": "widest"}])
    assert (status, code) == (400, "adapters_not_combinable")
    assert "257 together, at most 256" in message


def test_parts_have_the_bytes_of_one_upload_at_most(client: httpx.Client, app: FastAPI, store: AdapterStore) -> None:
    """They are in memory twice while they are added."""
    num_bytes = sum(store.resolve("acme", str(part["name"])).num_bytes for part in MIX)
    context = app.state.context
    app.state.context = replace(context, settings=replace(context.settings, max_adapter_bytes=num_bytes - 1))
    try:
        status, code, _, message = error_of(client, MIX)
    finally:
        app.state.context = context
    assert (status, code) == (400, "adapters_not_combinable")
    assert f"{num_bytes} bytes together, at most {num_bytes - 1}" in message


def test_usage_and_metrics_name_the_versions_without_weights(client: httpx.Client, admin: httpx.Client) -> None:
    for weight in (0.25, 0.5):
        say(client, [{"name": "third", "weight": weight}, {"name": "law"}])

    def requests() -> dict[str, int]:
        rows = client.get("/v1/usage").json()["data"]
        return {row["adapter"]: row["requests"] for row in rows}

    wait_until(lambda: requests().get("law@1+third@1") == 2)
    metrics = admin.get("/metrics").text
    assert 'multilora_sequences_total{adapter="law@1+third@1",tenant="acme"} 2.0' in metrics


def test_each_name_means_what_it_means_alone(client: httpx.Client, upload: Callable[..., httpx.Response]) -> None:
    assert upload(client, "moving", seed=31).status_code == 201
    mix = [{"name": "moving", "weight": 0.5}, {"name": "law"}]
    before = say(client, mix)
    assert upload(client, "moving", seed=32).status_code == 201
    assert say(client, mix) != before
    assert say(client, [{"name": "moving@1", "weight": 0.5}, {"name": "law"}]) == before
    assert client.delete("/v1/adapters/moving").status_code == 200
    assert error_of(client, mix)[:2] == (404, "model_not_found")


def test_a_deleted_part_frees_the_mixes_that_held_it(
    client: httpx.Client, engine: EngineClient, upload: Callable[..., httpx.Response]
) -> None:
    assert upload(client, "leaving", seed=41).status_code == 201
    say(client, [{"name": "leaving", "weight": 0.5}, {"name": "law"}])
    wait_until(lambda: any("leaving" in name for name in engine.stats().running_adapters))
    assert client.delete("/v1/adapters/leaving").status_code == 200
    wait_until(lambda: not any("leaving" in name for name in engine.stats().running_adapters))
