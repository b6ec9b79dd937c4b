"""From HTTP to tensors and back: the routes over the real engine, a tiny random base and adapters that come and go."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.api.engine_client import EngineClient
from support.servers.raw_http import dial, json_request
from support.servers.waiting import wait_until

ASK: dict[str, Any] = {"prompt": "the tenant's lease", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


def say(client: httpx.Client, model: str, **changes: Any) -> str:
    response = client.post("/v1/completions", json={**ASK, "model": model, **changes})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_tenants_share_a_batch_and_each_gets_what_it_gets_alone(
    client: httpx.Client, other: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    for owner, name, seed in ((client, "law", 1), (client, "med", 2), (other, "law", 3)):
        assert upload(owner, name, seed=seed).status_code == 201
    asks = [(client, "tiny"), (client, "law"), (client, "med"), (other, "law")]
    alone = [say(owner, model) for owner, model in asks]
    assert len(set(alone)) == 4
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: say(*asks[i % 4])}))  # type: ignore[misc]
        for i in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(24)] == alone * 6


def test_an_adapter_uploaded_again_answers_anew_and_the_old_version_as_before(
    client: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    upload(client, "changing", seed=11)
    before = say(client, "changing")
    upload(client, "changing", seed=12)
    assert say(client, "changing") != before
    assert say(client, "changing@1") == before


def test_a_stream_says_what_the_whole_answer_says(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={**ASK, "model": "tiny", "stream": True, "n": 2})
    texts = {0: "", 1: ""}
    for line in response.text.split("\n\n"):
        if line.startswith("data: {"):
            [choice] = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
    assert set(texts.values()) == {say(client, "tiny")}


def test_prompt_scores_sum_over_echo_as_over_generation(client: httpx.Client) -> None:
    """A greedy answer's log-probabilities are the same whether it is generated or scored as a prompt."""
    body = {**ASK, "model": "tiny", "logprobs": 1, "max_tokens": 6, "prompt": [70, 71, 72, 73]}
    generated = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    chosen = generated["token_logprobs"]
    assert all(max(top.values()) == logprob for top, logprob in zip(generated["top_logprobs"], chosen, strict=True))
    echoed = client.post("/v1/completions", json={**body, "echo": True}).json()["choices"][0]["logprobs"]
    assert echoed["token_logprobs"][0] is None
    assert echoed["token_logprobs"][4:] == pytest.approx(chosen, abs=1e-4)


def test_a_hang_up_empties_the_engine(url: str, keys: dict[str, str], engine: EngineClient) -> None:
    with dial(url) as connection:
        request = {**ASK, "model": "tiny", "max_tokens": 450, "n": 4, "stream": True}
        connection.sendall(json_request("/v1/completions", request, key=keys["acme"]))
        assert b"200 OK" in connection.recv(1000)
    wait_until(lambda: engine.stats().counters["aborted"] == 4)
    wait_until(lambda: engine.stats().num_running == 0)


def test_a_deleted_adapter_leaves_the_device(
    client: httpx.Client, engine: EngineClient, upload: Callable[..., httpx.Response]
) -> None:
    upload(client, "leaving", seed=21)
    say(client, "leaving")
    wait_until(lambda: any("leaving" in name for name in engine.stats().running_adapters))
    assert client.delete("/v1/adapters/leaving").status_code == 200
    wait_until(lambda: not any("leaving" in name for name in engine.stats().running_adapters))
