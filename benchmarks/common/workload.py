"""A batch of equal requests through an engine, and what it took. Knows the engine's step loop; no HTTP, no threads."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from adapters_store.base.description import AdapterDigest
from benchmarks.common.shapes import RANK, BenchShape, base_folder
from server.engine.engine import Engine
from server.engine.request import Request, SamplingParams, TokenConstraint
from server.engine.schedule import CPU_STEP, SchedulerSettings
from server.engine.startup.adapter_parts import AdapterSource
from server.engine.startup.build import EngineParts, build_engine
from server.engine.startup.settings import MIB, EngineSettings, MemoryBudget

MAX_ROWS = 32
Adapters = Sequence[AdapterDigest | None]
_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every request: greedy, end-of-sequence ignored, so that all are equally long."""

    prompt: int
    new: int


PAPER = Lengths(prompt=64, new=32)
TINY = Lengths(prompt=8, new=4)


def lengths_for(*, quick: bool) -> Lengths:
    return TINY if quick else PAPER


@contextmanager
def bench_engine(
    shape: BenchShape,
    source: AdapterSource,
    *,
    pool_adapters: int,
    host_adapters: int,
    max_rows: int = MAX_ROWS,
    max_batch_tokens: int = CPU_STEP.tokens,
    prefix_cache: bool = False,
    rank: int = RANK,
    tensor_parallel: int = 1,
) -> Iterator[EngineParts]:
    """The real engine with room for so many adapters of a rank on the device and in host memory; without a prefix cache
    every prompt is computed. Its worker is not started."""
    adapter_bytes = shape.adapter_bytes(rank) * 101 // 100 + 64 * 1024  # alignment
    memory = MemoryBudget(
        kv_cache=512 * MIB, adapter_pool=pool_adapters * adapter_bytes, host_cache=host_adapters * adapter_bytes
    )
    settings = EngineSettings(
        base=base_folder(shape),
        device="cpu",
        tensor_parallel=tensor_parallel,
        max_adapters=pool_adapters,
        prefix_cache=prefix_cache,
        scheduler=SchedulerSettings(max_running=max_rows, max_batch_tokens=max_batch_tokens),
        memory=memory,
    )
    parts = build_engine(settings, source)
    try:
        yield parts
    finally:
        parts.close()


def random_prompts(count: int, length: int, vocab: int, *, seed: int) -> list[list[int]]:
    """No two alike, no special tokens."""
    rng = np.random.default_rng(seed)
    return [[int(token) for token in row] for row in rng.integers(2, vocab, (count, length))]


def make_request(
    prompt: list[int], adapter: AdapterDigest | None, max_tokens: int, *, tenant: str = "bench"
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(f"b{next(_ids)}", tenant, prompt, params, adapter)


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One batch from its submission to its last token. prefill_s: until every request has its first token. steps_s: of
    each step in which all requests decode."""

    num_prompt_tokens: int
    total_s: float
    prefill_s: float
    ttfts_s: list[float]
    gaps_s: list[float]
    steps_s: list[float]
    tokens: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over all of the time."""
        return self.num_tokens / self.total_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, over the time after the prefill."""
        return (self.num_tokens - len(self.tokens)) / (self.total_s - self.prefill_s)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.num_prompt_tokens / self.prefill_s

    @property
    def median_step_s(self) -> float:
        return statistics.median(self.steps_s)


def run_batch(
    engine: Engine,
    prompts: Sequence[list[int]],
    adapters: Adapters,
    lengths: Lengths,
    constrain: Callable[[], TokenConstraint | None] = lambda: None,
) -> BatchRun:
    """constrain: what limits a request's tokens, made for each."""
    requests = [make_request(prompt, adapter, lengths.new) for prompt, adapter in zip(prompts, adapters, strict=True)]
    for request in requests:
        request.constraint = constrain()
    return run_requests(engine, requests)


def run_requests(engine: Engine, requests: Sequence[Request]) -> BatchRun:
    """All at once, stepped to the end on this thread."""
    times: dict[str, list[float]] = {request.id: [] for request in requests}
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    ends_s: list[float] = []
    began_s = time.perf_counter()
    for request in requests:
        engine.add(request)
    num_left = len(requests)
    while num_left:
        events = engine.step()
        now_s = time.perf_counter() - began_s
        ends_s.append(now_s)
        for event in events:
            assert event.error is None, event.error
            times[event.request_id].append(now_s)
            tokens[event.request_id] += event.token_ids
            num_left -= event.finish_reason is not None
    prefill_s, first_end_s = max(own[0] for own in times.values()), min(own[-1] for own in times.values())
    return BatchRun(
        sum(len(request.prompt_ids) for request in requests),
        total_s=now_s,
        prefill_s=prefill_s,
        ttfts_s=[own[0] for own in times.values()],
        gaps_s=[float(gap) for own in times.values() for gap in np.diff(own)],
        steps_s=[end - begin for begin, end in itertools.pairwise(ends_s) if prefill_s <= begin < end <= first_end_s],
        tokens=list(tokens.values()),
    )


def new_batches(
    engine: Engine,
    adapters: Adapters,
    lengths: Lengths,
    vocab: int,
    constrain: Callable[[], TokenConstraint | None] = lambda: None,
) -> Callable[[], BatchRun]:
    """Runs a request for each of the adapters, with prompts that no run before has had."""
    seeds = itertools.count()

    def run() -> BatchRun:
        prompts = random_prompts(len(adapters), lengths.prompt, vocab, seed=next(seeds))
        return run_batch(engine, prompts, adapters, lengths, constrain)

    return run
