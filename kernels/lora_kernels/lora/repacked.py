"""Weights in the order in which a CPU's kernel multiplies them: memory is then read from its first address to its last,
up to twice as fast as rows that lie apart."""

from __future__ import annotations

import torch

from lora_kernels.native.bindings import native_ops
from lora_kernels.triton_common.available import on_triton

BLOCK_ROWS = 32  # of one block; half a block may be left over


def is_repacked_here(weight_OH: torch.Tensor) -> bool:
    """Whether the CPU has a kernel for repacked weights of this shape and type."""
    out_features, in_features = weight_OH.shape
    is_ours = weight_OH.device.type == "cpu" and not on_triton(weight_OH, "lora")
    native = native_ops(weight_OH.dtype) if is_ours else None
    return native is not None and bool(native.repacks) and out_features % 16 == 0 and in_features % 2 == 0


def repacked(weight_OH: torch.Tensor) -> torch.Tensor:
    """The same numbers, [O * H]: for each block of rows the first two columns of each row, then the next two. A weight
    in this form has one dimension, so nothing takes it for one that lies as it was."""
    out_features, in_features = weight_OH.shape
    whole = out_features // BLOCK_ROWS * BLOCK_ROWS
    parts = (
        weight_OH[:whole].reshape(-1, BLOCK_ROWS, in_features // 2, 2),
        weight_OH[whole:].reshape(1, -1, in_features // 2, 2),
    )
    return torch.cat([part.transpose(1, 2).reshape(-1) for part in parts])


def repacked_experts(weight_XOH: torch.Tensor) -> torch.Tensor | None:
    """Each expert's weight repacked, one after the other: [X * O * H]. None: the CPU has no kernel for it."""
    if not is_repacked_here(weight_XOH[0]) or weight_XOH.shape[1] % BLOCK_ROWS:
        return None
    memory = torch.empty(weight_XOH.numel(), dtype=weight_XOH.dtype)
    for place, weight_OH in zip(memory.view(len(weight_XOH), -1), weight_XOH, strict=True):
        place.copy_(repacked(weight_OH))
    return memory
