"""A device that fails for good ends the engine; a request's own failure ends that request."""

from __future__ import annotations

from functools import partial
from typing import Any

import httpx
import pytest
import torch

from server.api.engine_client import EngineClient
from server.engine.device_fault import device_error
from server.engine.worker import EngineWorker
from support.servers.failing_device import MESSAGE, FailingDevice

ASK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


@pytest.fixture
def worker(engine: EngineClient, monkeypatch: pytest.MonkeyPatch) -> EngineWorker:
    assert isinstance(engine, EngineWorker)
    monkeypatch.setattr(engine._engine, "device_error", partial(device_error, torch.device("cuda")))
    return engine


def test_an_error_that_leaves_the_device_well_ends_only_its_request(
    url: str, client: httpx.Client, worker: EngineWorker
) -> None:
    """The same exception, but the device answers afterwards: a launch with a bad configuration, too little memory."""
    with pytest.MonkeyPatch.context() as patch:
        FailingDevice(0, is_sticky=False).under(patch.setattr, worker._engine._runner)
        failed = client.post("/v1/completions", json=ASK)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_error")
    assert worker.device_error is None
    assert client.post("/v1/completions", json=ASK).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_device_that_answers_no_call_any_more_ends_the_engine(
    url: str, client: httpx.Client, worker: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingDevice(5).under(monkeypatch.setattr, worker._engine._runner)
    failed = client.post("/v1/completions", json=ASK)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_stopped")
    assert worker.device_error == MESSAGE
    assert httpx.get(f"{url}/health").status_code == 503
    assert httpx.get(f"{url}/ready").status_code == 503
    refused = client.post("/v1/completions", json=ASK)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
