"""Shared by the Triton tests: torch's own error as the limit, and adapters for rows."""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.popularity import Popularity, choose_adapters
from lora_kernels.lora.batch import NO_ADAPTER

ALL_FORMS = os.environ.get("MULTILORA_ALL_LORA_FORMS") == "1"  # of interpreted tests; else a selection of their cases


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, relative to the largest exact value."""
    return float((got.float() - exact.float()).abs().max() / exact.float().abs().max().clamp_min(1e-6))


@cache
def torch_matmul_error(in_features: int, dtype: torch.dtype) -> float:
    """What torch's own matmul loses on products of this length in this precision: the worst of a few."""
    errors = []
    for seed in range(8):
        x, weight = (normal(rows, in_features, dtype=dtype, seed=seed) for rows in (16, 64))
        errors.append(relative_error(x @ weight.T, x.float() @ weight.float().T))
    return max(errors)


def tolerance(in_features: int, dtype: torch.dtype) -> float:
    """At most twice torch's error; float32's is too small to be the yardstick of another summation order."""
    return 1e-6 if dtype is torch.float32 else 2 * torch_matmul_error(in_features, dtype)


def row_slots(popularity: Popularity, num_rows: int, num_slots: int) -> NDArray[np.int32]:
    """Each row's slot; every fifth row has none, except a lonely one."""
    slots = np.array(choose_adapters(popularity, num_rows, num_slots, seed=num_rows), dtype=np.int32)
    if num_rows > 1:
        slots[::5] = NO_ADAPTER
    return slots
