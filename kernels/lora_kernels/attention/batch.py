"""The nouns of paged attention: how a layer attends, what its cache is, and where one step's tokens lie.

Legend: T tokens of the step, D head size, cache [blocks, kv_heads, block_size, D] per layer for keys and for values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.attention.query_tiles import AttentionTiles, attention_tiles
from lora_kernels.native.bindings import CAttention

NATIVE_MAX_CONTEXT_TO_PREFILL = 192  # a longer prefill goes to the library's flash attention


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How one layer attends. window > 0: sliding window, the token itself included. softcap > 0: scores become
    softcap * tanh(scores / softcap)."""

    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotary embedding that is still to be applied to q and k. cos_TR, sin_TR: [T, R], R of D elements rotate."""

    cos_TR: torch.Tensor
    sin_TR: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, each [blocks, kv_heads, block_size, D]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(eq=False)
class PagedBatch:
    """Where the step's tokens are in the cache. Host arrays; `slot_mapping_T` on the model's device.

    query_starts [sequences + 1]: first token of each sequence. context_lens [sequences]: tokens in the cache after this
    step. block_tables [sequences, blocks]. slot_mapping_T: block * block_size + offset for each token.
    """

    query_starts: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping_T: torch.Tensor
    positions_T: NDArray[np.int32]
    sequences_T: NDArray[np.int32]
    block_size: int
    _listed: NDArray[np.int32] = field(init=False)
    long_prefills: list[int] = field(init=False)
    _structs: dict[tuple[int, int, int, AttentionRule], CAttention] = field(init=False, default_factory=dict)
    _tiles: dict[tuple[int, int, int], AttentionTiles] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        lengths = np.diff(self.query_starts)
        long = (lengths > 1) & (self.context_lens > NATIVE_MAX_CONTEXT_TO_PREFILL)
        self.long_prefills = np.flatnonzero(long).tolist()
        self._listed = np.flatnonzero(~np.repeat(long, lengths)).astype(np.int32)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    @property
    def num_listed(self) -> int:
        """Tokens for the C kernel; the others belong to `long_prefills`."""
        return len(self._listed)

    def native_args(self, q_heads: int, kv_heads: int, head_dim: int, rule: AttentionRule) -> CAttention:
        """The C kernels' view of this batch, made once per shape and rule."""
        key = (q_heads, kv_heads, head_dim, rule)
        if key not in self._structs:
            shape = (len(self.positions_T), len(self._listed), q_heads, kv_heads, head_dim, self.block_size)
            arrays = (self.block_tables, self.sequences_T, self.positions_T, self._listed)
            self._structs[key] = CAttention(
                *shape,
                self.block_tables.shape[1],
                rule.window,
                int(self.context_lens.max()),
                *(array.ctypes.data for array in arrays),
                rule.scale,
                rule.softcap,
            )
        return self._structs[key]

    def attention_tiles(self, group: int, decode_m: int, prefill_m: int, device: torch.device) -> AttentionTiles:
        """The Triton kernels' view of this batch, made and copied once for all layers of one shape."""
        key = (group, decode_m, prefill_m)
        if key not in self._tiles:
            arrays = (self.query_starts, self.context_lens, self.block_tables)
            self._tiles[key] = attention_tiles(
                *arrays, group=group, decode_m=decode_m, prefill_m=prefill_m, device=device
            )
        return self._tiles[key]
