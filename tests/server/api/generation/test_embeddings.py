"""POST /v1/embeddings over the real engine: the stock openai client's contract, tenants, quotas and usage."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoTokenizer

from server.api.engine_client import EngineClient
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from support.models.models import peft_model

TEXTS = ["the tenant's lease", "rain in Oslo", "a"]
Upload = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


def embed(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": "hello", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refusal(client: httpx.Client, status: int = 400, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/embeddings", json={"model": "tiny", "input": "hello", **fields})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def vectors(answer: dict[str, Any]) -> np.ndarray[Any, Any]:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return np.array([entry["embedding"] for entry in answer["data"]], dtype=np.float32)


def expected(base: Path, adapter: Path | None, pooling: str) -> np.ndarray[Any, Any]:
    """transformers and PEFT: their tokens, their hidden states, of length 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), peft_model(base, adapter)
    found = []
    for text in TEXTS:
        with torch.inference_mode():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
        pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
        found.append((pooled / pooled.norm()).numpy())
    return np.array(found)


def test_the_stock_client_gets_the_vectors_of_transformers_and_peft(
    ai: openai.OpenAI, client: httpx.Client, upload: Upload, engine: EngineClient, base_folder: Path, tmp_path: Path
) -> None:
    assert upload(client, "embedder", seed=3).status_code == 201
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_bytes(lora_tensors(engine.base, seed=3)))
    (tmp_path / "adapter_config.json").write_bytes(config_bytes())
    for pooling in ("last", "mean"):
        for model, adapter in (("tiny", None), ("embedder", tmp_path)):
            answer = ai.embeddings.create(model=model, input=TEXTS, extra_body={"pooling": pooling})
            found = np.array([entry.embedding for entry in answer.data], dtype=np.float32)
            assert np.abs(found - expected(base_folder, adapter, pooling)).max() <= 1e-4
            assert answer.model == model
            assert answer.usage.total_tokens == answer.usage.prompt_tokens > 3
            assert ai.embeddings.create(model=model, input=TEXTS[0], encoding_format="float").data[0].embedding


def test_encodings_lengths_and_dimensions(client: httpx.Client, engine: EngineClient) -> None:
    [[*whole]] = vectors(embed(client)).tolist()
    assert len(whole) == engine.base.hidden_size
    packed = embed(client, encoding_format="base64")["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), dtype="<f4").tolist() == whole
    [raw] = vectors(embed(client, normalize=False))
    assert np.allclose(raw / np.linalg.norm(raw), whole, atol=1e-6)
    [short] = vectors(embed(client, dimensions=5))
    assert np.allclose(short, raw[:5] / np.linalg.norm(raw[:5]), atol=1e-6)


def test_token_ids_and_texts_are_the_same_input(client: httpx.Client, engine: EngineClient) -> None:
    ids = engine.tokenizer.encode("hello")
    for given in ([ids, "hello"], [ids, ids]):
        one, other = vectors(embed(client, input=given))
        assert np.allclose(one, other, atol=1e-5)
    assert np.allclose(vectors(embed(client, input=ids)), one, atol=1e-5)


def test_the_answer_names_the_adapters_version_and_another_tenants_is_unknown(
    client: httpx.Client, other: httpx.Client, upload: Upload
) -> None:
    upload(client, "private", seed=4)
    answer = client.post("/v1/embeddings", json={"model": "private", "input": "x"})
    assert answer.headers["x-multilora-adapter-version"] == "private@1"
    assert answer.headers["x-request-id"]
    assert refusal(other, 404, model="private")["code"] == "model_not_found"


def test_usage_counts_its_tokens(client: httpx.Client) -> None:
    def total() -> dict[str, int]:
        found: dict[str, int] = client.get("/v1/usage").json()["total"]
        return found

    before = total()
    told = embed(client, input=TEXTS)["usage"]
    after = total()
    assert after["prompt_tokens"] - before["prompt_tokens"] == told["prompt_tokens"]
    assert after["requests"] - before["requests"] == 1
    assert after["completion_tokens"] == before["completion_tokens"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": []}, "input", "invalid_type"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": [1, 99999]}, "input", "invalid_value"),
        ({"input": ["x"] * 65}, "input", "invalid_value"),
        ({"input": [5] * 513}, "input", "context_length_exceeded"),
        ({"input": "word " * 600}, "input", "context_length_exceeded"),
        ({"dimensions": 65}, "dimensions", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "invalid_value"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"pooling": "cls"}, "pooling", "invalid_value"),
        ({"temperature": 1}, "temperature", "unknown_parameter"),
    ],
)
def test_what_is_refused_names_its_field(client: httpx.Client, fields: dict[str, Any], param: str, code: str) -> None:
    error = refusal(client, **fields)
    assert (error["param"], error["code"]) == (param, code), error["message"]


def test_a_quota_of_tokens_holds(admin: httpx.Client, other: httpx.Client) -> None:
    quota = admin.put("/admin/tenants/globex/quotas", json={"tokens_per_minute": 30})
    assert quota.status_code in (200, 204), quota.text
    try:
        assert refusal(other, 429, input=[[5] * 31])["code"] == "request_exceeds_quota"
    finally:
        admin.put("/admin/tenants/globex/quotas", json={})
