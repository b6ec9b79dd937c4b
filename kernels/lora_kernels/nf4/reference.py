"""Plain torch, in float32, written to be read: the specification that every implementation is tested against."""

from __future__ import annotations

import torch

from lora_kernels.nf4.weight import NESTED_BLOCK, NF4_BLOCK, Nf4Weight


def nf4_dequantize_reference(weight: Nf4Weight) -> torch.Tensor:
    """The [O, H] weight in float32. Source: QLoRA (arXiv 2305.14314), bitsandbytes' layout."""
    absmax = weight.absmax
    if weight.nested_code is not None and weight.nested_absmax is not None and weight.nested_offset is not None:
        outer = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(absmax)]
        absmax = weight.nested_code[absmax.long()] * outer + weight.nested_offset
    indices = torch.stack([weight.packed >> 4, weight.packed & 15], dim=-1).view(-1)
    values = weight.code[indices.long()].view(-1, NF4_BLOCK) * absmax[:, None]
    return values.view(weight.out_features, weight.in_features)
