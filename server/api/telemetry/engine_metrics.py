"""Shows the engine's numbers to Prometheus: reads them when asked, names them, and knows which belong to which tier.

The vllm names are the ones that inference routers already read. `multilora_*` with a `tier` label: device, host.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters_store.versions.served_names import ServedNames
from server.api.engine_client import EngineClient
from server.api.telemetry.lora_info import gauge, lora_info, lora_residency
from server.api.telemetry.metric_texts import engine_text
from server.engine.metrics import SECONDS, EngineStats, Histogram

# The engine's own counter for each tier of memory.
_TIERS = {
    "adapter_hits": {"device": "adapter_hits", "host": "host_hits"},
    "adapter_misses": {"device": "adapter_misses", "host": "host_misses"},
    "adapter_evictions": {"device": "adapter_evictions", "host": "host_evictions"},
    "adapter_loads": {"device": "adapter_activations", "host": "host_loads"},
}
_IN_A_TIER = frozenset(name for tiers in _TIERS.values() for name in tiers.values())


class EngineCollector(Collector):
    """One engine's gauges, counters and histograms at the moment they are asked for.

    names: of adapters, for routers; None: what they read of adapters is left out.
    """

    def __init__(self, engine: EngineClient, names: ServedNames | None = None) -> None:
        self._engine = engine
        self._names = names

    def describe(self) -> list[Metric]:
        return []  # what is collected depends on the engine's counters; nothing is read at registration

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield from self._router_gauges(stats)
        yield gauge("multilora_up", "1 while the engine's thread is alive", {}, float(self._engine.is_healthy()))
        for name, value in sorted(stats.gauges.items()):
            yield gauge(f"multilora_{name}", engine_text(name), {}, value)
        for name, value in sorted(stats.counters.items()):
            if name not in _IN_A_TIER:
                yield CounterMetricFamily(f"multilora_{name}", engine_text(name), value=value)
        for name in _TIERS:
            yield _by_tier(name, stats)
        for name, histogram in sorted(stats.histograms.items()):
            yield _histogram(name, histogram)
        if self._names is not None:
            yield lora_info(stats, self._names, self._engine.served_name)
            yield from lora_residency(stats, self._names, self._engine.served_name)

    def _router_gauges(self, stats: EngineStats) -> Iterator[Metric]:
        gauges = {
            "vllm:num_requests_waiting": float(stats.num_waiting),
            "vllm:num_requests_running": float(stats.num_running),
            "vllm:kv_cache_usage_perc": stats.kv_usage,
        }
        cache = {"block_size": str(stats.kv_block_size), "num_gpu_blocks": str(stats.num_kv_blocks)}
        yield gauge("vllm:cache_config_info", "The KV cache: tokens in a block, and blocks", cache, 1.0)
        for name, value in gauges.items():
            yield gauge(name, "See the vLLM metric of this name", {"model_name": self._engine.served_name}, value)
            own_name = name.removeprefix("vllm:").replace("_perc", "_ratio")
            yield gauge(f"multilora_{own_name}", engine_text(own_name), {}, value)


def _by_tier(name: str, stats: EngineStats) -> Metric:
    family = CounterMetricFamily(f"multilora_{name}", engine_text(name), labels=["tier"])
    for tier, counter in _TIERS[name].items():
        family.add_metric([tier], stats.counters.get(counter, 0.0))
    return family


def _histogram(name: str, histogram: Histogram) -> Metric:
    bounds = [*map(str, SECONDS), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
    return HistogramMetricFamily(f"multilora_{name}", engine_text(name), buckets=buckets, sum_value=histogram.total)
