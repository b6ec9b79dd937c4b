"""The nouns of paged attention: how a layer attends, what its cache is, and where one step's tokens lie.

Legend: T tokens of the step, D head size, cache [blocks, kv_heads, block_size, D] per layer for keys and for values.
"""

from __future__ import annotations

import ctypes
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


@dataclass(frozen=True, slots=True)
class PromptSplit:
    """Which sequences of a step are prompts, each computed at once. bounds [prompts, 2]: first token and number of
    tokens. listed: the other sequences' tokens, one by one."""

    sequences: list[int]
    bounds: NDArray[np.int32]
    listed: NDArray[np.int32]


@dataclass(eq=False)
class PagedBatch:
    """Where the step's tokens are in the cache. Host arrays; `slot_mapping_T` on the model's device.

    are_prompts [sequences]: whose tokens are a prompt's, so that they are computed alike however it is cut or cached;
    None: those of several tokens.
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
    are_prompts: NDArray[np.bool_] | None = None
    _splits: dict[bool, PromptSplit] = field(init=False, default_factory=dict)
    _structs: dict[tuple[int, int, int, AttentionRule, bool], CAttention] = field(init=False, default_factory=dict)
    _tiles: dict[tuple[int, int, int], AttentionTiles] = field(init=False, default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    def prompt_split(self, *, takes_prompts: bool) -> PromptSplit:
        """takes_prompts: whether the C kernels have code of their own for prompts. Else long ones are the library's."""
        if takes_prompts not in self._splits:
            lengths = np.diff(self.query_starts)
            if takes_prompts:
                apart = lengths > 1 if self.are_prompts is None else self.are_prompts
            else:
                apart = (lengths > 1) & (self.context_lens > NATIVE_MAX_CONTEXT_TO_PREFILL)
            sequences = np.flatnonzero(apart)
            self._splits[takes_prompts] = PromptSplit(
                sequences=sequences.tolist(),
                bounds=np.stack((self.query_starts[:-1], lengths), axis=1)[sequences].astype(np.int32),
                listed=np.flatnonzero(~np.repeat(apart, lengths)).astype(np.int32),
            )
        return self._splits[takes_prompts]

    def native_args(
        self, q_heads: int, kv_heads: int, head_dim: int, rule: AttentionRule, *, takes_prompts: bool
    ) -> CAttention:
        """The C kernels' view of this batch, made once per shape and rule."""
        key = (q_heads, kv_heads, head_dim, rule, takes_prompts)
        if key not in self._structs:
            split = self.prompt_split(takes_prompts=takes_prompts)
            shape = (len(self.positions_T), len(split.listed), q_heads, kv_heads, head_dim, self.block_size)
            arrays = (self.block_tables, self.sequences_T, self.positions_T, split.listed, split.bounds)
            self._structs[key] = CAttention(
                *shape,
                self.block_tables.shape[1],
                rule.window,
                int(self.context_lens.max()),
                *(array.ctypes.data for array in arrays),
                len(split.bounds),
                rule.scale,
                rule.softcap,
            )
        return self._structs[key]

    def read_like(self, other: PagedBatch) -> None:
        """Let C kernels that were given this batch read the other, for as long as that lives."""
        for (q_heads, kv_heads, head_dim, rule, takes_prompts), struct in self._structs.items():
            source = other.native_args(q_heads, kv_heads, head_dim, rule, takes_prompts=takes_prompts)
            ctypes.memmove(ctypes.addressof(struct), ctypes.addressof(source), ctypes.sizeof(struct))

    def attention_tiles(self, group: int, decode_m: int, prefill_m: int, device: torch.device) -> AttentionTiles:
        """The Triton kernels' view of this batch, made and copied once for all layers of one shape."""
        key = (group, decode_m, prefill_m)
        if key not in self._tiles:
            arrays = (self.query_starts, self.context_lens, self.block_tables)
            self._tiles[key] = attention_tiles(
                *arrays, group=group, decode_m=decode_m, prefill_m=prefill_m, device=device
            )
        return self._tiles[key]
