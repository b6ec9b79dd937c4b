"""(d) The NF4 matmul against the bfloat16 one and, if it is installed, bitsandbytes' own."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from torch.nn.functional import linear

from benchmarks.gpu.bench import Bench, Call, Row
from benchmarks.gpu.sizes import Sizes, sizes_for
from benchmarks.roofline import NF4_BITS_PER_WEIGHT
from benchmarks.roofline import linear as linear_work
from lora_kernels.check_cases import random_nf4
from lora_kernels.nf4.launcher import nf4_linear
from lora_kernels.nf4.weight import Nf4Weight

MAX_COPIES = 16


def run(bench: Bench) -> list[Row]:
    """One row per layer, number of rows and implementation."""
    sizes = sizes_for(toy=bench.toy)
    if importlib.util.find_spec("bitsandbytes") is None:
        bench.say("bitsandbytes is not installed: its own matmul is left out")
    rows: list[Row] = []
    for name, group in sizes.model.groups.items():
        rows += _layer(bench, sizes, name, group.in_features, sum(group.out_features))
    return rows


def _layer(bench: Bench, sizes: Sizes, name: str, inputs: int, out: int) -> list[Row]:
    copies = max(1, min(MAX_COPIES, -(-sizes.cold_bytes // (inputs * out // 2))))
    packed = [random_nf4(out, inputs, bench.device) for _ in range(copies)]
    dense = [bench.normal(out, inputs, scale=0.02) for _ in range(max(1, copies // 4))]
    rows: list[Row] = []
    for count in sizes.nf4_rows:
        x = bench.normal(count, inputs)
        ways: dict[str, list[Call]] = {
            "ours": [partial(nf4_linear, x, [weight], [None]) for weight in packed],
            "bf16": [partial(linear, x, weight) for weight in dense],
        }
        ways |= _bitsandbytes(bench, x, dense, inputs, out)
        for way, calls in ways.items():
            seconds = bench.seconds(calls)
            bits = 16.0 if way == "bf16" else NF4_BITS_PER_WEIGHT
            work = linear_work(inputs, out, rows=count, bits_per_weight=bits)
            row: Row = {"layer": name, "rows": count, "way": way, "us": 1e6 * seconds}
            rows.append(row | {"of_bandwidth": work.num_bytes / seconds / bench.bandwidth})
            bench.keep(rows[-1])
    return rows


def _bitsandbytes(
    bench: Bench, x: torch.Tensor, dense: list[torch.Tensor], inputs: int, out: int
) -> dict[str, list[Call]]:
    if importlib.util.find_spec("bitsandbytes") is None or bench.toy:
        return {}
    from bitsandbytes.nn import Linear4bit, Params4bit

    layers = []
    for weight in dense:
        layer = Linear4bit(inputs, out, bias=False, compute_dtype=x.dtype, device=x.device)
        layer.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        layers.append(layer.to(x.device))
    assert all(Nf4Weight.of(layer.weight) is not None for layer in layers), "bitsandbytes packs otherwise than we read"
    return {"bitsandbytes": [partial(layer, x) for layer in layers]}
