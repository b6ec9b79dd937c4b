"""The C kernels' signatures and structs, as ctypes sees them. Mirrors kernels.c field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lora_kernels.native.build import native_build


class CLoraGroup(ctypes.Structure):
    _fields_ = (
        ("num_members", c_int64),
        ("in_features", c_int64),
        ("module", c_void_p),
        ("start", c_void_p),
        ("out", c_void_p),
    )


class CLoraBatch(ctypes.Structure):
    _fields_ = (
        ("num_segments", c_int64),
        ("num_slots", c_int64),
        ("h_rank", c_int64),
        ("slot", c_void_p),
        ("start", c_void_p),
        ("rows", c_void_p),
        ("offsets", c_void_p),
        ("ranks", c_void_p),
        ("scales", c_void_p),
        ("int8", c_void_p),
        ("arena", c_void_p),
        ("h", c_void_p),
        ("factors", c_void_p),
    )


class CNf4Weight(ctypes.Structure):
    _fields_ = (
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("packed", c_void_p),
        ("code", c_void_p),
        ("absmax", c_void_p),
        ("nested", c_void_p),
        ("nested_code", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_offset", c_float),
    )


class CAttention(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        ("num_listed", c_int64),
        ("q_heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("table_stride", c_int64),
        ("window", c_int64),
        ("max_context", c_int64),
        ("block_tables", c_void_p),
        ("sequence", c_void_p),
        ("position", c_void_p),
        ("listed", c_void_p),
        ("prompts", c_void_p),
        ("num_prompts", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    )


@dataclass(frozen=True, slots=True)
class NativeOps:
    """The kernels of one element type. Called with raw addresses: launchers check shapes, types and devices first.

    linear_max_rows, nf4_max_rows: up to this many rows they are faster than torch on this machine; 0: never.
    linear_min_rows: from this many.
    takes_prompts: whether paged_attention has code of its own for many tokens of one sequence.
    """

    linear: Any
    nf4_linear: Any
    lora_delta: Any
    rms_norm: Any
    silu_mul: Any
    rope: Any
    forbid: Any
    store_kv: Any
    paged_attention: Any
    linear_max_rows: int
    nf4_max_rows: int
    linear_min_rows: int
    takes_prompts: int


_P, _I = c_void_p, c_int64
_SIGNATURES: dict[str, list[Any]] = {
    "linear": [_P, _P, _P, _I, _P, _I, _P, _P, _I, _I],
    "nf4_linear": [_P, _I, _P, _I, _P, _P, _I, _I],
    "lora_delta": [_P, _P, _P, _I, _P, _I, _P],
    "rms_norm": [_P, _I, _P, _I, _P, c_float, _I, _I, _P, _P],
    "silu_mul": [_P, _P, _I, _I],
    "rope": [_P, _I, _I, _P, _P, _I, _I, _I],
    "forbid": [_P, _I, _P, _I, _P, _I, _I],
    "store_kv": [_P, _P, _P, _P, _P, _I, _I, _I, _I, _P],
    "paged_attention": [_P, _P, _P, _I, _I, _P, _P],
}


@cache
def native_ops(dtype: torch.dtype) -> NativeOps | None:
    """The C kernels for CPU tensors of this dtype; None if they are not available."""
    suffix = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
    library = native_build().library
    if suffix is None or library is None:
        return None
    functions = {}
    for name, argtypes in _SIGNATURES.items():
        function = getattr(library, f"ml_{name}_{suffix}")
        function.argtypes, function.restype = argtypes, None
        functions[name] = function
    limits = {}
    names = {name: f"ml_{name}_{suffix}" for name in ("linear_max_rows", "nf4_max_rows", "takes_prompts")}
    for name, symbol in {**names, "linear_min_rows": "ml_linear_min_rows"}.items():
        limit = getattr(library, symbol)
        limit.restype = c_int64
        limits[name] = limit()
    return NativeOps(**functions, **limits)
