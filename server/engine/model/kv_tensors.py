"""The KV cache's tensors, and the size of a block. Knows bytes; no requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.attention.batch import LayerCache
from lora_kernels.transfer import to_device
from server.engine.model.base_model import BaseModel


@dataclass(frozen=True)
class KVCache:
    """One [blocks, kv_heads, block_size, head_dim] pair per layer."""

    layers: list[LayerCache]
    block_size: int
    num_blocks: int

    @classmethod
    def allocate(cls, base: BaseModel, *, num_blocks: int, block_size: int) -> KVCache:
        shape = (num_blocks, base.num_kv_heads, block_size, base.head_dim)
        layers = [
            LayerCache(*(torch.zeros(shape, dtype=base.dtype, device=base.device) for _ in range(2)))
            for _ in range(base.config.num_hidden_layers)
        ]
        return cls(layers, block_size, num_blocks)

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Wipe blocks that may hold non-finite values. Does not wait for the device."""
        index = to_device(torch.tensor(block_ids), self.layers[0].keys.device)
        for layer in self.layers:
            layer.keys.index_fill_(0, index, 0)
            layer.values.index_fill_(0, index, 0)


def bytes_per_block(base: BaseModel, block_size: int) -> int:
    num_elements = 2 * base.config.num_hidden_layers * base.num_kv_heads * base.head_dim * block_size
    return int(num_elements * base.dtype.itemsize)
