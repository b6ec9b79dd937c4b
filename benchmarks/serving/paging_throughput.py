"""More adapters than the device holds: what paging costs in tokens per second.

A closed loop of 8 requests with Zipf 1.0 popularity, on three engines in turn. "resident": 8 adapters in a pool of 8.
"paged": 5,000 adapters in a pool of 32 and host memory for 256; all loads are real ones of real files, but several
adapters share a file, so that 36 GB need not lie on the disk. "paged, store": fewer adapters, each with its own file,
host memory in proportion. Files are in the page cache after their first load.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import numpy as np

from adapters_store.base.description import AdapterDigest
from benchmarks.common.adapters import AliasedSource, BenchStore
from benchmarks.common.popularity import choose_adapters
from benchmarks.common.report import Report, Row
from benchmarks.common.shapes import BenchShape
from benchmarks.common.timing import Spread, interleaved, percentile, ratio
from benchmarks.common.workload import Lengths, bench_engine, lengths_for, random_prompts
from benchmarks.serving.clients import closed_loop
from server.engine.startup.adapter_parts import AdapterSource
from server.engine.startup.build import EngineParts

CONCURRENCY = 8


@dataclass(frozen=True, kw_only=True)
class Scale:
    """registered: adapters of the large case. pool, host: adapters that fit on the device, and in host memory."""

    registered: int
    pool: int
    host: int
    requests: int
    rounds: int


FULL_SCALE = Scale(registered=5000, pool=32, host=256, requests=160, rounds=3)
QUICK_SCALE = Scale(registered=40, pool=8, host=12, requests=24, rounds=2)


@dataclass(frozen=True)
class Plan:
    """One engine: where its adapters come from, and how many fit where."""

    name: str
    source: AdapterSource
    digests: Sequence[AdapterDigest]
    pool: int
    host: int


@dataclass(frozen=True, slots=True)
class Load:
    """One closed loop. copies: to the device; loads: into host memory; both per request."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    copies: float
    loads: float


def measure_throughput(report: Report, shape: BenchShape, adapters: BenchStore) -> list[Row]:
    scale = QUICK_SCALE if report.quick else FULL_SCALE
    plans = _plans(adapters, scale)
    lengths = lengths_for(quick=report.quick)
    with ExitStack() as stack:
        cases: dict[str, Callable[[], Load]] = {}
        for plan in plans:
            engine = bench_engine(
                shape, plan.source, pool_adapters=plan.pool, host_adapters=plan.host, max_rows=CONCURRENCY
            )
            parts = stack.enter_context(engine)
            parts.worker.start()
            cases[plan.name] = _looper(parts, plan.digests, scale, lengths)
        loads = interleaved(cases, rounds=scale.rounds, say=report.say, show=_shown)
    return [_row_of(plan, loads[plan.name], loads["resident"]) for plan in plans]


def _plans(adapters: BenchStore, scale: Scale) -> list[Plan]:
    aliased = AliasedSource(adapters, scale.registered)
    share = len(adapters.digests) / scale.registered
    return [
        Plan("resident", aliased, aliased.digests[:CONCURRENCY], CONCURRENCY, CONCURRENCY),
        Plan("paged", aliased, aliased.digests, scale.pool, scale.host),
        Plan("paged, store", adapters.store, adapters.digests, scale.pool, max(1, round(scale.host * share))),
    ]


def _looper(parts: EngineParts, digests: Sequence[AdapterDigest], scale: Scale, lengths: Lengths) -> Callable[[], Load]:
    """Runs the closed loop, with other prompts, lengths and choices in each round, the same for every engine.

    Lengths vary by a half each way: of equal ones, requests that never wait would all begin and end together.
    """
    seeds = count()

    def run() -> Load:
        seed = next(seeds)
        chosen = choose_adapters("zipf", scale.requests, len(digests), seed=seed)
        prompts = random_prompts(scale.requests, lengths.prompt, parts.worker.vocabulary.size, seed=seed)
        max_tokens = np.random.default_rng(seed).integers(lengths.new // 2, lengths.new * 3 // 2 + 1, scale.requests)
        before = parts.engine.tiers.stats()
        wanted = [digests[index] for index in chosen]
        result = closed_loop(parts.worker, wanted, prompts, max_tokens.tolist(), concurrency=CONCURRENCY)
        after = parts.engine.tiers.stats()
        return Load(
            result.tokens_per_s,
            percentile(result.ttfts_s, 50),
            percentile(result.ttfts_s, 95),
            (after.activations - before.activations) / scale.requests,
            (after.host.loads - before.host.loads) / scale.requests,
        )

    return run


def _shown(load: Load) -> str:
    return f"{load.tokens_per_s:.0f} tok/s, {load.copies:.2f} copies and {load.loads:.2f} loads per request"


def _row_of(plan: Plan, loads: Sequence[Load], resident: Sequence[Load]) -> Row:
    speeds = [load.tokens_per_s for load in loads]
    return {
        "measure": "throughput",
        "case": plan.name,
        "registered": len(plan.digests),
        "pool_adapters": plan.pool,
        "host_adapters": plan.host,
        **Spread.of(speeds).columns("tok_per_s"),
        **ratio(speeds, [load.tokens_per_s for load in resident]).columns("of_resident"),
        "ttft_p50_ms": 1e3 * statistics.median(load.ttft_p50_s for load in loads),
        "ttft_p95_ms": 1e3 * statistics.median(load.ttft_p95_s for load in loads),
        "copies_per_request": statistics.median(load.copies for load in loads),
        "loads_per_request": statistics.median(load.loads for load in loads),
    }
