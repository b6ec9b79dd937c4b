"""How large everything is: Llama shapes on a GPU, toys on a CPU. Knows numbers only."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.shapes import BenchShape
from benchmarks.roofline import MODELS

TOY_SHAPE = BenchShape(hidden=64, layers=1, intermediate=64, heads=2, kv_heads=1, vocab=128)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """rows_adapters: pairs of (rows, distinct adapters). ranks: per adapter in turn. cold_bytes: what repeated calls go
    round, more than any cache holds. decode: (rows, context); prefill: tokens. cases: (rows, adapters) of the model."""

    shapes: dict[str, BenchShape]
    model: BenchShape
    rows_adapters: tuple[tuple[int, int], ...]
    ranks: dict[str, tuple[int, ...]]
    cold_bytes: int
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]
    nf4_rows: tuple[int, ...]
    cases: tuple[tuple[int, int], ...]
    prompt: int
    new_tokens: int
    long_prompt: int
    num_prompts: int
    storm_adapters: int
    peft_rows: tuple[int, ...]


FULL = Sizes(
    shapes=dict(MODELS),
    model=MODELS["8b"],
    rows_adapters=((1, 1), (8, 8), (32, 1), (32, 8), (32, 32), (64, 64), (256, 8), (256, 64)),
    ranks={"8": (8,), "16": (16,), "64": (64,), "mixed": (8, 16, 64, 3)},
    cold_bytes=256 << 20,
    decode=((1, 2048), (8, 2048), (32, 512), (32, 2048), (32, 8192), (64, 2048), (1, 32768)),
    prefill=(512, 2048, 8192),
    nf4_rows=(1, 4, 16, 32, 64),
    cases=((1, 0), (1, 1), (8, 0), (8, 1), (8, 8), (32, 0), (32, 1), (32, 8), (32, 32), (64, 0), (64, 64)),
    prompt=128,
    new_tokens=40,
    long_prompt=1024,
    num_prompts=8,
    storm_adapters=50,
    peft_rows=(8, 32),
)
TOY = Sizes(
    shapes={"toy": TOY_SHAPE},
    model=TOY_SHAPE,
    rows_adapters=((1, 1), (4, 3), (20, 1)),
    ranks={"8": (8,), "mixed": (3, 16)},
    cold_bytes=1,
    decode=((2, 40),),
    prefill=(40,),
    nf4_rows=(1, 4),
    cases=((2, 0), (2, 2)),
    prompt=4,
    new_tokens=2,
    long_prompt=12,
    num_prompts=2,
    storm_adapters=2,
    peft_rows=(2,),
)


def sizes_for(*, toy: bool) -> Sizes:
    return TOY if toy else FULL
