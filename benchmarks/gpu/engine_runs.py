"""A real engine over a random base, and requests for it. No threads, no HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapters_store.base.description import AdapterDigest
from benchmarks.common.workload import make_request, random_prompts, run_requests
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.random_base import RandomAdapters, random_tokenizer
from benchmarks.gpu.sizes import Sizes
from server.engine.engine import Engine
from server.engine.model.base_model import BaseModel
from server.engine.request import Request
from server.engine.schedule import SchedulerSettings
from server.engine.startup.build import EngineParts, join_engine
from server.engine.startup.settings import MIB, EngineSettings, MemoryBudget

MAX_ROWS = 64
MAX_ADAPTERS = 128
_seeds = itertools.count()


@contextmanager
def engine_over(
    bench: Bench, base: BaseModel, source: RandomAdapters, sizes: Sizes, *, pool_adapters: int
) -> Iterator[EngineParts]:
    """Its worker is not started. Prefix cache off, so that every prompt is computed."""
    toy = bench.toy
    context = 2 * (sizes.long_prompt + sizes.prompt + sizes.new_tokens)
    memory = MemoryBudget(
        kv_cache=4 * MIB if toy else None,
        adapter_pool=pool_adapters * (source.num_bytes + 4096),
        host_cache=(sizes.storm_adapters + 4) * (source.num_bytes + 4096),
    )
    settings = EngineSettings(
        base=Path("random"),
        max_adapters=MAX_ADAPTERS,
        max_model_len=context,
        prefix_cache=False,
        scheduler=SchedulerSettings(
            max_running=4 if toy else MAX_ROWS, max_batch_tokens=32 if toy else sizes.num_prompts * sizes.long_prompt
        ),
        memory=memory,
    )
    parts = join_engine(base, random_tokenizer(sizes.model.vocab), settings, source, report_progress=bench.say)
    try:
        yield parts
    finally:
        parts.close()


def request(
    length: int, new_tokens: int, adapter: AdapterDigest | None, *, vocab: int, tenant: str = "bench"
) -> Request:
    """Random tokens, greedy, never ended early."""
    [prompt] = random_prompts(1, length, vocab, seed=next(_seeds))
    return make_request(prompt, adapter, new_tokens, tenant=tenant)


def warm(engine: Engine, adapters: Sequence[AdapterDigest], *, vocab: int) -> None:
    """Bring them to the device."""
    run_requests(engine, [request(2, 1, adapter, vocab=vocab) for adapter in adapters])
