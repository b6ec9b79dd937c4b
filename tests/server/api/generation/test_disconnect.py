"""Hang-ups and failures while the engine works: nothing is left running, and everyone who still listens is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.engine.request import RequestError
from support.servers.raw_http import dial, json_request
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

ASK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 50, "ignore_eos": True, "temperature": 0}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}


@pytest.fixture(autouse=True)
def nothing_is_left_running(fake_engine: FakeEngine) -> Iterator[None]:
    yield
    fake_engine.resume()
    wait_until(lambda: fake_engine.stats().num_running == 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("size", [{"prompt": "hello"}, {"prompt": ["a", "b"], "n": 3}])
def test_a_hang_up_aborts_every_sequence_within_one_step(
    url: str, keys: dict[str, str], fake_engine: FakeEngine, stream: bool, size: dict[str, Any]
) -> None:
    num_sequences = size.get("n", 1) * (len(size["prompt"]) if isinstance(size["prompt"], list) else 1)
    fake_engine.aborted.clear()
    with dial(url) as connection:
        request = {**ASK, **size, "max_tokens": 400, "stream": stream}
        fake_engine.step_s = 0.005
        connection.sendall(json_request("/v1/completions", request, key=keys["acme"]))
        wait_until(lambda: fake_engine.stats().num_running == num_sequences)
        if stream:
            assert b"200 OK" in connection.recv(1000)
        fake_engine.may_step.clear()
    wait_until(lambda: len(fake_engine.aborted) == num_sequences)
    steps_before = fake_engine.num_steps
    fake_engine.resume()
    wait_until(lambda: fake_engine.stats().num_running == 0)
    fake_engine.step_s = 0.0
    assert fake_engine.num_steps - steps_before <= 2  # the one that was waiting to begin, and the one that ends them


def test_a_finished_request_is_not_aborted(client: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.aborted.clear()
    assert client.post("/v1/completions", json=ASK).status_code == 200
    assert client.post("/v1/completions", json={**ASK, "stream": True}).status_code == 200
    assert fake_engine.aborted == []


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_a_429_that_takes_back_what_it_had_queued(
    client: httpx.Client, fake_engine: FakeEngine, stream: bool
) -> None:
    fake_engine.aborted.clear()
    fake_engine.max_waiting = 5
    counted = 'multilora_failures_total{code="queue_full"} '
    before = float(client.get("/metrics").text.partition(counted)[2].split("\n")[0])
    response = client.post("/v1/completions", json={**ASK, "n": 8, "stream": stream})
    fake_engine.max_waiting = 256
    assert f"{counted}{before + 1}" in client.get("/metrics").text
    assert response.status_code == 429
    assert (response.headers["retry-after"], response.headers["x-should-retry"]) == ("2", "true")
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert len(fake_engine.aborted) == 5


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("route", "body"), [("/v1/completions", ASK), ("/v1/chat/completions", CHAT)])
def test_what_fails_before_the_first_token_has_its_own_status(
    client: httpx.Client, fake_engine: FakeEngine, route: str, body: dict[str, Any], stream: bool
) -> None:
    fake_engine.fail_next(RequestError("adapter_unavailable", "the adapter's file is damaged", 503))
    response = client.post(route, json={**body, "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "adapter_unavailable"


@pytest.mark.parametrize(
    ("route", "body", "num_chunks"), [("/v1/completions", ASK, 3), ("/v1/chat/completions", CHAT, 4)]
)
def test_a_stream_that_fails_sends_what_it_had_then_an_error_event_and_done(
    client: httpx.Client, fake_engine: FakeEngine, route: str, body: dict[str, Any], num_chunks: int
) -> None:
    fake_engine.fail_next(RequestError("nan_logits", "the model produced NaN", 500), after_tokens=3)
    response = client.post(route, json={**body, "stream": True})
    assert response.status_code == 200
    *chunks, last, done = [line for line in response.text.split("\n\n") if line]
    assert chunks  # the tokens before the failure, some of them joined
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error == {"message": "the model produced NaN", "type": "server_error", "param": None, "code": "nan_logits"}
    assert done == "data: [DONE]"


def test_one_failed_choice_ends_the_others_of_its_call_only(client: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.aborted.clear()
    fake_engine.step_s = 0.002
    bystander: list[httpx.Response] = []
    ask = {**ASK, "max_tokens": 100}
    thread = threading.Thread(target=lambda: bystander.append(client.post("/v1/completions", json=ask)))
    thread.start()
    wait_until(lambda: fake_engine.stats().num_running == 1)
    fake_engine.fail_next(RequestError("boom", "boom", 500), after_tokens=5)
    response = client.post("/v1/completions", json={**ASK, "n": 4, "max_tokens": 300})
    thread.join()
    fake_engine.step_s = 0.0
    assert (response.status_code, bystander[0].status_code) == (500, 200)
    assert len(fake_engine.aborted) == 3


def test_an_abort_by_the_engine_is_a_503_that_may_be_retried(client: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.may_step.clear()
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=ASK)))
    thread.start()
    wait_until(lambda: fake_engine.stats().num_running == 1)
    fake_engine.abort(fake_engine.seen[-1].id)
    fake_engine.resume()
    thread.join()
    assert answers[0].status_code == 503
    assert answers[0].headers["retry-after"] == "1"
