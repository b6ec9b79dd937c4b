"""The least time that each GPU operation can take: bytes over memory bandwidth or operations over peak, the larger.

Counts what an operation must move once, whatever the implementation: each active adapter's A and B, each weight, each
row in and out. Knows shapes and data sheets; measures nothing, needs no GPU: `python -m benchmarks.roofline`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.common.shapes import BenchShape

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
    """A whole decode step: the base's floor, and what adapters add to it where nothing is lost."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    chosen = parser.parse_args(arguments).model
    console = Console(width=max(Console().width, TABLE_WIDTH))
    for name, shape in MODELS.items():
        if chosen in (name, "all"):
            console.print(op_table(name, shape), step_table(name, shape))


if __name__ == "__main__":
    main()
