"""What the watch counts. What it frees: `tests/server/engine/test_leaving_service.py`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from adapters_store.base.description import AdapterDigest
from adapters_store.store import AdapterStore
from server.api.background import StoreWatch
from support.worlds.fake_engine import FakeEngine


def test_what_is_in_quarantine_is_counted_until_it_is_released(store: AdapterStore, fake_engine: FakeEngine) -> None:
    registry = CollectorRegistry()
    watch = StoreWatch(store, fake_engine, Gauge("away", "", registry=registry))
    away = AdapterDigest("sha256:" + "ab" * 32)

    def told() -> float | None:
        watch.look()
        return registry.get_sample_value("away")

    assert told() == 0
    store.quarantine.put(away, "blob_missing", "")
    assert told() == 1
    store.quarantine.release(away)
    assert told() == 0
