"""Launchers of RMSNorm, SwiGLU and RoPE: one pass over the row instead of torch's seven, two, or six; and of masks."""

from __future__ import annotations

import torch

from lora_kernels.elementwise.reference import forbid_tokens_reference, rms_norm_reference, silu_mul_reference
from lora_kernels.native.bindings import NativeOps, native_ops
from lora_kernels.triton_common.available import on_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, one_plus: bool = False) -> torch.Tensor:
    """weight * round(x / rms(x)) over the last axis. x: [..., H]; weight: [H], same dtype. Returns x's shape.

    one_plus: Gemma's form, round((1 + weight) * x / rms(x))."""
    if on_triton(x, "elementwise"):
        from lora_kernels.elementwise.triton_elementwise import rms_norm_triton

        return rms_norm_triton(x, weight, eps, one_plus=one_plus)
    native = None if one_plus else _native_for(x)
    if native is None:
        return rms_norm_reference(x, weight, eps, one_plus=one_plus)
    return _native_norm(native, x.contiguous(), weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, one_plus: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and its norm. x, residual: [..., H] of one shape. Returns both, as new tensors."""
    if on_triton(x, "elementwise") and x.is_contiguous() and residual.is_contiguous():
        from lora_kernels.elementwise.triton_elementwise import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps, one_plus=one_plus)
    native = None if one_plus or not x.dtype is residual.dtype is weight.dtype else _native_for(x)
    if native is None:
        total = residual + x
        return total, rms_norm(total, weight, eps, one_plus=one_plus)
    x, residual = x.contiguous(), residual.contiguous()
    total = torch.empty_like(x)
    return total, _native_norm(native, x, weight, eps, (residual.data_ptr(), total.data_ptr()))


def _native_norm(
    native: NativeOps,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    added: tuple[int | None, int | None] = (None, None),
) -> torch.Tensor:
    """x: contiguous. added: addresses of the residual and of its sum with x, each as long as x."""
    y, width = torch.empty_like(x), x.shape[-1]
    sizes = (x.numel() // width, width)
    native.rms_norm(y.data_ptr(), width, x.data_ptr(), width, weight.data_ptr(), eps, *sizes, *added)
    return y


def silu_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up_T2I: [..., 2 I] contiguous, the gate's half first. Returns [..., I]."""
    if on_triton(gate_up_T2I, "elementwise"):
        from lora_kernels.elementwise.triton_elementwise import silu_mul_triton

        return silu_mul_triton(gate_up_T2I)
    native = _native_for(gate_up_T2I)
    if native is None:
        return silu_mul_reference(gate_up_T2I)
    width = gate_up_T2I.shape[-1] // 2
    y = gate_up_T2I.new_empty(*gate_up_T2I.shape[:-1], width)
    native.silu_mul(y.data_ptr(), gate_up_T2I.data_ptr(), y.numel() // width, width)
    return y


def rope_in_place(x_1HTD: torch.Tensor, cos_1TR: torch.Tensor, sin_1TR: torch.Tensor) -> bool:
    """x cos + rotate_half(x) sin over the first R of D elements, in place. x_1HTD: any strides, D contiguous.

    Returns False, with x unchanged, if there is no kernel for these tensors.
    """
    if x_1HTD.stride(3) != 1 or cos_1TR.dtype is not x_1HTD.dtype or x_1HTD.shape[0] != 1:
        return False
    if on_triton(x_1HTD, "elementwise"):
        from lora_kernels.elementwise.triton_elementwise import rope_triton

        rope_triton(x_1HTD, cos_1TR, sin_1TR)
        return True
    native = _native_for(x_1HTD)
    if native is None:
        return False
    cos, sin = cos_1TR.contiguous(), sin_1TR.contiguous()
    _, heads, tokens, _ = x_1HTD.shape
    pointers = (x_1HTD.data_ptr(), x_1HTD.stride(2), x_1HTD.stride(1), cos.data_ptr(), sin.data_ptr())
    native.rope(*pointers, tokens, heads, cos.shape[-1])
    return True


def forbid_tokens(scores_RV: torch.Tensor, rows_C: torch.Tensor, allowed_CB: torch.Tensor) -> None:
    """scores_RV[rows_C[c], v] = -inf where bit v of allowed_CB[c], the lowest first, is 0; in place. Other rows stay.

    scores_RV: contiguous; rows_C: int64, distinct; allowed_CB: uint8 [C, at least V / 8], contiguous; one device.
    """
    native = _native_for(scores_RV)
    if native is None:
        forbid_tokens_reference(scores_RV, rows_C, allowed_CB)
        return
    width, num_bytes = scores_RV.shape[1], allowed_CB.shape[1]
    assert scores_RV.is_contiguous() and allowed_CB.is_contiguous() and 8 * num_bytes >= width  # noqa: PT018
    pointers = (scores_RV.data_ptr(), width, rows_C.data_ptr(), len(rows_C), allowed_CB.data_ptr())
    native.forbid(*pointers, num_bytes, width)


def _native_for(x: torch.Tensor) -> NativeOps | None:
    return native_ops(x.dtype) if x.is_cpu else None
