"""Attention over packed examples, each with itself alone. Knows one layer at a time; builds no mask of T x T.

Legend: T tokens of the forward, D head size. A row of many short examples costs the sum of their squares, not T squared
(16 examples of 64 tokens, forward and backward, one core: 9 ms instead of 102 ms through a block mask).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lora_kernels.attention.reference import attention_reference

IMPLEMENTATION = "multilora_packed"


def register_packed_attention() -> str:
    """Make the implementation known to transformers; returns its name. Calling it twice is harmless."""
    AttentionInterface.register(IMPLEMENTATION, _packed_attention)
    return IMPLEMENTATION


def segment_lengths(position_ids: torch.Tensor) -> tuple[int, ...]:
    """position_ids [1, T] -> tokens of each example, in order; positions count from 0 in every example."""
    starts = torch.nonzero(position_ids[0] == 0).flatten().tolist()
    ends = [*starts[1:], position_ids.shape[1]]
    return tuple(end - start for start, end in zip(starts, ends, strict=True))


def last_positions(segments: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [1, T]: for each token the last position of its example."""
    lengths = torch.tensor(segments, device=device)
    return torch.repeat_interleave(lengths - 1, lengths, output_size=sum(segments))[None]


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    segments: tuple[int, ...],
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query: [1, q_heads, T, D], key and value: [1, kv_heads, T, D]; returns [1, T, q_heads, D].

    `segments`, the examples' lengths, travels as a keyword of `model(...)`; the mask is always None. The base's own
    dropout was for its pretraining and is left out.
    """
    lengths = list(segments)  # split, not slices: its backward is one concatenation
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    if softcap:
        outs = [_capped(*part, scale=scaling, window=sliding_window or 0, softcap=softcap) for part in parts]
    else:
        outs = [_plain(*part, scale=scaling, window=sliding_window or 0) for part in parts]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, window: int) -> torch.Tensor:
    length = query.shape[2]
    mask = None
    if 0 < window < length:
        distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        mask = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, window: int, softcap: float
) -> torch.Tensor:
    q_THD, k_THD, v_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out_THD = attention_reference(q_THD, k_THD, v_THD, scale=scale, window=window, softcap=softcap)
    return out_THD.to(query.dtype).transpose(0, 1)[None]
