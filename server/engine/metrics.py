"""A moment of the engine, for metrics and health. Knows numbers only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapters_store.base.description import AdapterDigest
from adapters_store.tiers.stats import AdapterTiersStats
from server.engine.queueing.fair_share import TenantAccount, jain_index
from server.engine.scheduling.prefix_cache import PrefixCacheStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class Histogram:
    """counts: by buckets that end at SECONDS; what is above the last falls into one more. Read it by `snapshot`."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(SECONDS, value)] += 1
        self.total += value

    def snapshot(self) -> Histogram:
        return Histogram(self.counts.copy(), self.total)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """kv_usage is 0..1 of num_kv_blocks blocks of kv_block_size tokens. running_adapters: names resident on the device.
    counters only ever rise.

    resident_adapters, queued_adapters: digests on the device, and wanted by waiting requests. num_adapters_fit: how
    many more of the mean size of those on the device there is free memory for. held_adapters: digests in host or device
    memory. pinned_adapters: those on the device that are not evicted. gauges: numbers of now, each a metric
    `multilora_NAME`. histograms: in seconds, likewise.
    """

    num_waiting: int = 0
    num_running: int = 0
    kv_usage: float = 0.0
    num_kv_blocks: int = 0
    kv_block_size: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    resident_adapters: tuple[AdapterDigest, ...] = ()
    queued_adapters: tuple[AdapterDigest, ...] = ()
    num_adapters_fit: int = 0
    held_adapters: tuple[AdapterDigest, ...] = ()
    pinned_adapters: tuple[AdapterDigest, ...] = ()
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
    draft_tokens: int = 0  # guessed by prompt lookup
    accepted_draft_tokens: int = 0  # of those, right ones
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


class FairnessGauge:
    """Jain's index over windows: of what each tenant was given for its weight, if it waited at both ends of the window.
    Those that did not wait got all they wanted, so they are not counted. 1 if fewer than two waited."""

    def __init__(self, window_s: float = 10.0) -> None:
        self.value = 1.0
        self._window_s = window_s
        self._end_s = float("-inf")
        self._at_start: dict[str, float] = {}

    def read(self, accounts: Iterable[TenantAccount], now_s: float) -> float:
        """The index of the last whole window."""
        if now_s < self._end_s:
            return self.value
        waiting = {account.tenant: account.served for account in accounts if account.num_waiting}
        given = [served - self._at_start[tenant] for tenant, served in waiting.items() if tenant in self._at_start]
        self.value = jain_index(given) if len(given) > 1 else 1.0
        self._at_start, self._end_s = waiting, now_s + self._window_s
        return self.value
