"""NF4 weights as bitsandbytes packs them, and where their own matmul serves better than its. Knows layouts; no kernels.

Two values of a row-major [O, H] weight share a byte, the first in the high half; each is an index into 16 codes. 64
values share an absmax, which is a float32, or a byte: an index into 256 codes, times the absmax of 256 such, plus an
offset (QLoRA's double quantisation, arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_kernels.triton_ops.available import on_triton

NF4_BLOCK = 64  # values that share an absmax
NESTED_BLOCK = 256  # absmaxes that share one
NF4_MAX_ROWS = 64  # above it bitsandbytes' own path, which dequantises the whole weight, has enough to do with it


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """packed uint8 [O * H / 2]; code float32 [16]; absmax float32 [O * H / 64], or uint8 with the three nested_*."""

    packed: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    out_features: int
    in_features: int
    nested_code: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor) -> Nf4Weight | None:
        """bitsandbytes' Params4bit. None where it is not laid out as this module knows it."""
        state = getattr(weight, "quant_state", None)
        if state is None or state.quant_type != "nf4" or state.blocksize != NF4_BLOCK or weight.dtype != torch.uint8:
            return None
        if len(state.shape) != 2 or state.shape[1] % NF4_BLOCK or getattr(state, "packing_format_for_cpu", False):
            return None
        packed = weight.detach().reshape(-1)
        outs, inputs = state.shape
        if not state.nested:
            return cls(packed, state.code, state.absmax, outs, inputs)
        outer = state.state2
        if outer.blocksize != NESTED_BLOCK:
            return None
        return cls(packed, state.code, state.absmax, outs, inputs, outer.code, outer.absmax, state.offset)


def nf4_weights(weights: Sequence[torch.Tensor]) -> list[Nf4Weight]:
    """Those of a group, or none where one of them is laid out otherwise."""
    known = [packed for weight in weights if (packed := Nf4Weight.of(weight)) is not None]
    return known if len(known) == len(weights) else []


def on_nf4_kernel(x_TH: torch.Tensor) -> bool:
    """Whether rows are few enough, and lie where the kernel runs."""
    return on_triton(x_TH, "nf4") and len(x_TH) <= NF4_MAX_ROWS and x_TH.element_size() == 2


def nf4_linear(x_TH: torch.Tensor, weights: Sequence[Nf4Weight], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """x W^T + bias of linear layers that read the same x, side by side. x_TH: [T, H], T <= 64, bfloat16 or float16.

    Each weight is dequantised and rounded to x's dtype inside the kernel. Returns [T, sum(out_features)].
    """
    from lora_kernels.triton_ops.nf4 import nf4_matmul

    assert len(x_TH) <= NF4_MAX_ROWS, f"{len(x_TH)} rows; the kernel takes {NF4_MAX_ROWS}"
    y_TO = x_TH.new_empty(len(x_TH), sum(weight.out_features for weight in weights))
    parts = y_TO.split([weight.out_features for weight in weights], dim=1)
    for y_part, weight, bias in zip(parts, weights, biases, strict=True):
        nf4_matmul(x_TH, weight, bias, y_part)
    return y_TO
