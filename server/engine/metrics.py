"""A moment of the engine, for metrics and health. Knows numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters_store.base.description import AdapterDigest
from adapters_store.tiers.stats import AdapterTiersStats
from server.engine.histogram import Histogram
from server.engine.scheduling.prefix_cache import PrefixCacheStats


@dataclass(frozen=True, slots=True)
class EngineStats:
    """kv_usage is 0..1. running_adapters: names resident on the device. counters only ever rise.

    resident_adapters, queued_adapters: digests on the device, and wanted by waiting requests. num_adapters_fit: how
    many more of the mean size of those on the device there is free memory for. held_adapters: digests in host or device
    memory. gauges: numbers of now, each a metric `multilora_NAME`. histograms: in seconds, likewise.
    """

    num_waiting: int = 0
    num_running: int = 0
    kv_usage: float = 0.0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    resident_adapters: tuple[AdapterDigest, ...] = ()
    queued_adapters: tuple[AdapterDigest, ...] = ()
    num_adapters_fit: int = 0
    held_adapters: tuple[AdapterDigest, ...] = ()
    max_slots: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)


@dataclass(slots=True)
class EngineCounters:
    """What the engine itself counts; the pools count their own."""

    steps: int = 0
    steps_ahead: int = 0  # forwards launched before the tokens of the one before were read
    computed_prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    preemptions: int = 0
    isolated_steps: int = 0
    quarantined: int = 0
    expired: int = 0


def memory_counters(tiers: AdapterTiersStats, cache: PrefixCacheStats) -> dict[str, float]:
    """What adapter memory and the prefix cache have counted."""
    return {
        "adapter_hits": tiers.hits,
        "adapter_misses": tiers.misses,
        "adapter_evictions": tiers.evictions,
        "adapter_activations": tiers.activations,
        "host_hits": tiers.host.hits,
        "host_misses": tiers.host.misses,
        "host_loads": tiers.host.loads,
        "host_load_failures": tiers.host.failures,
        "host_evictions": tiers.host.evictions,
        "prefix_hit_tokens": cache.hit_tokens,
        "prefix_query_tokens": cache.query_tokens,
    }
