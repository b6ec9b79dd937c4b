"""The three tensor types as integers: is a value finite, does it survive a cast, and the cast itself.

Works on bit patterns in numpy: one thread, the GIL released, bfloat16 without a torch tensor per weight. Rounds to
nearest even, as torch does. Knows nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Bits = NDArray[Any]  # uint16 or uint32: the values' bit patterns

_CHUNK = 1 << 16  # elements looked at together: stays in the L2 cache


@dataclass(frozen=True, slots=True)
class TensorType:
    """bits: numpy's unsigned type of the same width; infinity: the bit pattern of +inf."""

    name: str
    bits: type[np.uint16] | type[np.uint32]
    infinity: int
    torch_dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        return np.dtype(self.bits).itemsize


TENSOR_TYPES: Mapping[str, TensorType] = {
    "F32": TensorType("F32", np.uint32, 0x7F800000, torch.float32),
    "F16": TensorType("F16", np.uint16, 0x7C00, torch.float16),
    "BF16": TensorType("BF16", np.uint16, 0x7F80, torch.bfloat16),
}

_OF_BASE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# (from, to) -> the smallest magnitude, as bits of `from`, that rounds to infinity in `to`.
_OVERFLOW = {
    ("F32", "BF16"): 0x7F7F8000,
    ("F32", "F16"): 0x477FF000,  # 65520.0: half way between float16's 65504 and 65536
    ("BF16", "F16"): 0x4780,  # 65536.0: bfloat16 has nothing between 65280 and this
}


def type_of_base(dtype: str) -> TensorType:
    """The tensor type of a BaseDescription.dtype; ValueError for another name."""
    if dtype not in _OF_BASE:
        raise ValueError(f"base dtype must be one of {', '.join(_OF_BASE)}, got {dtype!r}")
    return TENSOR_TYPES[_OF_BASE[dtype]]


def overflow_limit(source: TensorType, target: TensorType) -> int:
    """Magnitudes (bits without sign) from this one up are not finite once cast; inf and NaN are always above."""
    return _OVERFLOW.get((source.name, target.name), source.infinity)


def largest_magnitude(bits: Bits) -> int:
    """The largest |value| as bits without sign; NaN and inf sort above every finite value."""
    flat = bits.reshape(-1)
    without_sign = np.iinfo(flat.dtype).max >> 1
    scratch = np.empty(min(_CHUNK, flat.size), dtype=flat.dtype)
    largest = 0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        masked = np.bitwise_and(chunk, without_sign, out=scratch[: chunk.size])
        largest = max(largest, int(masked.max()))
    return largest


def cast_bits(bits: Bits, source: TensorType, target: TensorType) -> Bits:
    """Bit patterns of the same (finite) values in another type; the same array if the types agree."""
    if source is target:
        return bits
    wide = _to_f32(bits, source)
    if target.name == "F32":
        return wide
    if target.name == "F16":
        half: Bits = wide.view(np.float32).astype(np.float16).view(np.uint16)
        return half
    odd = (wide >> 16) & 1
    rounded: Bits = ((wide + (0x7FFF + odd)) >> 16).astype(np.uint16)
    return rounded


def _to_f32(bits: Bits, source: TensorType) -> Bits:
    if source.name == "F32":
        return bits
    if source.name == "BF16":
        return bits.astype(np.uint32) << 16
    return bits.view(np.float16).astype(np.float32).view(np.uint32)
