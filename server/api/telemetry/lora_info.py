"""What inference routers read of adapters: every text that a client may send as `model` to reach one on the device, and
whether there is room for more. A router compares a request's `model` with these texts, letter by letter.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy.exc import SQLAlchemyError

from adapters_store.base.description import AdapterDigest
from adapters_store.storage.names import FINE_TUNED
from adapters_store.versions.served_names import ServedName, ServedNames
from server.api.engine_client import EngineStats

NAME = "vllm:lora_requests_info"


def lora_info(stats: EngineStats, names: ServedNames, base: str) -> Metric:
    """The one sample of `vllm:lora_requests_info`. base: the served base's name.

    max_lora: a router takes a server for full if the listed names reach it. One adapter has several names, so it is
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
    family = GaugeMetricFamily(NAME, "Adapters on the device; the value is the time", labels=list(labels))
    family.add_metric(list(labels.values()), time.time())
    return family


def resident_texts(stats: EngineStats, names: ServedNames, base: str) -> list[str]:
    """Every text that reaches an adapter on the device. Short of the database: what was known last."""
    return _texts(_known(names, stats.resident_adapters), stats.resident_adapters, base)


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
    except SQLAlchemyError:  # the database is away; the engine's numbers are shown all the same
        return names.last_known(digests)


def _texts(
    known: Mapping[AdapterDigest, tuple[ServedName, ...]], digests: Collection[AdapterDigest], base: str
) -> list[str]:
    return list(
        dict.fromkeys(text for digest in digests for served in known[digest] for text in model_texts(served, base))
    )
