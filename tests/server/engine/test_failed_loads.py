"""Requests whose adapter cannot be read are answered, each time; a push of the same content heals it at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from prometheus_client import Gauge

from adapters_store.base.description import AdapterDigest
from server.api.background import StoreWatch
from server.engine.request import RequestError
from server.engine.worker import EngineWorker
from support.servers.service import Service, publish, running
from support.servers.waiting import wait_until


@pytest.fixture
def service(base: Path, adapters: dict[str, Path], tmp_path: Path) -> Iterator[Service]:
    with running(base, adapters, tmp_path) as service:
        yield service


def error_of(service: Service, prompt: list[int], kind: str) -> str | None:
    error = service.ask(prompt, kind)[1].collect()[-1].error
    return None if error is None else error.code


def test_every_request_after_a_failed_load_is_answered_and_a_push_heals(
    service: Service, adapters: dict[str, Path], prompts: list[list[int]]
) -> None:
    service.parts.adapters.host.settings = replace(
        service.parts.adapters.host.settings, retry_s=1e9
    )  # nothing heals by itself
    weights = service.store.weights_of(service.versions["plain"].digest)
    weights.unlink()
    for packed in weights.parent.glob("*.bin"):
        packed.unlink()
    assert [error_of(service, prompts[0], "plain") for _ in range(3)] == ["blob_damaged"] * 3
    watch = StoreWatch(service.store, service.worker, Gauge("away", "", registry=None), poll_s=0.02)
    watch.start()
    try:
        watch.look()
        publish(service.store, service.parts, "plain", adapters["plain"])
        wait_until(lambda: error_of(service, prompts[0], "plain") is None)
    finally:
        watch.stop()


class _Panic(BaseException):
    """What a panic in a Rust extension is to Python: no Exception."""


@pytest.mark.parametrize("error", [_Panic("index out of bounds"), MemoryError()], ids=["panic", "memory"])
def test_an_engine_that_ends_by_whatever_error_answers_everybody(
    service: Service, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    answer = service.ask(prompts[0], "plain", max_tokens=64)[1]

    def step() -> list[object]:
        raise error

    monkeypatch.setattr(service.parts.engine, "step", step)
    failure = answer.collect()[-1].error
    assert isinstance(failure, RequestError)
    assert failure.code == "engine_stopped"
    wait_until(lambda: not service.worker.is_healthy())


def test_a_command_that_fails_while_the_engine_stops_keeps_no_answer_back(
    service: Service, prompts: list[list[int]]
) -> None:
    worker: EngineWorker = service.worker
    go = Event()

    def fail() -> None:
        raise RuntimeError("the engine is broken")

    worker._send(lambda: go.wait(60))
    answer = service.ask(prompts[0], max_tokens=64)[1]
    worker.forget_adapters([AdapterDigest("sha256:none")])
    with worker._changed:
        worker._is_stopping = True
        worker._commands.appendleft(fail)
    go.set()
    assert answer.collect()[-1].finish_reason in ("abort", "error")
