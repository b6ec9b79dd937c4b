"""Traces, as a real collector receives them over HTTP."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.settings import ApiSettings
from server.api.telemetry.tracing import OtlpTracing, TracingUnavailable
from server.engine.request import RequestError
from support.servers.live_server import serving
from support.servers.otlp_receiver import Receiver, receiving
from support.worlds.fake_engine import FakeEngine

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def tracing(receiver: Receiver) -> Iterator[OtlpTracing]:
    receiver.spans.clear()
    tracing = OtlpTracing(receiver.url)
    yield tracing
    tracing.close()


@pytest.fixture
def traced_app(fake_engine: FakeEngine, store: AdapterStore, data_dir: Path, tracing: OtlpTracing) -> FastAPI:
    settings = ApiSettings(data_dir=data_dir, auth="off")
    return create_app(engine=fake_engine, store=store, settings=settings, tracing=tracing)


def ask(app: FastAPI, tracing: OtlpTracing, body: dict[str, Any], **headers: str) -> httpx.Response:
    """One request, answered and its spans sent."""
    with serving(app) as url:
        response = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
        httpx.get(f"{url}/metrics")
    tracing.close()
    return response


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_is_told_with_its_phases_under_the_callers_trace(
    traced_app: FastAPI, tracing: OtlpTracing, receiver: Receiver, stream: bool
) -> None:
    parent = f"00-{TRACE_ID}-b7ad6b7169203331-01"
    assert ask(traced_app, tracing, {**ASK, "n": 2, "stream": stream}, traceparent=parent).status_code == 200
    assert receiver.services == {"multilora"}
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE_ID}
    [request] = receiver.named("POST /v1/completions")
    [generate] = receiver.named("generate")
    assert generate.parent_span_id == request.span_id
    told = attributes(generate)
    assert told["gen_ai.usage.output_tokens"] == 8
    assert (told["multilora.tenant"], told["multilora.adapter"], told["multilora.sequences"]) == ("default", "base", 2)
    [queue] = receiver.named("queue")
    assert queue.parent_span_id == generate.span_id
    assert generate.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert queue.end_time_unix_nano <= generate.end_time_unix_nano


def test_a_failure_is_an_error_with_its_code(
    traced_app: FastAPI, tracing: OtlpTracing, receiver: Receiver, fake_engine: FakeEngine
) -> None:
    fake_engine.fail_next(RequestError("adapter_numerics", "not finite"))
    ask(traced_app, tracing, ASK)
    [generate] = receiver.named("generate")
    assert generate.status.code == Status.STATUS_CODE_ERROR
    assert attributes(generate)["error.type"] == "adapter_numerics"


def test_probes_are_not_traced(traced_app: FastAPI, tracing: OtlpTracing, receiver: Receiver) -> None:
    ask(traced_app, tracing, ASK)
    assert not [span.name for span in receiver.spans if "/metrics" in span.name]


def test_a_collector_that_is_away_costs_the_answer_nothing(
    fake_engine: FakeEngine, store: AdapterStore, data_dir: Path
) -> None:
    tracing = OtlpTracing("http://127.0.0.1:9")
    settings = ApiSettings(data_dir=data_dir, auth="off")
    app = create_app(engine=fake_engine, store=store, settings=settings, tracing=tracing)
    with serving(app) as url:
        response = httpx.post(f"{url}/v1/completions", json=ASK)
    assert response.status_code == 200


def test_without_the_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def lacking(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(TracingUnavailable, match=r"pip install 'multilora\[otel\]'"):
        OtlpTracing("http://127.0.0.1:4318")


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(TracingUnavailable, match="'collector:4318'"):
        OtlpTracing("collector:4318")
