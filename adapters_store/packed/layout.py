"""An adapter as the device wants it: one contiguous buffer, and where in it each module's A and B lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapters_store.base.description import AdapterDigest

ALIGN_BYTES = 64  # every A and B starts on a cache line, so that vector loads never straddle one


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One targeted linear layer inside the buffer. Offsets count elements from the buffer's start.

    A is [rank, in_features] row-major; B is stored transposed, [rank, out_features] row-major, so that the expand
    step reads whole cache lines. scale multiplies the delta (lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA).
    """

    name: str
    rank: int
    scale: float
    a_offset: int
    b_offset: int


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """buffer: 1-D, in the base's dtype, pinned where there is a GPU. Within a group all A's precede all B's."""

    digest: AdapterDigest
    buffer: torch.Tensor
    modules: tuple[PackedModule, ...]

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()
