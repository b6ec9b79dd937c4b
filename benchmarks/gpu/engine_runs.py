"""Batches of equal requests through a real engine, step by step. Knows the engine's step loop; no threads, no HTTP."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adapters_store.base.description import AdapterDigest
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.random_base import RandomAdapters, random_tokenizer
from benchmarks.gpu.sizes import Sizes
from server.engine.engine import Engine
from server.engine.model.base_model import BaseModel
from server.engine.request import Request, SamplingParams
from server.engine.schedule import SchedulerSettings
from server.engine.startup.build import EngineParts, join_engine
from server.engine.startup.settings import MIB, EngineSettings, MemoryBudget

MAX_ROWS = 64
MAX_ADAPTERS = 128
_ids = itertools.count()


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


@dataclass(slots=True)
class BatchTimes:
    """prefill_s: until every request has its first token. step_s: of each step in which all rows decode."""

    num_rows: int
    prefill_s: float
    step_s: list[float] = field(default_factory=list)

    @property
    def median_step_s(self) -> float:
        return statistics.median(self.step_s)

    @property
    def decode_tokens_per_s(self) -> float:
        return self.num_rows / self.median_step_s


def request(
    length: int, new_tokens: int, adapter: AdapterDigest | None, *, vocab: int, tenant: str = "bench"
) -> Request:
    """Random tokens, greedy, never ended early."""
    number = next(_ids)
    prompt = np.random.default_rng(number).integers(2, vocab, length).tolist()
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return Request(f"g{number}", tenant, prompt, params, adapter)


def warm(engine: Engine, adapters: Sequence[AdapterDigest], *, vocab: int) -> None:
    """Bring them to the device."""
    run_batch(engine, [request(2, 1, adapter, vocab=vocab) for adapter in adapters])


def run_batch(engine: Engine, requests: Sequence[Request]) -> BatchTimes:
    """All at once, stepped to the end on this thread."""
    first: set[str] = set()
    done: set[str] = set()
    began_s = last_s = time.perf_counter()
    for each in requests:
        engine.add(each)
    times = BatchTimes(len(requests), 0.0)
    while len(done) < len(requests):
        all_decode = len(first) == len(requests) and not done
        events = engine.step()
        now_s = time.perf_counter()
        if all_decode:
            times.step_s.append(now_s - last_s)
        last_s = now_s
        for event in events:
            assert event.error is None, event.error
            first |= {event.request_id} if event.token_ids else set()
            done |= {event.request_id} if event.finish_reason else set()
        if len(first) == len(requests) and not times.prefill_s:
            times.prefill_s = now_s - began_s
    return times
