"""(a) Every operation against its reference on this device: all ranks, popularities, head sizes, and long prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.popularity import POPULARITIES, choose_adapters
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.launch_forms import launch_forms, tiles_instead
from lora_kernels.attention.batch import AttentionRule
from lora_kernels.check_cases import (
    Outcome,
    attention_case,
    gate_case,
    lora_case,
    nf4_case,
    norm_case,
    rope_case,
)
from lora_kernels.lora.batch import NO_ADAPTER, LoraGroup
from lora_kernels.self_test import RANKS
from lora_kernels.triton_common.tiles import DeviceTiles

Case = tuple[str, Callable[[], Outcome]]


def run(bench: Bench) -> list[Row]:
    """One row per case, also for one that raises."""
    dtypes = (torch.bfloat16,) if bench.toy else (torch.bfloat16, torch.float16)
    rows: list[Row] = []
    for dtype in dtypes:
        for name, case in _cases(bench, dtype):
            rows.append(_row(f"{name} {str(dtype).removeprefix('torch.')}", case))
            bench.keep(rows[-1])
            if not rows[-1]["ok"]:
                bench.say(f"WRONG  {rows[-1]}")
    return rows


def _row(name: str, case: Callable[[], Outcome]) -> Row:
    try:
        outcome = case()
    except Exception as error:  # noqa: BLE001  the other cases are worth knowing too
        return {"case": name, "ok": False, "failure": f"{type(error).__name__}: {error}"[:500]}
    return {"case": name, "ok": outcome.is_ok, **asdict(outcome)}


def _cases(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    yield from _lora(bench, dtype)
    yield from _attention(bench, dtype)
    yield from _others(bench, dtype)


def _slots(popularity: str, rows: int, *, tokens: int = 1) -> NDArray[np.int32]:
    chosen = np.array(choose_adapters(popularity, rows, len(RANKS), seed=rows), dtype=np.int32)  # type: ignore[arg-type]
    if rows > 1:
        chosen[::5] = NO_ADAPTER
    return np.repeat(chosen, tokens).astype(np.int32)


def _lora(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    wide = LoraGroup((0, 1, 2), 300, (80, 33, 270)) if bench.toy else LoraGroup((0, 1, 2), 4096, (4096, 1024, 1024))
    odd = LoraGroup((0, 1), 500, (63, 1))
    case = partial(lora_case, dtype=dtype, device=bench.device)
    for popularity in POPULARITIES:
        for rows in (7,) if bench.toy else (1, 7, 63, 256):
            yield f"lora {popularity} {rows} rows", partial(case, wide, RANKS, _slots(popularity, rows))
    for rows in (7,) if bench.toy else (7, 63):
        yield f"lora int8 and dora {rows} rows", partial(case, wide, RANKS, _slots("uniform", rows), special=True)
    yield "lora odd sizes", partial(case, odd, RANKS, _slots("uniform", 31))
    for rank in RANKS:
        yield f"lora rank {rank}", partial(case, odd, (rank,), np.zeros(3, dtype=np.int32))
    for form, tiles in launch_forms(bench.device).items():
        for rows in (7,) if bench.toy else (1, 7, 63):
            yield f"lora {form} {rows} rows", partial(_in_form, tiles, partial(case, wide, RANKS, _slots("zipf", rows)))
    for tokens in (70,) if bench.toy else (2048, 8192):
        yield f"lora prompts of {tokens}", partial(case, wide, RANKS, _slots("distinct", 4, tokens=tokens))


def _in_form(tiles: DeviceTiles, case: Callable[[], Outcome]) -> Outcome:
    with tiles_instead(tiles):
        return case()


def _attention(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    rules = (None, AttentionRule(0.1, window=70), AttentionRule(0.1, softcap=20.0), AttentionRule(0.1, 1000, 30.0))
    chunks = [(1, 1), (1, 300), (33, 90)] if bench.toy else [(1, 1), (1, 3000), (90, 90), (40, 700), (300, 301)]
    case = partial(attention_case, dtype=dtype, device=bench.device)
    for head_dim in (64,) if bench.toy else (64, 80, 96, 128, 256):
        heads = (4, 2) if head_dim == 64 else (8, 2)
        for rule in rules:
            yield f"attention head {head_dim} {rule}", partial(case, head_dim, heads, chunks, rule=rule)
    for tokens in () if bench.toy else (8192, 32768):
        yield f"attention prompt of {tokens}", partial(case, 128, (8, 2), [(tokens, tokens), (1, tokens)])


def _others(bench: Bench, dtype: torch.dtype) -> Iterator[Case]:
    options: dict[str, Any] = {"dtype": dtype, "device": bench.device}
    shapes = ((130, 192),) if bench.toy else ((130, 1088), (4096, 4096), (28672, 4096), (4096, 14336))
    for out, inputs in shapes:
        for rows in (1, 17) if bench.toy else (1, 3, 16, 17, 33, 64):
            yield f"nf4 [{out}, {inputs}] {rows} rows", partial(nf4_case, rows, out, inputs, **options)
    for tokens in (1, 5) if bench.toy else (1, 33, 8192):
        yield f"norm {tokens}", partial(norm_case, tokens, 500 if bench.toy else 4096, **options)
        yield f"gate {tokens}", partial(gate_case, tokens, 700 if bench.toy else 14336, **options)
        yield f"rope {tokens}", partial(rope_case, tokens, 4 if bench.toy else 32, 128, **options)
