"""The engine's thread dies on an error of ours: everybody is answered and health turns red; the rest goes on."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from adapters_store.base.description import AdapterDigest
from server.api.engine_client import EngineClient
from server.engine.worker import EngineWorker
from support.servers.waiting import wait_until

ASK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


def failure_in(answer: httpx.Response) -> str:
    """The code of what went wrong, by the status or, where a stream had begun, by its last event."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.status_code == 500
        return str(answer.json()["error"]["code"])
    *_, error, done = [line for line in answer.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return str(json.loads(error.removeprefix("data: "))["error"]["code"])


def test_a_crash_fails_every_request_and_turns_health_red(
    url: str, client: httpx.Client, engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(engine, EngineWorker)
    assert httpx.get(f"{url}/health").status_code == 200
    answers: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        headers = dict(client.headers)
        answers.append(
            httpx.post(f"{url}/v1/completions", json={**ASK, "stream": stream}, headers=headers, timeout=300)
        )

    threads = [threading.Thread(target=ask, args=(index % 2 == 0,)) for index in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: engine._engine.scheduler.num_running == 6)

    def crash() -> None:
        raise RuntimeError("the engine's own fault")

    monkeypatch.setattr(engine._engine, "step", crash)
    for thread in threads:
        thread.join()
    for answer in answers:
        assert failure_in(answer) == "engine_stopped"
        assert "own fault" not in answer.text
    wait_until(lambda: not engine._thread.is_alive())
    engine.abort("unknown")
    engine.retry_adapters()
    engine.forget_adapters([AdapterDigest("a" * 64)])  # as the store's watch does for every deleted adapter
    assert not engine._commands
    red = httpx.get(f"{url}/health")
    assert (red.status_code, red.json()["error"]["code"]) == (503, "engine_dead")
    assert httpx.get(f"{url}/ready").status_code == 503
    assert "multilora_up 0.0" in httpx.get(f"{url}/metrics").text
    refused = client.post("/v1/completions", json=ASK)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert client.get("/v1/adapters").status_code == 200
