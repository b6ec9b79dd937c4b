"""Plain torch, in float32, written to be read: the specification that every implementation is tested against."""

from __future__ import annotations

import torch


def attention_reference(
    q_THD: torch.Tensor,
    k_CHD: torch.Tensor,
    v_CHD: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of one sequence's last T tokens over its C cached tokens (C >= T), in float32.

    q_THD: [T, q_heads, D]; k_CHD, v_CHD: [C, kv_heads, D]. window > 0: a token sees itself and window - 1 before it.
    Returns [T, q_heads, D].
    """
    repeat = q_THD.shape[1] // k_CHD.shape[1]
    key, value = (cache.float().repeat_interleave(repeat, dim=1) for cache in (k_CHD, v_CHD))
    scores_HTC = torch.einsum("thd,chd->htc", q_THD.float(), key) * scale
    if softcap > 0:
        scores_HTC = softcap * torch.tanh(scores_HTC / softcap)
    distance = _query_positions(q_THD, k_CHD)[:, None] - torch.arange(len(k_CHD), device=q_THD.device)[None, :]
    hidden = (distance < 0) | ((distance >= window) if window > 0 else torch.zeros_like(distance, dtype=torch.bool))
    weights = scores_HTC.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("htc,chd->thd", weights, value)


def _query_positions(q_THD: torch.Tensor, k_CHD: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(k_CHD) - len(q_THD), len(k_CHD), device=q_THD.device)
