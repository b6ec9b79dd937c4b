"""Counts what the API did and shows what the engine does, for Prometheus. Decides names, labels and their bounds.

No histogram carries a tenant; counters carry at most `max_label_values` tenant/adapter pairs, then "other".
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from server.api.ports import EngineClient
from server.engine.request import TokenEvent

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
OTHER = "other"


class ApiMetrics:
    """All of one app's metrics, in a registry of its own: two apps in one process do not meet."""

    def __init__(self, engine: EngineClient, max_label_values: int) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self._max_label_values = max_label_values
        self._owners: set[tuple[str, str]] = set()
        self.http_requests = Counter(
            "multilora_http_requests", "HTTP requests answered", ("route", "method", "status"), registry=self.registry
        )
        self.http_seconds = Histogram(
            "multilora_http_request_seconds", "Whole answer", ("route",), buckets=_SECONDS, registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "multilora_time_to_first_token_seconds", "From submission", buckets=_SECONDS, registry=self.registry
        )
        self.inter_token_seconds = Histogram(
            "multilora_inter_token_seconds",
            "Between events of a request",
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.aborted = Counter("multilora_aborted_sequences", "Ended by a hang-up or a failure", registry=self.registry)
        owner = ("tenant", "adapter")
        self.sequences = Counter("multilora_sequences", "Sequences asked for", owner, registry=self.registry)
        self.prompt_tokens = Counter("multilora_prompt_tokens", "Prompt tokens", owner, registry=self.registry)
        self.output_tokens = Counter("multilora_output_tokens", "Generated tokens", owner, registry=self.registry)

    def owner_labels(self, tenant: str, adapter: str) -> tuple[str, str]:
        """The labels this pair is counted under; the first pairs to come keep their names."""
        pair = (tenant, adapter)
        if pair not in self._owners:
            if len(self._owners) >= self._max_label_values:
                return (OTHER, OTHER)
            self._owners.add(pair)
        return pair


class CallMeter:
    """Measures one HTTP call's sequences from submission to their last event."""

    def __init__(self, metrics: ApiMetrics, tenant: str, adapter: str, num_sequences: int) -> None:
        self._metrics = metrics
        self._labels = metrics.owner_labels(tenant, adapter)
        self._num_output_tokens = [0] * num_sequences
        self._num_prompt_tokens = [0] * num_sequences
        self._start_s = time.perf_counter()
        self._last_s: list[float | None] = [None] * num_sequences

    def saw(self, index: int, event: TokenEvent, now_s: float) -> None:
        self._num_prompt_tokens[index] = event.num_prompt_tokens or self._num_prompt_tokens[index]
        if not event.token_ids:
            return
        last_s = self._last_s[index]
        if last_s is None:
            self._metrics.first_token_seconds.observe(now_s - self._start_s)
        else:
            self._metrics.inter_token_seconds.observe(now_s - last_s)
        self._last_s[index] = now_s
        self._num_output_tokens[index] += len(event.token_ids)

    def close(self, *, aborted: int) -> None:
        metrics = self._metrics
        metrics.sequences.labels(*self._labels).inc(len(self._last_s))
        metrics.prompt_tokens.labels(*self._labels).inc(sum(self._num_prompt_tokens))
        metrics.output_tokens.labels(*self._labels).inc(sum(self._num_output_tokens))
        if aborted:
            metrics.aborted.inc(aborted)


class EngineCollector(Collector):
    """Reads the engine when Prometheus asks. The vllm names are the ones that inference routers already read."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # what is collected depends on the engine's counters; nothing is read at registration

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        model = self._engine.served_name
        gauges = {
            "vllm:num_requests_waiting": float(stats.num_waiting),
            "vllm:num_requests_running": float(stats.num_running),
            "vllm:kv_cache_usage_perc": stats.kv_usage,
        }
        for name, value in gauges.items():
            yield _gauge(name, "See the vLLM metric of this name", {"model_name": model}, value)
        for name, value in gauges.items():
            own_name = name.replace("vllm:", "multilora_").replace("_perc", "_ratio")
            yield _gauge(own_name, "Of the engine, now", {}, value)
        yield _gauge("multilora_up", "1 while the engine's thread is alive", {}, float(self._engine.is_healthy()))
        for name, value in sorted(stats.counters.items()):
            yield CounterMetricFamily(f"multilora_{name}", "Counted by the engine", value=value)
        lora = {
            "max_lora": str(stats.max_slots),
            "running_lora_adapters": ",".join(stats.running_adapters),
            "waiting_lora_adapters": ",".join(stats.waiting_adapters),
        }
        yield _gauge("vllm:lora_requests_info", "Adapters on the device; the value is the time", lora, time.time())


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


async def show_metrics(request: HttpRequest) -> Response:
    metrics = request.app.state.context.metrics
    assert isinstance(metrics, ApiMetrics)
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def register(app: FastAPI) -> None:
    app.add_api_route("/metrics", show_metrics, methods=["GET"], response_class=Response, summary="Prometheus text")
