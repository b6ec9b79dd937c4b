"""Requests for an activated LoRA over HTTP: what its upload says, where it switches on, and a prompt that does not."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from server.api.engine_client import EngineClient

ASK = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
BEFORE, INVOCATION = [80, 81, 82, 83, 84], [70, 71]


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


def answer(client: httpx.Client, model: str, prompt: list[int]) -> str:
    response = client.post("/v1/completions", json={**ASK, "model": model, "prompt": prompt})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_the_prompt_must_hold_the_tokens_that_switch_it_on(
    client: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    shown = upload(client, "judge", seed=3, alora_invocation_tokens=INVOCATION)
    assert shown.status_code == 201, shown.text
    assert shown.json()["invocation_tokens"] == INVOCATION
    assert upload(client, "plain", seed=3).json()["invocation_tokens"] is None
    refused = client.post("/v1/completions", json={**ASK, "model": "judge", "prompt": BEFORE})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "invocation_missing", "prompt")
    assert "[70, 71]" in error["message"]

    at_start = answer(client, "judge", INVOCATION + BEFORE)
    assert at_start == answer(client, "plain", INVOCATION + BEFORE)
    assert answer(client, "judge", BEFORE + INVOCATION) != answer(client, "tiny", BEFORE + INVOCATION)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"alora_invocation_tokens": [1_000_000]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": INVOCATION, "task_type": None}, "task_type"),
    ],
)
def test_an_upload_that_could_never_be_switched_on_is_refused(
    changes: dict[str, object], field: str, client: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    error = upload(client, "never", **changes).json()["error"]
    assert (error["code"], error["param"]) == ("bad_field", field)
