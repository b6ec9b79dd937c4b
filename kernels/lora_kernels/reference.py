"""Plain torch, in float32, written to be read: the specification that every implementation is tested against."""

from __future__ import annotations

import torch

from lora_kernels.lora.batch import LoraBatch, LoraGroup
from lora_kernels.nf4.launcher import NESTED_BLOCK, NF4_BLOCK, Nf4Weight


def lora_delta_reference(x_TH: torch.Tensor, batch: LoraBatch, group: LoraGroup) -> torch.Tensor:
    """scale * (x A^T) B for each row's own adapter, zero for rows without one.

    x_TH: [T, H]. Returns float32 [T, sum(out_features)]. Source: Punica (arXiv 2310.18547), S-LoRA (arXiv 2311.03285).
    """
    table = batch.table
    y_TO = torch.zeros(len(x_TH), sum(group.out_features), dtype=torch.float32, device=x_TH.device)
    for segment, slot in enumerate(batch.slots.tolist()):
        rows = torch.from_numpy(batch.rows[batch.starts[segment] : batch.starts[segment + 1]]).long().to(x_TH.device)
        for module, start, out in zip(group.module_rows, group.starts, group.out_features, strict=True):
            rank = int(table.ranks[module, slot])
            a_offset, b_offset = table.offsets[module, slot].tolist()
            a_RH = table.arena[a_offset : a_offset + rank * group.in_features].view(rank, group.in_features).float()
            b_RO = table.arena[b_offset : b_offset + rank * out].view(rank, out).float()
            y_TO[rows, start : start + out] = x_TH[rows].float() @ a_RH.T @ b_RO * table.scales[module, slot]
    return y_TO


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


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * round(x / rms(x)), rounding to x's dtype before the weight, as transformers' Llama-type RMSNorm does."""
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def silu_mul_reference(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows [gate | up], rounding after each of the two."""
    gate, up = gate_up_T2I.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope_reference(x_1HTD: torch.Tensor, cos_1TR: torch.Tensor, sin_1TR: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin over the first R of D elements, rounding each product (RoFormer, arXiv 2104.09864)."""
    width = cos_1TR.shape[-1]
    turned, rest = x_1HTD[..., :width], x_1HTD[..., width:]
    low, high = turned.chunk(2, dim=-1)
    cos, sin = cos_1TR[:, None], sin_1TR[:, None]
    return torch.cat([turned * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)


def nf4_dequantize_reference(weight: Nf4Weight) -> torch.Tensor:
    """The [O, H] weight in float32. Source: QLoRA (arXiv 2305.14314), bitsandbytes' layout."""
    absmax = weight.absmax
    if weight.nested_code is not None and weight.nested_absmax is not None and weight.nested_offset is not None:
        outer = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(absmax)]
        absmax = weight.nested_code[absmax.long()] * outer + weight.nested_offset
    indices = torch.stack([weight.packed >> 4, weight.packed & 15], dim=-1).view(-1)
    values = weight.code[indices.long()].view(-1, NF4_BLOCK) * absmax[:, None]
    return values.view(weight.out_features, weight.in_features)
