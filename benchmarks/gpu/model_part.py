"""(e) An 8B-shaped model: decode and prefill, bare and with distinct adapters, against the bytes of its weights.

(f) rides along on the same engine: cold activation, and what loading costs others' inter-token latency.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common.shapes import RANK
from benchmarks.common.workload import run_requests
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.engine_runs import engine_over, request, warm
from benchmarks.gpu.paging import paging_rows
from benchmarks.gpu.random_base import RandomAdapters, random_base
from benchmarks.gpu.sizes import Sizes, sizes_for
from benchmarks.gpu.targets import floor_bytes
from benchmarks.roofline import NF4_BITS_PER_WEIGHT
from server.engine.model.runner import ModelRunner
from server.engine.startup.build import EngineParts

PREFILL_ROUNDS = 3


def run_bf16(bench: Bench) -> list[Row]:
    return _run(bench, nf4=False)


def run_nf4(bench: Bench) -> list[Row]:
    return _run(bench, nf4=True)


def _run(bench: Bench, *, nf4: bool) -> list[Row]:
    sizes = sizes_for(toy=bench.toy)
    bench.say("making a random base on the device")
    base = random_base(sizes.model, bench.device, nf4=nf4)
    with tempfile.TemporaryDirectory() as folder:
        source = RandomAdapters(base, RANK, file=Path(folder) / "adapter.bin")
        most = max(adapters for _, adapters in sizes.cases)
        with engine_over(bench, base, source, sizes, pool_adapters=most + 2) as parts:
            rows = _facts(bench, parts)
            rows += _decode_rows(bench, parts, source, sizes, nf4=nf4)
            if not nf4:
                rows += _prefill_rows(bench, parts, source, sizes)
                rows += paging_rows(bench, parts, source, sizes)
    return rows


def _facts(bench: Bench, parts: EngineParts) -> list[Row]:
    runner = parts.engine._runner
    assert isinstance(runner, ModelRunner)
    graphs = runner.graphs
    return [
        {
            "kind": "start",
            "graphs": 0 if graphs is None else graphs.num_recorded,
            "graphs_failure": "" if graphs is None else graphs.failure or "",
            "memory": parts.plan.rows(),
            "bandwidth": bench.bandwidth,
        }
    ]


def _decode_rows(bench: Bench, parts: EngineParts, source: RandomAdapters, sizes: Sizes, *, nf4: bool) -> list[Row]:
    digests = [source.digest(f"d{index}") for index in range(max(adapters for _, adapters in sizes.cases))]
    warm(parts.engine, digests, vocab=sizes.model.vocab)
    rows: list[Row] = []
    bare: dict[int, float] = {}
    for count, adapters in sizes.cases:
        requests = [
            request(
                sizes.prompt,
                sizes.new_tokens,
                digests[index % adapters] if adapters else None,
                vocab=sizes.model.vocab,
            )
            for index in range(count)
        ]
        times = run_requests(parts.engine, requests)
        if not adapters:
            bare[count] = times.median_step_s
        bits = NF4_BITS_PER_WEIGHT if nf4 else 16.0
        floor_s = floor_bytes(sizes, count, bits) / bench.bandwidth
        row: Row = {"kind": "decode", "base": "nf4" if nf4 else "bf16", "rows": count, "adapters": adapters}
        row |= {"step_ms": 1e3 * times.median_step_s, "tok_per_s": count / times.median_step_s}
        rows.append(row | {"of_bare": bare[count] / times.median_step_s, "of_floor": floor_s / times.median_step_s})
        bench.keep(rows[-1])
        bench.say(f"decode {row['base']} {count} rows, {adapters} adapters: {1e3 * times.median_step_s:.2f} ms")
    return rows


def _prefill_rows(bench: Bench, parts: EngineParts, source: RandomAdapters, sizes: Sizes) -> list[Row]:
    digests = [source.digest(f"d{index}") for index in range(sizes.num_prompts)]
    warm(parts.engine, digests, vocab=sizes.model.vocab)
    rows: list[Row] = []
    seconds: dict[int, float] = {}
    for adapters in (0, 1, sizes.num_prompts):
        best = []
        for _ in range(1 if bench.toy else PREFILL_ROUNDS):
            chosen = [digests[index % adapters] if adapters else None for index in range(sizes.num_prompts)]
            requests = [request(sizes.long_prompt, 1, digest, vocab=sizes.model.vocab) for digest in chosen]
            best.append(run_requests(parts.engine, requests).prefill_s)
        seconds[adapters] = sorted(best)[len(best) // 2]
        tokens = sizes.num_prompts * sizes.long_prompt
        row: Row = {"kind": "prefill", "tokens": tokens, "adapters": adapters, "ms": 1e3 * seconds[adapters]}
        rows.append(row | {"tok_per_s": tokens / seconds[adapters], "of_bare": seconds[0] / seconds[adapters]})
        bench.keep(rows[-1])
    return rows
