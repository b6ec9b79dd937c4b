"""/metrics: the names that routers read, what the API counted, and that labels stay few."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from server.api.telemetry.engine_metrics import EngineCollector
from server.api.telemetry.metrics import MAX_ERROR_CODES, ApiMetrics
from server.engine.metrics import EngineStats, Histogram
from server.engine.request import RequestError
from support.servers.live_server import serving
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> ApiSettings:
    return ApiSettings(data_dir=data_dir, auth="off", max_label_values=5, metrics_max_age_s=0)


def samples(client: httpx.Client) -> list[Sample]:
    text = client.get("/metrics").text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def value(client: httpx.Client, name: str, **labels: str) -> float:
    found = [s.value for s in samples(client) if s.name == name and labels.items() <= s.labels.items()]
    return sum(found)


@pytest.fixture
def anyone(connect: Callable[..., httpx.Client]) -> httpx.Client:
    return connect(None)


def test_the_names_that_routers_read_are_there_once(anyone: httpx.Client) -> None:
    by_name: dict[str, list[Sample]] = {}
    for sample in samples(anyone):
        by_name.setdefault(sample.name, []).append(sample)
    for name in ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        [one] = by_name[name]
        assert one.labels == {"model_name": "tiny"}
    [info] = by_name["vllm:lora_requests_info"]
    assert info.labels.keys() == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert abs(info.value - time.time()) < 60


def test_resident_adapters_are_named(
    anyone: httpx.Client, fake_engine: FakeEngine, upload: Callable[..., httpx.Response]
) -> None:
    upload(anyone, "resident")
    fake_engine.may_step.clear()
    thread = threading.Thread(
        target=anyone.post, args=("/v1/completions",), kwargs={"json": {**ASK, "model": "resident"}}
    )
    thread.start()
    wait_until(lambda: fake_engine.stats().num_running == 1)
    [info] = [sample for sample in samples(anyone) if sample.name == "vllm:lora_requests_info"]
    fake_engine.resume()
    thread.join()
    assert "default/resident@1" in info.labels["running_lora_adapters"].split(",")


def test_tokens_are_counted_per_tenant_and_adapter(connect: Callable[..., httpx.Client]) -> None:
    counted = connect(None, **{"X-Tenant-Id": "counted"})
    labels = {"tenant": "counted", "adapter": "base"}
    assert counted.post("/v1/completions", json={**ASK, "n": 2}).status_code == 200
    assert value(counted, "multilora_output_tokens_total", **labels) == 16
    assert value(counted, "multilora_sequences_total", **labels) == 2


def test_each_answer_is_counted_by_route_method_and_status(anyone: httpx.Client) -> None:
    name, labels = "multilora_http_requests_total", {"route": "/v1/models/{model:path}", "status": "404"}
    before = value(anyone, name, **labels)
    for model in ("a", "b", "c"):
        anyone.get(f"/v1/models/{model}")
    assert value(anyone, name, **labels) - before == 3


def test_paths_and_methods_from_strangers_make_no_labels(anyone: httpx.Client) -> None:
    for index in range(20):
        anyone.request(f"BREW{index}", f"/nowhere/{index}")
    seen = [sample.labels for sample in samples(anyone) if sample.name == "multilora_http_requests_total"]
    assert {labels["route"] for labels in seen if "nowhere" in labels["route"]} == set()
    assert {labels["method"] for labels in seen} <= {"GET", "POST", "other"}


def test_tenants_beyond_the_limit_are_counted_as_other(connect: Callable[..., httpx.Client]) -> None:
    for index in range(12):
        connect(None, **{"X-Tenant-Id": f"crowd-{index}"}).post("/v1/completions", json={**ASK, "max_tokens": 1})
    client = connect(None)
    tenants = {s.labels["tenant"] for s in samples(client) if s.name == "multilora_sequences_total"}
    assert len(tenants) <= 6
    assert value(client, "multilora_sequences_total", tenant="other") >= 6


def test_several_adapters_in_a_request_leave_half_of_the_labels(fake_engine: FakeEngine, tmp_path: Path) -> None:
    metrics = ApiMetrics(fake_engine, 6, tmp_path)
    sets = [metrics.owner_labels("many", f"a@1+b@{version}") for version in range(1, 10)]
    assert sets.count(("other", "other")) == 6
    others = [("one", "style@1"), ("two", "style@1")]
    assert [metrics.owner_labels(*pair) for pair in others] == others


def test_first_token_and_gaps_are_timed(anyone: httpx.Client) -> None:
    names = ("multilora_time_to_first_token_seconds_count", "multilora_inter_token_seconds_count")
    before = [value(anyone, name) for name in names]
    anyone.post("/v1/completions", json={**ASK, "stream": True})
    after = [value(anyone, name) for name in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 7]


def test_no_histogram_carries_a_tenant(anyone: httpx.Client) -> None:
    buckets = [sample for sample in samples(anyone) if sample.name.endswith("_bucket")]
    assert buckets
    assert not [sample for sample in buckets if "tenant" in sample.labels]


def test_engine_counters_are_shown_under_our_prefix(anyone: httpx.Client, fake_engine: FakeEngine) -> None:
    assert 0 < value(anyone, "multilora_engine_steps_total") <= fake_engine.num_steps


def test_two_apps_do_not_share_counts(app: FastAPI, anyone: httpx.Client) -> None:
    context = app.state.context
    second = create_app(engine=context.engine, store=context.store, settings=context.settings)
    anyone.get("/health")
    names = {family.name for family in second.state.context.metrics.registry.collect() if family.samples}
    assert "multilora_up" in names
    assert second.state.context.metrics.registry.get_sample_value("multilora_aborted_sequences_total") == 0


def test_hits_and_evictions_are_told_apart_by_tier(anyone: httpx.Client) -> None:
    for name in ("hits", "misses", "evictions", "loads"):
        tiers = {s.labels["tier"] for s in samples(anyone) if s.name == f"multilora_adapter_{name}_total"}
        assert tiers == {"device", "host"}


def test_an_engines_histogram_is_shown_in_rising_buckets() -> None:
    seconds = Histogram()
    for value in (0.0005, 0.001, 0.02, 100.0):
        seconds.observe(value)
    registry = CollectorRegistry()
    registry.register(EngineCollector(_stub_engine(EngineStats(histograms={"step_seconds": seconds}))))
    name = "multilora_step_seconds"
    assert registry.get_sample_value(f"{name}_bucket", {"le": "0.001"}) == 2
    assert registry.get_sample_value(f"{name}_bucket", {"le": "60.0"}) == 3
    assert registry.get_sample_value(f"{name}_bucket", {"le": "+Inf"}) == 4
    assert registry.get_sample_value(f"{name}_count") == 4
    assert registry.get_sample_value(f"{name}_sum") == pytest.approx(100.0215)


def _stub_engine(stats: EngineStats) -> Any:
    return SimpleNamespace(stats=lambda: stats, served_name="tiny", is_healthy=lambda: True)


def test_a_wait_is_timed_from_arrival_to_its_first_batch(
    store: AdapterStore, data_dir: Path, real_engine: EngineClient
) -> None:
    app = create_app(
        engine=real_engine, store=store, settings=ApiSettings(data_dir=data_dir, auth="off", metrics_max_age_s=0)
    )
    with serving(app) as url:
        httpx.post(f"{url}/v1/completions", json={**ASK, "model": real_engine.served_name}).raise_for_status()
    registry = app.state.context.metrics.registry
    assert registry.get_sample_value("multilora_queue_seconds_count") == 1
    assert 0 <= registry.get_sample_value("multilora_queue_seconds_sum") < 5


def test_failures_are_counted_by_code(anyone: httpx.Client, fake_engine: FakeEngine) -> None:
    fake_engine.fail_next(RequestError("adapter_numerics", "not finite"))
    anyone.post("/v1/completions", json=ASK)
    assert value(anyone, "multilora_failures_total", code="adapter_numerics") == 1


def test_error_codes_make_a_bounded_number_of_labels(app: FastAPI) -> None:
    metrics = app.state.context.metrics
    labels = {metrics.error_label(f"code-{index}") for index in range(2 * MAX_ERROR_CODES)}
    assert len(labels) <= MAX_ERROR_CODES + 1
    assert "other" in labels


def test_times_fall_into_buckets_from_a_millisecond_to_a_minute(anyone: httpx.Client) -> None:
    anyone.post("/v1/completions", json={**ASK, "stream": True})
    for name in ("time_to_first_token", "inter_token"):
        bounds = [s.labels["le"] for s in samples(anyone) if s.name == f"multilora_{name}_seconds_bucket"]
        assert (bounds[0], bounds[-2:]) == ("0.001", ["60.0", "+Inf"])


def test_the_room_on_the_data_directorys_disk_is_told(anyone: httpx.Client, data_dir: Path) -> None:
    told = value(anyone, "multilora_data_dir_free_bytes")
    assert abs(told - shutil.disk_usage(data_dir).free) < 1 << 30


def test_a_data_directory_that_is_gone_leaves_the_other_metrics(fake_engine: FakeEngine, tmp_path: Path) -> None:
    registry = ApiMetrics(fake_engine, 5, tmp_path / "gone").registry
    assert math.isnan(registry.get_sample_value("multilora_data_dir_free_bytes") or 0.0)
    assert registry.get_sample_value("multilora_up") == 1
