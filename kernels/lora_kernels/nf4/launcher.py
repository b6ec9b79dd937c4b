"""NF4 weights as bitsandbytes packs them, and where our matmul serves better than its. Knows layouts; no kernels.

Two values of a row-major [O, H] weight share a byte, the first in the high half; each is an index into 16 codes. 64
values share an absmax, which is a float32, or a byte: an index into 256 codes, times the absmax of 256 such, plus an
offset (QLoRA's double quantisation, arXiv 2305.14314).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lora_kernels.native.bindings import CNf4Weight, native_ops
from lora_kernels.triton_common.available import on_triton

NF4_BLOCK = 64  # values that share an absmax
NESTED_BLOCK = 256  # absmaxes that share one
# On Triton; above it bitsandbytes' path, which dequantises the whole weight, has enough to do with it.
NF4_MAX_ROWS = 64


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """packed uint8 [O * H / 2]; code float32 [16]; absmax float32 [O * H / 64], or uint8 with the three nested_*."""

    packed: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    out_features: int
    in_features: int
    nested_code: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor) -> Nf4Weight | None:
        """bitsandbytes' Params4bit. None where it is not laid out as this module knows it."""
        state = getattr(weight, "quant_state", None)
        if state is None or state.quant_type != "nf4" or state.blocksize != NF4_BLOCK or weight.dtype != torch.uint8:
            return None
        if len(state.shape) != 2 or state.shape[1] % NF4_BLOCK or getattr(state, "packing_format_for_cpu", False):
            return None
        packed = weight.detach().reshape(-1)
        outs, inputs = state.shape
        if not state.nested:
            return cls(packed, state.code, state.absmax, outs, inputs)
        outer = state.state2
        if outer.blocksize != NESTED_BLOCK:
            return None
        return cls(packed, state.code, state.absmax, outs, inputs, outer.code, outer.absmax, state.offset)

    @cached_property
    def _native(self) -> CNf4Weight:
        pointers = (self.packed, self.code, *((None, self.absmax) if self.is_nested else (self.absmax, None)))
        pointers += (self.nested_code, self.nested_absmax)
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in pointers)
        offset = 0.0 if self.nested_offset is None else float(self.nested_offset)
        return CNf4Weight(self.out_features, self.in_features, *addresses, offset)

    @cached_property
    def native_address(self) -> int:
        return ctypes.addressof(self._native)

    @property
    def is_nested(self) -> bool:
        """Whether the absmaxes are quantised too."""
        return self.nested_code is not None


def nf4_weights(weights: Sequence[torch.Tensor]) -> list[Nf4Weight]:
    """Those of a group, or none where one of them is laid out otherwise."""
    known = [packed for weight in weights if (packed := Nf4Weight.of(weight)) is not None]
    return known if len(known) == len(weights) else []


def on_nf4_kernel(x_TH: torch.Tensor) -> bool:
    """Whether rows are few enough, and lie where a kernel of ours runs."""
    if on_triton(x_TH, "nf4"):
        return len(x_TH) <= NF4_MAX_ROWS and x_TH.element_size() == 2
    native = native_ops(x_TH.dtype) if x_TH.device.type == "cpu" else None
    return native is not None and len(x_TH) <= native.nf4_max_rows


def nf4_linear(x_TH: torch.Tensor, weights: Sequence[Nf4Weight], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """x W^T + bias of linear layers that read the same x, side by side. x_TH: [T, H], such as `on_nf4_kernel` takes.

    Each weight is dequantised and rounded to x's dtype inside the kernel. Returns [T, sum(out_features)].
    """
    y_TO = x_TH.new_empty(len(x_TH), sum(weight.out_features for weight in weights))
    launch = _on_triton if on_triton(x_TH, "nf4") else _on_cpu
    launch(x_TH, weights, biases, y_TO)
    return y_TO


def _on_triton(
    x_TH: torch.Tensor, weights: Sequence[Nf4Weight], biases: Sequence[torch.Tensor | None], y_TO: torch.Tensor
) -> None:
    from lora_kernels.nf4.triton_nf4 import nf4_matmul

    assert len(x_TH) <= NF4_MAX_ROWS, f"{len(x_TH)} rows; the kernel takes {NF4_MAX_ROWS}"
    parts = y_TO.split([weight.out_features for weight in weights], dim=1)
    for y_part, weight, bias in zip(parts, weights, biases, strict=True):
        nf4_matmul(x_TH, weight, bias, y_part)


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
