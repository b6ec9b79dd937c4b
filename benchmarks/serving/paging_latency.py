"""What another tenant's loading does to running streams: p95 inter-token latency against a quiet engine.

8 streams run (half on the base, half on adapters that are on the device) while another tenant has 50 adapters loaded
from the real store, 4 asked for at once. "cold": in neither memory tier, and dropped from the page cache, so that they
come from the disk. "resident": the same requests when their adapters are on the device already, as a control.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from adapters_store.base.description import AdapterDigest
from benchmarks.common.adapters import BenchStore, drop_from_page_cache
from benchmarks.common.report import Report, Row
from benchmarks.common.shapes import BenchShape
from benchmarks.common.timing import Spread, interleaved, percentile, ratio
from benchmarks.common.workload import Adapters, Lengths, bench_engine
from benchmarks.serving.clients import endless_streams, load_and_answer
from server.engine.startup.build import EngineParts

NUM_STREAMS = 8
LOADS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Scale:
    """cold: adapters loaded in one phase. quiet_s: how long the quiet phase is watched."""

    cold: int
    quiet_s: float
    stream: Lengths
    rounds: int


FULL_SCALE = Scale(cold=50, quiet_s=2.0, stream=Lengths(64, 3000), rounds=7)
QUICK_SCALE = Scale(cold=6, quiet_s=0.2, stream=Lengths(8, 3000), rounds=2)


@dataclass(frozen=True, slots=True)
class Watch:
    """The streams' inter-token gaps while a phase lasted."""

    seconds: float
    num_loads: int
    p50_s: float
    p95_s: float
    worst_s: float


def num_adapters(*, quick: bool) -> int:
    """How many the store must hold."""
    return NUM_STREAMS // 2 + (QUICK_SCALE if quick else FULL_SCALE).cold


def measure_latency(report: Report, shape: BenchShape, adapters: BenchStore) -> list[Row]:
    scale = QUICK_SCALE if report.quick else FULL_SCALE
    room = num_adapters(quick=report.quick)
    own, cold = adapters.digests[: NUM_STREAMS // 2], adapters.digests[NUM_STREAMS // 2 : room]
    engine = bench_engine(shape, adapters.store, pool_adapters=room, host_adapters=room, max_rows=64)
    with engine as parts:
        parts.worker.start()
        phases: dict[str, Callable[[], None]] = {
            "quiet": partial(time.sleep, scale.quiet_s),
            "cold": partial(load_and_answer, parts.worker, cold, concurrency=LOADS_AT_ONCE),
            "resident": partial(load_and_answer, parts.worker, cold, concurrency=LOADS_AT_ONCE),
        }
        streams: Adapters = [*own, *[None] * (NUM_STREAMS - len(own))]
        seeds = count()

        def watch(name: str) -> Watch:
            if name == "cold":
                _make_cold(parts, adapters, cold)
            return _watch(parts, phases[name], streams, scale.stream, seed=next(seeds))

        watches = interleaved(
            {name: partial(watch, name) for name in phases}, rounds=scale.rounds, say=report.say, show=_shown
        )
    _check_loads(watches, len(cold))
    return [_row_of(name, watches[name], watches["quiet"]) for name in phases]


def _make_cold(parts: EngineParts, adapters: BenchStore, digests: Sequence[AdapterDigest]) -> None:
    parts.worker.forget_adapters(digests)
    for digest in digests:
        for file in adapters.store.weights_of(digest).parent.iterdir():
            drop_from_page_cache(file)


def _watch(parts: EngineParts, phase: Callable[[], None], adapters: Adapters, lengths: Lengths, *, seed: int) -> Watch:
    worker = parts.worker
    with endless_streams(worker, adapters, lengths, worker.vocabulary.size, seed=seed) as streams:
        loads_before = parts.adapters.host.stats().loads
        began_s = time.perf_counter()
        phase()
        ended_s = time.perf_counter()
        num_loads = parts.adapters.host.stats().loads - loads_before
    gaps = [gap for stream in streams for gap in stream.gaps_between(began_s, ended_s)]
    return Watch(ended_s - began_s, num_loads, percentile(gaps, 50), percentile(gaps, 95), max(gaps))


def _shown(watch: Watch) -> str:
    gaps = f"gaps p50 {1e3 * watch.p50_s:.1f}, p95 {1e3 * watch.p95_s:.1f} ms"
    return f"{watch.num_loads} loads in {watch.seconds:.2f} s; {gaps}"


def _check_loads(watches: dict[str, list[Watch]], expected: int) -> None:
    """The phases are what they are called, or the figures mean nothing."""
    for name, num_loads in (("quiet", 0), ("resident", 0), ("cold", expected)):
        found = [watch.num_loads for watch in watches[name]]
        assert found == [num_loads] * len(found), f"{name}: {found} loads, expected {num_loads} in each round"


def _row_of(name: str, watches: Sequence[Watch], quiet: Sequence[Watch]) -> Row:
    p95 = [1e3 * watch.p95_s for watch in watches]
    return {
        "measure": "inter-token latency",
        "case": name,
        "streams": NUM_STREAMS,
        "num_loads": watches[0].num_loads,
        "loads_per_s": statistics.median(watch.num_loads / watch.seconds for watch in watches),
        "itl_p50_ms": 1e3 * statistics.median(watch.p50_s for watch in watches),
        **Spread.of(p95).columns("itl_p95_ms"),
        **ratio(p95, [1e3 * watch.p95_s for watch in quiet]).columns("of_quiet"),
        "itl_worst_ms": 1e3 * max(watch.worst_s for watch in watches),
    }
