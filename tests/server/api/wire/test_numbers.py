"""Numbers of any size, at every edge that takes one: refused by name with a 4xx, never a fault of the server."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from adapters_store.parsing.numbers import MAX_INT, is_within, whole_number
from server.api.wire.json_text import json_text
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base
from trainer.data.problems import LineRefused
from trainer.data.records import parse_record
from trainer.spec import SpecError, TrainSpec

HUGE = 10**399  # 400 digits: beyond every float
COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "logprobs": True}
JSON = {"content-type": "application/json"}

BOTH = (
    "n", "max_tokens", "min_tokens", "top_k", "seed", "temperature", "top_p", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip
JOB_FIELDS = ("n_epochs", "batch_size", "learning_rate_multiplier")
KNOBS = ("adapter.rank", "adapter.alpha", "adapter.dropout", "optim.learning_rate", "batch.examples", "mix_fraction")


def answer(client: httpx.Client, method: str, path: str, body: object) -> dict[str, Any]:
    """The error of a refusal: of the client's own fault, and short."""
    response = client.request(method, path, content=json.dumps(body), headers=JSON)
    assert response.status_code == 400, response.text
    assert len(response.text) < 1000
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("number", [HUGE, -HUGE], ids=["huge", "-huge"])
@pytest.mark.parametrize("field", [*BOTH, "best_of", "logprobs"])
def test_a_huge_number_in_a_completion_is_refused_by_its_field(client: httpx.Client, field: str, number: int) -> None:
    error = answer(client, "POST", "/v1/completions", {**COMPLETION, field: number})
    assert field in f"{error['param']} {error['message']}" or error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("number", [HUGE, -HUGE], ids=["huge", "-huge"])
@pytest.mark.parametrize("field", [*BOTH, "top_logprobs", "max_completion_tokens"])
def test_a_huge_number_in_a_chat_is_refused_by_its_field(client: httpx.Client, field: str, number: int) -> None:
    error = answer(client, "POST", "/v1/chat/completions", {**CHAT, field: number})
    assert field in f"{error['param']} {error['message']}" or error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_token_ids": [HUGE]},
        {"logit_bias": {"1": HUGE}},
        {"logit_bias": {str(HUGE): 1}},
        {"logit_bias": {"²": 1}},
        {"logit_bias": {"\u0661": 1}},
        {"prompt": [HUGE]},
        {"prompt": [[1], [-HUGE]]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_huge_number_inside_a_list_or_object_is_refused(client: httpx.Client, fields: dict[str, Any]) -> None:
    error = answer(client, "POST", "/v1/completions", {**COMPLETION, **fields})
    assert error["param"].startswith(next(iter(fields)))


@pytest.mark.parametrize("value", ["0" * 12 + "9" * 400, "9" * 400, "²", "\u0661", "+1", "1_000", "-1"])
def test_a_deadline_of_any_digits_is_a_400(client: httpx.Client, value: str) -> None:
    headers = {**JSON, "x-request-timeout-ms": value.encode()}
    response = client.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "x-request-timeout-ms"


@pytest.mark.parametrize("version", ["²", "\u0661", "9" * 200, "0", "-1", "1.0", "1_0", ""])
def test_a_jobs_model_id_with_any_version_is_a_404(client: httpx.Client, admin: httpx.Client, version: str) -> None:
    for caller in (client, admin):
        for model in (f"ft:tiny:acme:law:{version}", f"law@{version}"):
            response = caller.post("/v1/completions", json={**COMPLETION, "model": model})
            assert response.status_code == 404, response.text
            assert caller.get(f"/v1/models/{model}").status_code == 404


@pytest.mark.parametrize("number", ["0", "-1", "9" * 400, f"-{'9' * 400}", str(2**63), "9" * 5000, "²", "x"])
def test_a_key_id_of_any_size_is_a_400(admin: httpx.Client, keys: dict[str, str], number: str) -> None:
    for response in (
        admin.delete(f"/admin/tenants/acme/keys/{number}"),
        admin.post("/admin/tenants/acme/rotate-key", params={"key_id": number}),
        admin.post("/admin/tenants/acme/rotate-key", params={"overlap_s": number if number != "0" else "x"}),
        admin.get("/admin/tenants", params={"limit": number}),
        admin.get("/v1/fine_tuning/jobs", params={"limit": number}),
    ):
        assert response.status_code == 400, response.text
        assert len(response.text) < 1000
    assert admin.delete(f"/admin/tenants/acme/keys/{MAX_INT}").status_code == 404


@pytest.mark.parametrize("number", [HUGE, -HUGE], ids=["huge", "-huge"])
def test_a_huge_number_in_an_admin_body_is_refused_by_its_field(
    admin: httpx.Client, keys: dict[str, str], number: int
) -> None:
    for field in ("weight", "requests_per_minute", "tokens_per_minute", "max_concurrent", "max_adapter_bytes"):
        assert answer(admin, "PUT", "/admin/tenants/acme/quotas", {field: number})["param"] == field
    assert answer(admin, "POST", "/admin/tenants/acme/keys", {"expires_at": number})["param"] == "expires_at"
    assert answer(admin, "POST", "/v1/adapters/law@1/canary", {"percent": number})["param"] == "percent"


@pytest.mark.parametrize("number", [HUGE, -HUGE], ids=["huge", "-huge"])
def test_a_huge_number_in_a_job_is_refused_by_its_field(client: httpx.Client, number: int) -> None:
    job = {"model": "tiny", "training_file": "file-none"}
    for field in JOB_FIELDS:
        for body in (
            {"hyperparameters": {field: number}},
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {field: number}}}},
        ):
            assert field in answer(client, "POST", "/v1/fine_tuning/jobs", {**job, **body})["param"]
    assert answer(client, "POST", "/v1/fine_tuning/jobs", {**job, "seed": number})["param"] == "seed"


@pytest.mark.parametrize(
    "field", ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_dropout"]
)
def test_a_huge_number_in_an_adapters_config_is_refused(client: httpx.Client, field: str) -> None:
    wrapped = {"rank_pattern": {"q_proj": HUGE}, "alpha_pattern": {"q_proj": HUGE}, "layers_to_transform": [HUGE]}
    config = json.loads(config_bytes())
    config[field] = wrapped.get(field, HUGE)
    weights = safetensors_bytes(lora_tensors(tiny_base()))
    files = {"config": json.dumps(config).encode(), "weights": weights}
    response = client.post("/v1/adapters", data={"name": "huge"}, files=files)
    assert response.status_code < 500, response.text


def test_a_huge_number_in_a_weights_header_is_refused(client: httpx.Client) -> None:
    for shape, offsets in (([HUGE, 1], [0, 4]), ([1, 1], [0, HUGE]), ([1, 1], [-HUGE, 4])):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        header = json.dumps({f"base_model.model.model.layers.{'9' * 4400}.q_proj.lora_A.weight": entry}).encode()
        files = {"config": config_bytes(), "weights": len(header).to_bytes(8, "little") + header + bytes(4)}
        response = client.post("/v1/adapters", data={"name": "huge"}, files=files)
        assert response.status_code == 400, response.text


@pytest.mark.parametrize("knob", KNOBS)
def test_a_huge_number_in_a_training_spec_is_refused_by_its_field(knob: str) -> None:
    section, dot, name = knob.rpartition(".")
    for number in (HUGE, -HUGE):
        body: dict[str, Any] = {
            "base": "base",
            "data": "data",
            **({section: {name: number}} if dot else {name: number}),
        }
        with pytest.raises(SpecError) as refusal:
            TrainSpec.from_mapping(body)
        assert refusal.value.param == knob


def test_a_huge_weight_in_a_training_file_is_refused_by_its_line() -> None:
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": HUGE}]}
    with pytest.raises(LineRefused) as refusal:
        parse_record(json.dumps(line).encode())
    assert refusal.value.code == "bad_weight"


def test_text_is_a_whole_number_only_in_ascii_digits_within_the_limits() -> None:
    assert [whole_number(text) for text in ("0", "007", str(MAX_INT))] == [0, 7, MAX_INT]
    bad = ("", " 1", "1 ", "+1", "-1", "1_0", "1.0", "²", "\u0661", str(MAX_INT + 1), "9" * 10**6, "0" * 10**6 + "12")
    assert [whole_number(text, 0, MAX_INT) for text in bad[:-1]] == [None] * (len(bad) - 1)
    assert whole_number(bad[-1]) == 12
    assert (whole_number("4", 5, 9), whole_number("10", 5, 9)) == (None, None)


def test_a_number_within_limits_is_no_bool_no_nan_and_of_any_size() -> None:
    inside: list[object] = [0, 1, 0.5, 1.0, -0.0]
    outside: list[object] = [True, None, "1", float("nan"), float("inf"), HUGE, -HUGE, -1e-300, [1]]
    assert all(is_within(value, 0, 1) for value in inside)
    assert not any(is_within(value, 0, 1) for value in outside)
    assert not is_within(0, 0, 1, open_low=True)


def test_a_refusal_repeats_no_long_number(client: httpx.Client) -> None:
    message = answer(client, "POST", "/v1/completions", {**COMPLETION, "min_tokens": HUGE})["message"]
    assert "10000" in message
    assert len(message) < 200
    assert len(json_text(HUGE)) == 400
