"""NF4 weights as bitsandbytes packs them. Knows the layout; no kernels.

Two values of a row-major [O, H] weight share a byte, the first in the high half; each is an index into 16 codes. 64
values share an absmax, which is a float32, or a byte: an index into 256 codes, times the absmax of 256 such, plus an
offset (QLoRA's double quantisation, arXiv 2305.14314).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lora_kernels.native.bindings import CNf4Weight

NF4_BLOCK = 64  # values that share an absmax
NESTED_BLOCK = 256  # absmaxes that share one


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
        """bitsandbytes' Params4bit. None for a layout that this module does not know."""
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

    @cached_property
    def words(self) -> torch.Tensor:
        """packed as int32 [O * H / 8]: eight values each, the first two in the lowest byte."""
        return self.packed.view(torch.int32)

    @property
    def is_nested(self) -> bool:
        """Whether the absmaxes are quantised too."""
        return self.nested_code is not None

    def with_codes_of(self, other: Nf4Weight) -> Nf4Weight:
        """The same weight, on the other's tables if they hold the same codes. Waits for the device."""
        is_same = torch.equal(self.code, other.code) and self.is_nested == other.is_nested
        if is_same and self.nested_code is not None and other.nested_code is not None:
            is_same = torch.equal(self.nested_code, other.nested_code)
        return replace(self, code=other.code, nested_code=other.nested_code) if is_same else self

    def shares_codes_with(self, other: Nf4Weight) -> bool:
        """Whether one launch can serve both."""
        return self.code is other.code and self.nested_code is other.nested_code


def nf4_weights(weights: Sequence[torch.Tensor]) -> list[Nf4Weight]:
    """The weights of a group; empty if one of them has another layout."""
    known = [packed for weight in weights if (packed := Nf4Weight.of(weight)) is not None]
    return [weight.with_codes_of(known[0]) for weight in known] if len(known) == len(weights) else []
