"""What the suite asks of a GPU, from the bytes that a step must move: no target that memory cannot give."""

from __future__ import annotations

from benchmarks.common.shapes import RANK
from benchmarks.gpu.sizes import Sizes
from benchmarks.roofline import NF4_BITS_PER_WEIGHT, base_step, decode_attention, lora_step

SHARE_OF_BOUND = 0.95  # of what the bytes allow, for adapters beside the bare base
SHARE_OF_FLOOR = 0.75  # of the bytes' own time, for a bare step
NF4_SHARE = 0.45  # of what the bytes allow against bfloat16: dequantising takes instructions too


def floor_bytes(sizes: Sizes, rows: int, bits_per_weight: float) -> float:
    """Of a bare decode step: weights once, and keys and values of the half-way context."""
    step = base_step(sizes.model, rows=rows, bits_per_weight=bits_per_weight).num_bytes
    shape, context = sizes.model, sizes.prompt + sizes.new_tokens // 2
    counted = decode_attention(shape, rows=rows, context=2048).num_bytes
    own = decode_attention(shape, rows=rows, context=context).num_bytes
    return step + shape.layers * (own - counted)


def most_of_bare(sizes: Sizes, rows: int, adapters: int) -> float:
    """The bare step's bytes over those of the same step with adapters: no kernel can keep more of its speed."""
    bare = floor_bytes(sizes, rows, 16.0)
    return bare / (bare + lora_step(sizes.model, rows=rows, adapters=adapters, rank=RANK).num_bytes)


def least_nf4(sizes: Sizes, rows: int) -> float:
    """An NF4 step's bytes over a bfloat16 step's: no kernel can be faster than this share."""
    return floor_bytes(sizes, rows, NF4_BITS_PER_WEIGHT) / floor_bytes(sizes, rows, 16.0)


def of_bare_target(sizes: Sizes, rows: int, adapters: int) -> str:
    bound = most_of_bare(sizes, rows, adapters)
    return f">= {SHARE_OF_BOUND * bound:.3f} (bytes: {bound:.3f})"


def nf4_target(sizes: Sizes, rows: int) -> str:
    bound = least_nf4(sizes, rows)
    return f"<= {bound / NF4_SHARE:.2f} (bytes: {bound:.2f})"
