"""Layers that bitsandbytes quantised, and their weights as our kernels read them."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from lora_kernels.nf4.weight import Nf4Weight
from support.kernels.triton_cases import normal


def quantized(
    out: int, inputs: int, *, dtype: torch.dtype = torch.bfloat16, nested: bool = True, bias: bool = False
) -> Linear4bit:
    layer = Linear4bit(inputs, out, bias=bias, compute_dtype=dtype)
    weight = normal(out, inputs, dtype=dtype, seed=out) * 0.05
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    if bias:
        layer.bias.data = normal(out, dtype=dtype, seed=1)
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu").eval().requires_grad_(False)


def packed(layer: Linear4bit) -> Nf4Weight:
    weight = Nf4Weight.of(layer.weight)
    assert weight is not None
    return weight
