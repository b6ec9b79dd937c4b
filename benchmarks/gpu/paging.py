"""(f) How long a cold adapter takes to the device, from host memory and from disk, and what that costs the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from adapters_store.base.description import AdapterDigest
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.engine_runs import request
from benchmarks.gpu.random_base import RandomAdapters
from benchmarks.gpu.sizes import Sizes
from server.engine.request import Request
from server.engine.startup.build import EngineParts

ACTIVATIONS = 5
STREAMS = 8
POLL_S = 0.00005


def paging_rows(bench: Bench, parts: EngineParts, source: RandomAdapters, sizes: Sizes) -> list[Row]:
    """Activation times, then inter-token latency: quiet, and while others' cold adapters are loaded."""
    rows = [_activation(parts, source, from_disk=from_disk) for from_disk in (False, True)]
    streams = 2 if bench.toy else STREAMS
    quiet = _gaps(parts, sizes, streams, storm=None)
    cold = [source.digest(f"storm{index}") for index in range(sizes.storm_adapters)]
    storm = _gaps(parts, sizes, streams, storm=cold)
    p95 = {name: 1e3 * float(np.percentile(gaps, 95)) for name, gaps in (("quiet", quiet), ("storm", storm))}
    row: Row = {"kind": "storm", "loads": len(cold), "itl_p95_quiet_ms": p95["quiet"], "itl_p95_storm_ms": p95["storm"]}
    return [*rows, row | {"storm_over_quiet": p95["storm"] / p95["quiet"]}]


def _activation(parts: EngineParts, source: RandomAdapters, *, from_disk: bool) -> Row:
    """From asking until a forward may use it, with nothing else to do."""
    times = []
    for index in range(ACTIVATIONS):
        digest = source.digest(f"cold{index}{from_disk}")
        if not from_disk:
            _wait(partial(_in_host_memory, parts, digest))
        began_s = time.perf_counter()
        _wait(partial(_on_device, parts, digest))
        times.append(time.perf_counter() - began_s)
        parts.engine.tiers.release(digest)
    where = "disk (page cache)" if from_disk else "host memory"
    return {"kind": "activation", "from": where, "mb": source.num_bytes / 1e6, "ms": 1e3 * float(np.median(times))}


def _in_host_memory(parts: EngineParts, digest: AdapterDigest) -> bool:
    parts.adapters.host.request(digest)
    return parts.adapters.host.find(digest) is not None


def _on_device(parts: EngineParts, digest: AdapterDigest) -> bool:
    parts.engine.tiers.update([digest])
    parts.engine.tiers.poll()
    return parts.engine.tiers.acquire(digest) is not None


def _wait(is_done: Callable[[], bool], limit_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not is_done():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no adapter after {limit_s:.0f} s")
        time.sleep(POLL_S)


def _gaps(parts: EngineParts, sizes: Sizes, streams: int, *, storm: list[AdapterDigest] | None) -> list[float]:
    """Seconds between tokens of `streams` requests on the base; storm: one short request after the other, each on a
    cold adapter."""
    engine, vocab = parts.engine, sizes.model.vocab
    length = 4 * sizes.new_tokens if storm is None else sizes.new_tokens
    steady = [request(sizes.prompt, length, None, vocab=vocab) for _ in range(streams)]
    waiting = [request(2, 1, digest, vocab=vocab, tenant="other") for digest in storm or []]
    for each in steady:
        engine.add(each)
    asked: Request | None = None
    last: dict[str, float] = {}
    gaps: list[float] = []
    open_ids = {each.id for each in steady}
    while open_ids:
        if asked is None and waiting:
            asked = waiting.pop()
            engine.add(asked)
            open_ids.add(asked.id)
        for event in engine.step():
            now_s = time.perf_counter()
            if event.token_ids and event.request_id in last:
                gaps.append(now_s - last[event.request_id])
            last[event.request_id] = now_s
            if event.finish_reason is not None:
                assert event.error is None, event.error
                open_ids.discard(event.request_id)
                asked = None if asked is not None and asked.id == event.request_id else asked
        if waiting and not open_ids - {asked.id if asked else ""}:  # the streams ended before the storm
            again = [request(sizes.prompt, sizes.new_tokens, None, vocab=vocab) for _ in range(streams)]
            for each in again:
                engine.add(each)
            open_ids |= {each.id for each in again}
    return gaps
