"""Plain torch, in float32, written to be read: the specification that every implementation is tested against."""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, *, one_plus: bool = False) -> torch.Tensor:
    """weight * round(x / rms(x)), rounding to x's dtype before the weight, as transformers' Llama-type RMSNorm does.

    one_plus: (1 + weight) * x / rms(x), rounding once, as Gemma's does."""
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * (1.0 + weight.float())).to(x.dtype) if one_plus else weight * scaled.to(x.dtype)


def silu_mul_reference(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows [gate | up], rounding after each of the two."""
    gate, up = gate_up_T2I.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope_reference(x_1HTD: torch.Tensor, cos_1TR: torch.Tensor, sin_1TR: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin over the first R of D elements, rounding each product (RoFormer, arXiv 2104.09864)."""
    width = cos_1TR.shape[-1]
    rotated, rest = x_1HTD[..., :width], x_1HTD[..., width:]
    low, high = rotated.chunk(2, dim=-1)
    cos, sin = cos_1TR[:, None], sin_1TR[:, None]
    return torch.cat([rotated * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)


def forbid_tokens_reference(scores_RV: torch.Tensor, rows_C: torch.Tensor, allowed_CB: torch.Tensor) -> None:
    """scores_RV[rows_C[c], v] = -inf where bit v of allowed_CB[c], the lowest first, is 0; in place."""
    shifts = torch.arange(8, dtype=torch.uint8, device=allowed_CB.device)
    bits_CB8 = (allowed_CB[:, :, None] >> shifts) & 1
    forbidden_CV = bits_CB8.flatten(1)[:, : scores_RV.shape[1]] == 0
    scores_RV[rows_C] = scores_RV[rows_C].masked_fill_(forbidden_CV, -torch.inf)
