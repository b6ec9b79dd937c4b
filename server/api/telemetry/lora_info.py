"""What inference routers read of adapters: every text that a client may send as `model` to reach one in memory, and
whether there is room for more. A router compares a request's `model` with these texts, letter by letter.

Two generations of routers: llm-d's lora-affinity-scorer reads `vllm:lora_requests_info`, its lora-load-state-scorer
the gauges of `lora_residency` (https://github.com/llm-d/llm-d-router/pull/2792).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy.exc import SQLAlchemyError

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError
from adapters_store.packed.mix import is_mix
from adapters_store.storage.names import FINE_TUNED
from adapters_store.versions.served_names import ServedName, ServedNames
from server.engine.metrics import EngineStats

NAME = "vllm:lora_requests_info"
LOADED = "vllm:lora_adapter_loaded"
MAX_IN_HOST = 1000  # adapters listed that are in host memory alone: a reader parses all of them every 50 ms


def gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    """One sample."""
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def lora_info(stats: EngineStats, names: ServedNames, base: str) -> Metric:
    """The one sample of `vllm:lora_requests_info`. base: the served base's name.

    max_lora: to a router a server is full if the listed names reach it. One adapter has several names, so it is
    their number and, beyond it, how many more adapters of the mean size fit.
    """
    running, waiting = list(stats.resident_adapters), list(stats.queued_adapters)
    known = _known(names, {*running, *waiting})
    texts = [_texts(known, digests, base) for digests in (running, waiting)]
    num_on_the_way = len(set(waiting) - set(running))
    num_more = max(0, stats.num_adapters_fit - num_on_the_way)
    labels = {
        "max_lora": str(sum(map(len, texts)) + num_more),
        "running_lora_adapters": ",".join(texts[0]),
        "waiting_lora_adapters": ",".join(texts[1]),
    }
    return gauge(NAME, "Adapters on the device; the value is the time", labels, time.time())


def resident_texts(stats: EngineStats, names: ServedNames, base: str) -> list[str]:
    """Every text that reaches an adapter on the device. Short of the database: what was known last."""
    return _texts(_known(names, stats.resident_adapters), stats.resident_adapters, base)


def lora_residency(stats: EngineStats, names: ServedNames, base: str) -> Iterator[Metric]:
    """One series of `vllm:lora_adapter_loaded` for each text and memory that holds its adapter; the counts are of
    adapters, each once. level gpu: the memory that the forward reads, whatever the device is; cpu: host memory."""
    resident = dict.fromkeys(stats.resident_adapters)
    in_host = [digest for digest in dict.fromkeys(stats.held_adapters) if digest not in resident]
    pinned = set(stats.pinned_adapters)
    named = [digest for digest in in_host if not is_mix(digest)]  # a mix has no text
    levels = {"gpu": list(resident), "cpu": named[:MAX_IN_HOST]}
    known = _known(names, {digest for digests in levels.values() for digest in digests})
    loaded = GaugeMetricFamily(
        LOADED,
        "Adapters in memory, by text and level",
        labels=("model_name", "adapter_name", "level", "pinned", "rank"),
    )
    for level, digests in levels.items():
        for digest, served in ((each, served) for each in digests for served in known[each]):
            is_pinned = str(digest in pinned).lower()
            for text in model_texts(served, base):
                loaded.add_metric((base, text, level, is_pinned, str(served.rank)), 1.0)
    yield loaded
    counts = {"num_gpu": len(resident), "num_cpu": len(in_host), "max_gpu": len(resident) + stats.num_adapters_fit}
    for name, count in counts.items():
        what, level = name.split("_")
        full_name = f"vllm:{what}_{level}_{'loaded_' if what == 'num' else ''}lora_adapters"
        yield gauge(full_name, "See the vLLM metric of this name", {"model_name": base}, float(count))


def model_texts(served: ServedName, base: str) -> list[str]:
    """What means this version, and it alone, as `model`: for its owner, or for a caller that speaks for all."""
    refs = [f"{served.name}@{served.version}", *([served.name] if served.is_active else [])]
    texts = [f"{served.tenant}/{ref}" for ref in refs]
    if served.is_only:
        texts += refs
    return [*texts, f"{FINE_TUNED}{base}:{served.tenant}:{served.name}:{served.version}"]


def _known(names: ServedNames, digests: Collection[AdapterDigest]) -> Mapping[AdapterDigest, tuple[ServedName, ...]]:
    try:
        return names.of(digests)
    except (StoreError, SQLAlchemyError):  # the database is away; the engine's numbers are shown all the same
        return names.last_known(digests)


def _texts(
    known: Mapping[AdapterDigest, tuple[ServedName, ...]], digests: Collection[AdapterDigest], base: str
) -> list[str]:
    return list(
        dict.fromkeys(text for digest in digests for served in known[digest] for text in model_texts(served, base))
    )
