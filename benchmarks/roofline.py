"""The least time that each GPU operation can take: bytes over memory bandwidth or operations over peak, the larger.

Counts what an operation must move once, whatever the implementation: each active adapter's A and B, each weight, each
row in and out. Knows shapes and data sheets; measures nothing, needs no GPU: `python -m benchmarks.roofline`. The last
table predicts what our kernels need beside that (`benchmarks.common.time_model`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.common.shapes import BenchShape
from benchmarks.common.time_model import H200, Cost, DeviceRates

ELEMENT = 2  # bfloat16
NF4_BITS_PER_WEIGHT = 4 + 8 / 64 + 32 / (64 * 256)  # values, their absmax as a byte, and its own absmax


@dataclass(frozen=True, slots=True)
class Gpu:
    """From the data sheet: memory bandwidth, and dense bfloat16 peak with float32 accumulation."""

    name: str
    bytes_per_s: float
    flops: float


GPUS = (
    Gpu("H100 SXM", 3.35e12, 989e12),
    Gpu("A100 SXM 80G", 2.04e12, 312e12),
    Gpu("L4", 0.30e12, 121e12),
    Gpu("4090", 1.008e12, 165e12),
)
MODELS = {
    "8b": BenchShape(hidden=4096, layers=32, intermediate=14336, heads=32, kv_heads=8, vocab=128256),
    "70b": BenchShape(hidden=8192, layers=80, intermediate=28672, heads=64, kv_heads=8, vocab=128256),
}
ROWS = (1, 8, 32, 64, 256)
ADAPTERS = (1, 8, 32, 64)
RANKS = (8, 16, 64)
CONTEXT = 2048
TABLE_WIDTH = 120
PREDICTED_CONTEXT = 150
ELEMENTWISE_LAUNCHES = 4  # a layer's: two sums with norms, rotation with store, SwiGLU
OUTSIDE_LAUNCHES = 9  # of a step, outside its layers: embedding, rotary angles (5), first norm, head, copy of logits
# (base, rows, rank) -> milliseconds counted by hand on 2026-11-29, before the kernels were changed
COUNTED_BEFORE = {
    ("bf16", 1, 0): "4.7-5.0",
    ("bf16", 32, 0): "5.2-5.6",
    ("bf16", 32, 16): "6.8-7.3",
    ("nf4", 1, 0): "6.0-6.5",
}


@dataclass(frozen=True, slots=True)
class Work:
    """What an operation moves and computes."""

    num_bytes: float
    operations: float

    def __add__(self, other: Work) -> Work:
        return Work(self.num_bytes + other.num_bytes, self.operations + other.operations)

    def floor_s(self, gpu: Gpu) -> float:
        return max(self.num_bytes / gpu.bytes_per_s, self.operations / gpu.flops)


def shrink(in_features: int, members: int, *, rows: int, adapters: int, rank: int) -> Work:
    """h = x A^T of a group: x once, every active A once, h out in float32."""
    active = min(rows, adapters)
    moved = active * members * rank * in_features * ELEMENT + rows * in_features * ELEMENT + rows * members * rank * 4
    return Work(moved, 2 * rows * members * rank * in_features)


def expand(out_features: Sequence[int], *, rows: int, adapters: int, rank: int) -> Work:
    """y += h B of a group: every active B once, y in and out, h in."""
    active, outs = min(rows, adapters), sum(out_features)
    moved = active * rank * outs * ELEMENT + 2 * rows * outs * ELEMENT + rows * len(out_features) * rank * 4
    return Work(moved, 2 * rows * rank * outs)


def linear(in_features: int, outs: int, *, rows: int, bits_per_weight: float = 16.0) -> Work:
    """x W^T: the weight once, x in, y out."""
    moved = in_features * outs * bits_per_weight / 8 + rows * (in_features + outs) * ELEMENT
    return Work(moved, 2 * rows * in_features * outs)


def decode_attention(shape: BenchShape, *, rows: int, context: int) -> Work:
    """One token of each sequence over its own context: keys and values once, q in, result out."""
    head_dim = shape.hidden // shape.heads
    moved = rows * (2 * context * shape.kv_heads * head_dim + 2 * shape.hidden) * ELEMENT
    return Work(moved, 4 * rows * context * shape.hidden)


def lora_step(shape: BenchShape, *, rows: int, adapters: int, rank: int) -> Work:
    """All decoder layers' adapters on every linear layer."""
    total = Work(0, 0)
    for group in shape.groups.values():
        total += shrink(group.in_features, len(group.out_features), rows=rows, adapters=adapters, rank=rank)
        total += expand(group.out_features, rows=rows, adapters=adapters, rank=rank)
    return Work(shape.layers * total.num_bytes, shape.layers * total.operations)


def base_step(shape: BenchShape, *, rows: int, bits_per_weight: float = 16.0) -> Work:
    """All linear layers of the decoder (the head stays bfloat16 on an NF4 base), and attention over CONTEXT."""
    layer = decode_attention(shape, rows=rows, context=CONTEXT)
    for group in shape.groups.values():
        layer += linear(group.in_features, sum(group.out_features), rows=rows, bits_per_weight=bits_per_weight)
    return Work(shape.layers * layer.num_bytes, shape.layers * layer.operations) + linear(
        shape.hidden, shape.vocab, rows=rows
    )


def op_lines(shape: BenchShape) -> Iterator[tuple[str, Work]]:
    """One layer's operations at 32 rows; adapters distinct."""
    for name, group in shape.groups.items():
        outs = sum(group.out_features)
        for rank in RANKS:
            shrunk = shrink(group.in_features, len(group.out_features), rows=32, adapters=32, rank=rank)
            yield f"shrink {name} r{rank}", shrunk
            yield f"expand {name} r{rank}", expand(group.out_features, rows=32, adapters=32, rank=rank)
        yield f"linear bf16 {name}", linear(group.in_features, outs, rows=32)
        nf4 = linear(group.in_features, outs, rows=32, bits_per_weight=NF4_BITS_PER_WEIGHT)
        yield f"linear nf4 {name}", nf4
    yield "attention", decode_attention(shape, rows=32, context=CONTEXT)


def op_table(name: str, shape: BenchShape) -> Table:
    title = f"Llama-{name}, one layer: 32 rows on 32 adapters over {CONTEXT} cached tokens"
    table = Table("operation", "MB", "MFLOP", *(f"{gpu.name} µs" for gpu in GPUS), title=title)
    for label, work in op_lines(shape):
        floors = (f"{1e6 * work.floor_s(gpu):.2f}" for gpu in GPUS)
        table.add_row(label, f"{work.num_bytes / 1e6:.2f}", f"{work.operations / 1e6:.0f}", *floors)
    return table


def step_table(name: str, shape: BenchShape) -> Table:
    """A whole decode step: the base's floor, and what adapters add to it if nothing is lost."""
    headings = [f"{gpu.name} ms" for gpu in GPUS]
    title = f"Llama-{name}, one decode step over {CONTEXT} cached tokens (+ LoRA)"
    table = Table("base", "rows", "adapters", "rank", "LoRA MB", *headings, title=title)
    for base, bits in (("bf16", 16.0), ("nf4", NF4_BITS_PER_WEIGHT)):
        for rows in ROWS:
            bare = base_step(shape, rows=rows, bits_per_weight=bits)
            for adapters in (count for count in ADAPTERS if count <= rows):
                for rank in RANKS:
                    lora = lora_step(shape, rows=rows, adapters=adapters, rank=rank)
                    cells = [_against(bare, lora, gpu) for gpu in GPUS]
                    table.add_row(base, str(rows), str(adapters), str(rank), f"{lora.num_bytes / 1e6:.0f}", *cells)
    return table


def _against(bare: Work, lora: Work, gpu: Gpu) -> str:
    floor = bare.floor_s(gpu)
    return f"{1e3 * floor:.2f} +{100 * lora.floor_s(gpu) / floor:.1f}%"


def predicted_costs(shape: BenchShape, *, base: str, rows: int, rank: int) -> Iterator[Cost]:
    """The launches of a recorded decode step of `rows` sequences, each on an adapter of its own; rank 0: on none."""
    attention = decode_attention(shape, rows=rows, context=PREDICTED_CONTEXT)
    for _ in range(shape.layers):
        for group in shape.groups.values():
            outs, members = sum(group.out_features), len(group.out_features)
            bits = NF4_BITS_PER_WEIGHT if base == "nf4" else 16.0
            work = linear(group.in_features, outs, rows=rows, bits_per_weight=bits)
            if base == "nf4":
                yield Cost("nf4", work.num_bytes, num_weights=group.in_features * outs, launches=2)
            else:
                yield Cost("linear", work.num_bytes)
            if rank:
                some = {"rows": rows, "adapters": rows, "rank": rank}
                yield Cost(f"shrink r{rank}", shrink(group.in_features, members, **some).num_bytes)
                yield Cost(f"expand r{rank}", expand(group.out_features, **some).num_bytes)
        yield Cost("attention", attention.num_bytes, launches=2)
        yield Cost(
            "linear", rows * (10 * shape.hidden + 3 * shape.intermediate) * ELEMENT, launches=ELEMENTWISE_LAUNCHES
        )
    yield Cost("linear", linear(shape.hidden, shape.vocab, rows=rows).num_bytes, launches=OUTSIDE_LAUNCHES)


def predicted_table(name: str, shape: BenchShape, rates: DeviceRates) -> Table:
    title = (
        f"Llama-{name}, one recorded decode step over {PREDICTED_CONTEXT} cached tokens on an {rates.name}, predicted"
    )
    table = Table("base", "rows", "rank", "launches", "bytes ms", "predicted ms", "of bytes", "before", title=title)
    for (base, rows, rank), before in COUNTED_BEFORE.items():
        costs = list(predicted_costs(shape, base=base, rows=rows, rank=rank))
        floor = sum(cost.num_bytes for cost in costs) / rates.bytes_per_s
        took = sum(cost.seconds(rates) for cost in costs)
        launches = sum(cost.launches for cost in costs)
        cells = (f"{1e3 * floor:.2f}", f"{1e3 * took:.2f}", f"{floor / took:.2f}", before)
        table.add_row(base, str(rows), str(rank), str(launches), *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    chosen = parser.parse_args(arguments).model
    console = Console(width=max(Console().width, TABLE_WIDTH))
    for name, shape in MODELS.items():
        if chosen in (name, "all"):
            console.print(op_table(name, shape), step_table(name, shape))
        if name == "8b" and chosen in (name, "all"):
            console.print(predicted_table(name, shape, H200))


if __name__ == "__main__":
    main()
