"""An adapter as the device wants it: one contiguous buffer, and where in it each module's A and B lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters_store.base.description import AdapterDigest
from adapters_store.base.families import HEAD
from lora_kernels.lora.batch import FactorPlace, Place
from lora_kernels.lora.token_rows import TokenRows

ALIGN_BYTES = 64  # every A and B starts on a cache line, so that vector loads never straddle one


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One targeted linear layer, or one expert, inside the buffer. Offsets count elements from the buffer's start.

    A is [rank, in_features] row-major; B is stored transposed, [rank, out_features] row-major, so that the expand
    step reads whole cache lines. scale multiplies the delta (lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA).
    factor_offset: of DoRA's factors, float32 [out_features]; 0: none, because an A always comes before them.
    In an int8 adapter both are bytes. Its ranks' factors, [rank] float32, A's scale times B's, end where A begins.

    The embedding and the head as wholes have two forms of their own. rank 0: the adapter's own weight, [vocabulary,
    hidden] at a_offset. The embedding's LoRA: A transposed too, [vocabulary, rank].
    """

    name: str
    rank: int
    scale: float
    a_offset: int
    b_offset: int
    factor_offset: int = 0


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """buffer: 1-D, in the base's dtype, pinned where there is a GPU. Within a group all A's precede all B's.

    is_int8: A's and B's are bytes in it, two to an element of bfloat16; the token layers are in the base's dtype.
    """

    digest: AdapterDigest
    buffer: torch.Tensor
    modules: tuple[PackedModule, ...]
    is_int8: bool = False

    def places(self, module_index: Mapping[str, int]) -> tuple[list[Place], list[TokenRows], list[FactorPlace]]:
        """The linear layers as `LoraTable.set_slot` takes them, the embedding's and head's own rows, and the layers'
        factors."""
        linear, own, factors = [], [], []
        for part in self.modules:
            if part.rank and part.name in module_index:
                linear.append((module_index[part.name], part.a_offset, part.b_offset, part.rank, part.scale))
                if part.factor_offset:
                    factors.append((module_index[part.name], part.factor_offset))
            else:
                own.append(TokenRows(part.name == HEAD, part.rank, part.scale, part.a_offset, part.b_offset))
        return linear, own, factors

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()
