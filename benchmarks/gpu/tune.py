"""Tries tiles that are not in the table, to find a new row: `python -m benchmarks.gpu_suite --only tune`.

Measures decode's shrink and expand, prefill's, and the NF4 matmul; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np

from benchmarks.common.arena import elements_per_layer, layered_adapters
from benchmarks.gpu.bench import Bench, Call, Row
from benchmarks.gpu.launch_forms import tiles_instead
from benchmarks.gpu.sizes import Sizes, sizes_for
from lora_kernels.check_cases import random_nf4
from lora_kernels.lora.batch import LoraBatch
from lora_kernels.lora.launcher import add_lora_delta
from lora_kernels.nf4.launcher import nf4_linear
from lora_kernels.triton_common.tiles import DECODE_ROWS, PREFILL_ROWS, DeviceTiles, LoraTile, Nf4Tile, device_tiles

Candidate = tuple[str, DeviceTiles]
LORA_CASES = ((DECODE_ROWS, 16, 32, 32), (DECODE_ROWS, 64, 32, 32), (PREFILL_ROWS, 16, 2048, 8))  # rows, adapters
TOY_CASES = ((DECODE_ROWS, 16, 4, 2),)


def run(bench: Bench) -> list[Row]:
    """One row per candidate, the fastest of each kernel first."""
    sizes = sizes_for(toy=bench.toy)
    own = device_tiles(bench.device)
    rows: list[Row] = []
    for block_m, rank, tokens, adapters in TOY_CASES if bench.toy else LORA_CASES:
        calls = _lora_calls(bench, sizes, rank, tokens, adapters)
        name = f"lora {block_m} rows, rank {rank}"
        rows += _tried(bench, name, calls, _lora_candidates(own, (block_m, rank), toy=bench.toy))
    calls = _nf4_calls(bench, sizes)
    rows += _tried(bench, "nf4 16 rows", calls, _nf4_candidates(own, toy=bench.toy))
    return rows


def _tried(bench: Bench, name: str, calls: list[Call], candidates: Iterator[Candidate]) -> list[Row]:
    rows: list[Row] = []
    for text, tiles in candidates:
        if bench.seconds_left < 10:
            bench.say(f"{name}: out of time")
            break
        try:
            with tiles_instead(tiles):
                rows.append({"kernel": name, "tile": text, "us": 1e6 * bench.seconds(calls)})
        except Exception as error:  # noqa: BLE001  a tile that does not fit this device
            rows.append({"kernel": name, "tile": text, "us": float("inf"), "failure": type(error).__name__})
    rows.sort(key=lambda row: float(str(row["us"])))
    for row in rows[:3]:
        bench.say(f"{name}: {row['us']:.1f} us  {row['tile']}")
    return rows


def _lora_candidates(own: DeviceTiles, key: tuple[int, int], *, toy: bool) -> Iterator[Candidate]:
    first = own.tiles.lora[key]
    shrinks = ((64, 128, 256), (2, 4, 8), (3, 4))
    expands = ((128, 256, 512), (4, 8))
    for shrink_k, warps, stages in [] if toy else product(*shrinks):
        yield _with_lora(own, key, replace(first, shrink_k=shrink_k, shrink_warps=warps, shrink_stages=stages))
    for expand_n, warps in [] if toy else product(*expands):
        yield _with_lora(own, key, replace(first, expand_n=expand_n, expand_warps=warps))
    yield _with_lora(own, key, first)
    for factor in (0.5, 2.0):
        programs = int(own.target_programs * factor)
        yield f"{programs} programs", replace(own, target_programs=programs)


def _with_lora(own: DeviceTiles, key: tuple[int, int], tile: LoraTile) -> Candidate:
    tiles = replace(own.tiles, lora={**own.tiles.lora, key: tile})
    return str(tile), replace(own, tiles=tiles)


def _nf4_candidates(own: DeviceTiles, *, toy: bool) -> Iterator[Candidate]:
    for block_n, warps, stages in [(64, 4, 4)] if toy else product((32, 64, 128), (2, 4, 8), (3, 4, 5)):
        tile = Nf4Tile(16, block_n, warps, stages)
        yield str(tile), replace(own, tiles=replace(own.tiles, nf4=(tile, *own.tiles.nf4[1:])))


def _lora_calls(bench: Bench, sizes: Sizes, rank: int, tokens: int, adapters: int) -> list[Call]:
    shape = sizes.model.groups["gate_up"]
    layers = 2 if bench.toy else 4
    ranks = [rank] * adapters
    arena = bench.normal(layers * elements_per_layer([shape], ranks), scale=0.02)
    made = layered_adapters([shape], ranks, arena, num_layers=layers)
    batch = LoraBatch(made.table, np.sort(np.arange(tokens, dtype=np.int32) % adapters))
    return [
        partial(
            add_lora_delta,
            bench.normal(tokens, sum(shape.out_features)),
            bench.normal(tokens, shape.in_features),
            batch,
            groups[0],
        )
        for groups in made.groups
    ]


def _nf4_calls(bench: Bench, sizes: Sizes) -> list[Call]:
    shape = sizes.model.groups["gate_up"]
    x = bench.normal(4, shape.in_features)
    weights = [
        random_nf4(sum(shape.out_features), shape.in_features, bench.device) for _ in range(2 if bench.toy else 8)
    ]
    return [partial(nf4_linear, x, [weight], [None]) for weight in weights]
