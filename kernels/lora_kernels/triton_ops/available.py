"""Decides whether a tensor goes to Triton. Imports nothing of it."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_triton(x: torch.Tensor) -> bool:
    """True for CUDA tensors where Triton is installed; everything else keeps its own path."""
    return x.device.type == "cuda" and has_triton()
