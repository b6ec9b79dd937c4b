"""(b) The LoRA operation at decode and prefill: time, and bytes over time against the measured memory bandwidth.

Decode rows also in the forms of launch that the table has turned off. Beside ours: gathered `bmm` with ranks padded to
the largest, and a loop over adapters, both on data laid out for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.common.arena import LayeredAdapters, elements_per_layer, layered_adapters
from benchmarks.common.lora_ops import IMPLEMENTATIONS, AddDelta, LoraCase
from benchmarks.common.popularity import choose_adapters
from benchmarks.common.shapes import GroupShape
from benchmarks.gpu.bench import Bench, Call, Row
from benchmarks.gpu.launch_forms import launch_forms, tiles_instead
from benchmarks.gpu.sizes import Sizes, sizes_for
from benchmarks.roofline import Work, expand, shrink
from lora_kernels.lora.triton_launch import one_launch_bytes
from lora_kernels.triton_common.tiles import device_tiles

MAX_LAYERS = 64
COMPARED = ("qkv", "gate_up")  # groups and ranks whose alternatives are measured too
COMPARED_RANKS = ("16", "mixed", "8")
MOST_DECODE_ROWS = 64
FEW_ROWS = 8


@dataclass(frozen=True)
class Case:
    """One group of one model; rows spread over adapters; ranks in turn."""

    model: str
    group: str
    shape: GroupShape
    rows: int
    adapters: int
    ranks: str

    @property
    def is_compared(self) -> bool:
        return self.is_beside_others and self.rows >= self.adapters > 1

    @property
    def forms(self) -> tuple[str, ...]:
        """Of launch, that can win here by what they read: all of A once per block of columns, or nothing twice."""
        if self.rows > MOST_DECODE_ROWS or self.ranks == "64":
            return ()
        return ("one_launch", "overlapped") if self.rows <= FEW_ROWS and self.ranks != "mixed" else ("overlapped",)

    @property
    def is_beside_others(self) -> bool:
        """Also measured with other projects' kernels."""
        return self.group in COMPARED and self.ranks in COMPARED_RANKS

    def slots(self) -> list[int]:
        return choose_adapters("distinct", self.rows, self.adapters)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case's adapters, and x and y of each layer: enough layers that no cache holds them."""

    adapters: LayeredAdapters
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def run(bench: Bench) -> list[Row]:
    """One row per case and implementation."""
    sizes = sizes_for(toy=bench.toy)
    arena = bench.normal(arena_elements(sizes), scale=0.02)
    rows: list[Row] = []
    for case in cases(sizes):
        if bench.seconds_left < 5:
            bench.say("lora: out of time, the rest is left out")
            break
        measured = _measured(bench, case, arena, sizes)
        for row in measured:
            bench.keep(row)
        rows += measured
    return rows


def cases(sizes: Sizes) -> Iterator[Case]:
    """All of the main model; of the others 32 rows at rank 16."""
    for name, shape in sizes.shapes.items():
        is_main = shape == sizes.model
        for group, group_shape in shape.groups.items():
            for rows, adapters in sizes.rows_adapters:
                for ranks in sizes.ranks:
                    if is_main or (rows, ranks) == (32, "16"):
                        yield Case(name, group, group_shape, rows, adapters, ranks)


def arena_elements(sizes: Sizes) -> int:
    """For the case with the most bytes in one layer, twice; or for cold_bytes."""
    most = max(elements_per_layer([case.shape], _ranks(case, sizes)) for case in cases(sizes))
    return max(2 * most, sizes.cold_bytes // 2 + most)


def _ranks(case: Case, sizes: Sizes) -> list[int]:
    chosen = sizes.ranks[case.ranks]
    return [chosen[index % len(chosen)] for index in range(case.adapters)]


def prepare(bench: Bench, case: Case, arena: torch.Tensor, sizes: Sizes) -> Prepared:
    """In the arena's precision."""
    ranks = _ranks(case, sizes)
    per_layer = elements_per_layer([case.shape], ranks)
    layers = max(2, min(MAX_LAYERS, -(-sizes.cold_bytes // (2 * per_layer))))
    widths = (case.shape.in_features, sum(case.shape.out_features))
    inputs, outputs = ([bench.normal(case.rows, width, dtype=arena.dtype) for _ in range(layers)] for width in widths)
    return Prepared(layered_adapters([case.shape], ranks, arena, num_layers=layers), inputs, outputs)


def _measured(bench: Bench, case: Case, arena: torch.Tensor, sizes: Sizes) -> list[Row]:
    prepared = prepare(bench, case, arena, sizes)
    rows = LoraCase(prepared.adapters, case.slots(), rows_per_request=1)
    names = ("native", "gather_bmm", "loop") if case.is_compared else ("native",)
    ways = {name: calls_of(IMPLEMENTATIONS[name](rows), prepared.inputs, prepared.outputs) for name in names}
    ways = {"ours": ways.pop("native"), **ways}
    seconds = {name: bench.seconds(calls) for name, calls in ways.items()} | _in_forms(bench, case, ways["ours"])
    work = _work(case, prepared.adapters.ranks)
    tile = device_tiles(bench.device).tiles.one_launch
    return [
        {
            "model": case.model,
            "group": case.group,
            "rows": case.rows,
            "adapters": case.adapters,
            "ranks": case.ranks,
            "way": name,
            "us": 1e6 * taken,
            "mb": work.num_bytes / 1e6,
            "of_bandwidth": work.num_bytes / taken / bench.bandwidth,
            "one_launch_mb": one_launch_bytes(rows.batch, rows.groups[0], tile) / 1e6,
        }
        for name, taken in seconds.items()
    ]


def _in_forms(bench: Bench, case: Case, calls: list[Call]) -> dict[str, float]:
    """Seconds by form of launch."""
    taken = {}
    for name, tiles in launch_forms(bench.device).items():
        if name not in case.forms:
            continue
        try:
            with tiles_instead(tiles):
                taken[name] = bench.seconds(calls)
        except Exception as error:  # noqa: BLE001  a trial must not cost the table's own figures
            bench.say(f"{name}: left out for {case}, {type(error).__name__}: {error}")
    return taken


def _work(case: Case, ranks: Sequence[int]) -> Work:
    """Rows are shared out evenly over the adapters of each rank."""
    total = Work(0, 0)
    for rank, count in Counter(ranks).items():
        share = {"rows": max(1, case.rows * count // case.adapters), "adapters": count, "rank": rank}
        total += shrink(case.shape.in_features, len(case.shape.out_features), **share)
        total += expand(case.shape.out_features, **share)
    return total


def calls_of(add: AddDelta, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[Call]:
    """One call per layer."""
    return [partial(add, y, x, layer) for layer, (x, y) in enumerate(zip(inputs, outputs, strict=True))]
