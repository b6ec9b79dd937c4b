"""GET /v1/models, and what `model` may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx

from adapters_store.store import AdapterStore
from server.api.engine_client import EngineClient
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, write


def test_list_has_the_base_and_the_callers_adapters(
    client: httpx.Client, other: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    upload(client, "listed")
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    by_id = {model["id"]: model for model in body["data"]}
    assert by_id["tiny"]["parent"] is None
    assert by_id["listed"]["parent"] == "tiny"
    assert by_id["listed"]["owned_by"] == "acme"
    assert by_id["listed"].keys() == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
    assert [model["id"] for model in other.get("/v1/models").json()["data"]] == ["tiny"]


def test_every_way_to_say_it_finds_the_same_version(
    client: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    name = "ft:tiny:acme:suffix:1"
    digest = upload(client, name, seed=3).json()["digest"]
    for model in (name, f"{name}@1", f"acme/{name}", f"acme/{name}@1"):
        shown = client.get(f"/v1/models/{model}")
        assert shown.status_code == 200, shown.text
        assert (shown.json()["id"], shown.json()["root"]) == (model, digest)


def test_the_answer_repeats_the_model_as_it_was_asked_for(
    client: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    upload(client, "echoed")
    for model in ("echoed", "echoed@1", "acme/echoed"):
        answer = client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1}).json()
        assert answer["model"] == model


def test_someone_elses_model_reads_like_an_unknown_one(
    client: httpx.Client, other: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    upload(client, "private")
    for model in ("acme/private", "private"):
        theirs, unknown = other.get(f"/v1/models/{model}"), other.get(f"/v1/models/{model}-not")
        assert theirs.status_code == unknown.status_code == 404
        assert theirs.json()["error"]["message"].replace(model, "") == unknown.json()["error"]["message"].replace(
            f"{model}-not", ""
        )


def test_each_version_answers_as_itself_and_the_bare_name_as_the_last(
    client: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    for seed in (1, 2):
        upload(client, "versioned", seed=seed)

    def say(model: str) -> str:
        body = {"model": model, "prompt": "hello", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    assert say("versioned") == say("versioned@2")
    assert say("versioned") != say("versioned@1")


def test_an_adapter_of_another_base_is_refused_and_not_listed(
    client: httpx.Client, store: AdapterStore, engine: EngineClient, tmp_path: Path
) -> None:
    foreign = replace(engine.base, digest="sha256:" + "0" * 64)
    weights = write(tmp_path / "w.safetensors", safetensors_bytes(lora_tensors(foreign)))
    store.publish(tenant="acme", name="foreign", config=config_bytes(), weights=weights, base=foreign)
    response = client.post("/v1/completions", json={"model": "foreign", "prompt": "x"})
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "base_mismatch"
    assert "foreign" not in {model["id"] for model in client.get("/v1/models").json()["data"]}
