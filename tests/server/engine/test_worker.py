"""The engine's worker before its thread has run."""

from __future__ import annotations

from pathlib import Path

from adapters_store.store import AdapterStore
from server.engine.startup.build import build_engine
from server.engine.startup.settings import EngineSettings, MemoryBudget


def test_the_first_scrape_has_every_metric(base: Path, tmp_path: Path) -> None:
    """The engine's thread may come to its first step after the server has answered: numbers of nothing are numbers."""
    store = AdapterStore.open(tmp_path)
    memory = MemoryBudget(kv_cache=1 << 20, adapter_pool=1 << 20, host_cache=1 << 20)
    parts = build_engine(EngineSettings(base=base, dtype="float32", num_threads=1, block_size=8, memory=memory), store)
    try:
        stats = parts.worker.stats()
        assert stats.num_kv_blocks == parts.engine.stats().num_kv_blocks > 0
        assert stats.counters.keys() == parts.engine.stats().counters.keys()
        assert stats.gauges.keys() == parts.engine.stats().gauges.keys()
        assert stats.histograms
    finally:
        parts.close()
        store.close()
