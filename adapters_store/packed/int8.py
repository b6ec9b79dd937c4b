"""Rows of a matrix as bytes: one scale a row, values rounded to the nearest of 255. Knows numbers; knows no adapters.

A LoRA delta is x A^T B, a sum over ranks. A rank's row of A and its row of B (stored transposed) each have one scale.
Both are one factor of the rank's term, so a kernel multiplies it in once, between the two products.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 127  # -127..127: symmetric, so that zero is exact

Values = NDArray[np.float32]


def quantized(values_RN: Values) -> tuple[NDArray[np.int8], Values]:
    """[R, N] finite float32 -> bytes [R, N] and scales [R]; bytes times scales are the values, within half a scale.

    A row of zeros has scale 0."""
    peaks_R = np.abs(values_RN).max(axis=1, initial=0.0)
    scales_R = (peaks_R / LEVELS).astype(np.float32)
    divisors_R = np.where(scales_R > 0, scales_R, np.float32(1))
    rounded_RN = np.rint(values_RN / divisors_R[:, None])
    return np.clip(rounded_RN, -LEVELS, LEVELS).astype(np.int8), scales_R


class Int8Rows:
    """Writes one adapter's linear layers into its buffer: bytes, and each rank's factor before its module's A."""

    def __init__(self, memory: NDArray[np.uint8], itemsize: int) -> None:
        """memory: the whole buffer. itemsize: bytes of the elements that offsets count."""
        self.are_finite = True
        self._memory = memory
        self._itemsize = itemsize

    def put(self, values_RN: Values, offset: int, factors_end: int, *, is_first: bool) -> None:
        """is_first: A, whose scales the factors become; then B, transposed, whose scales multiply them."""
        bytes_RN, scales_R = quantized(values_RN)
        first, end = offset * self._itemsize, factors_end * self._itemsize
        self._memory[first : first + bytes_RN.size].view(np.int8)[:] = bytes_RN.reshape(-1)
        factors_R = self._memory[end - scales_R.nbytes : end].view(np.float32)
        with np.errstate(over="ignore"):
            factors_R[:] = scales_R if is_first else factors_R * scales_R
        self.are_finite &= bool(np.isfinite(factors_R).all())
