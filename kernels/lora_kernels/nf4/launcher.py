"""Launcher of the NF4 matmul, and when it beats bitsandbytes' own. Knows devices and sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from lora_kernels.native.bindings import native_ops
from lora_kernels.nf4.weight import Nf4Weight
from lora_kernels.triton_common.available import on_triton

NF4_ROWS_AT_ONCE = 64  # on Triton: what one launch takes
# With more rows, dequantising the whole weight first (bitsandbytes) pays off: it moves 4.6 bytes a weight, each launch
# 0.56. Below, recorded decode steps stay recorded.
NF4_MAX_ROWS = 4 * NF4_ROWS_AT_ONCE


def on_nf4_kernel(x_TH: torch.Tensor) -> bool:
    """Whether the rows are few enough and a kernel exists for their device."""
    if on_triton(x_TH, "nf4"):
        return len(x_TH) <= NF4_MAX_ROWS and x_TH.element_size() == 2
    native = native_ops(x_TH.dtype) if x_TH.is_cpu else None
    return native is not None and len(x_TH) <= native.nf4_max_rows


def nf4_linear(x_TH: torch.Tensor, weights: Sequence[Nf4Weight], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """x W^T + bias of linear layers that read the same x, side by side. x_TH: [T, H], for which `on_nf4_kernel` holds.

    Each weight is dequantised and rounded to x's dtype inside the kernel. Returns [T, sum(out_features)].
    """
    y_TO = x_TH.new_empty(len(x_TH), sum(weight.out_features for weight in weights))
    launch = _on_triton if on_triton(x_TH, "nf4") else _on_cpu
    launch(x_TH, weights, biases, y_TO)
    return y_TO


def _on_triton(
    x_TH: torch.Tensor, weights: Sequence[Nf4Weight], biases: Sequence[torch.Tensor | None], y_TO: torch.Tensor
) -> None:
    for x_rows, y_rows in zip(x_TH.split(NF4_ROWS_AT_ONCE), y_TO.split(NF4_ROWS_AT_ONCE), strict=True):
        _launch_rows(x_rows, weights, biases, y_rows)


def _launch_rows(
    x_TH: torch.Tensor, weights: Sequence[Nf4Weight], biases: Sequence[torch.Tensor | None], y_TO: torch.Tensor
) -> None:
    from lora_kernels.nf4.triton_nf4 import nf4_matmul

    has_bias = [bias is not None for bias in biases]
    if all(weight.shares_codes_with(weights[0]) for weight in weights) and len(set(has_bias)) == 1:
        nf4_matmul(x_TH, weights, biases, y_TO)
        return
    parts = y_TO.split([weight.out_features for weight in weights], dim=1)
    for y_part, weight, bias in zip(parts, weights, biases, strict=True):
        nf4_matmul(x_TH, [weight], [bias], y_part)


def _on_cpu(
    x_TH: torch.Tensor, weights: Sequence[Nf4Weight], biases: Sequence[torch.Tensor | None], y_TO: torch.Tensor
) -> None:
    native = native_ops(x_TH.dtype)
    assert native is not None, f"no kernel for {x_TH.dtype} on {x_TH.device}"
    x_TH = x_TH.contiguous()
    assert all(weight.in_features == x_TH.shape[1] for weight in weights), "the weights read x"
    assert all(bias is None or bias.dtype == x_TH.dtype for bias in biases), "biases have x's dtype"
    pointers = ctypes.c_void_p * len(weights)
    native.nf4_linear(
        y_TO.data_ptr(),
        y_TO.stride(0),
        x_TH.data_ptr(),
        x_TH.stride(0),
        pointers(*(weight.native_address for weight in weights)),
        pointers(*(None if bias is None else bias.data_ptr() for bias in biases)),
        len(weights),
        len(x_TH),
    )
