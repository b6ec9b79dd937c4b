"""The C kernels' signatures and structs, as ctypes sees them. Mirrors kernels.c field by field."""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

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


class CKernelCall(ctypes.Structure):
    _fields_ = (("kernel", c_int64), ("arguments", c_int64 * 11), ("number", c_float))


class Recorder(Protocol):
    """Receives each call of a kernel in its thread."""

    def called(self, kernel: NativeKernel, arguments: tuple[Any, ...]) -> None: ...


class _Recording(threading.local):
    recorder: Recorder | None = None


recording = _Recording()


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """One kernel, with raw addresses for arguments. number: of its calls in `replay`, of the same element type; None:
    they are not recorded. replay: of addresses of a CKernelCall and their count."""

    function: Any
    number: int | None
    replay: Any

    def __call__(self, *arguments: Any) -> None:
        self.function(*arguments)
        if recording.recorder is not None:
            recording.recorder.called(self, arguments)


@dataclass(frozen=True, slots=True)
class NativeOps:
    """The kernels of one element type. Called with raw addresses: launchers check shapes, types and devices first.

    linear_max_rows, nf4_max_rows: up to this many rows they are faster than torch on this machine; 0: never.
    linear_min_rows: from this many.
    takes_prompts: whether paged_attention has code of its own for many tokens of one sequence.
    repacks: whether repacked_linear reads weights faster than linear, see `lora.repacked`.
    """

    linear: NativeKernel
    nf4_linear: NativeKernel
    lora_delta: NativeKernel
    rms_norm: NativeKernel
    silu_mul: NativeKernel
    rope: NativeKernel
    forbid: NativeKernel
    store_kv: NativeKernel
    paged_attention: NativeKernel
    repacked_linear: NativeKernel
    experts: NativeKernel
    linear_max_rows: int
    nf4_max_rows: int
    linear_min_rows: int
    takes_prompts: int
    repacks: int


_P, _I = c_void_p, c_int64
_SIGNATURES: dict[str, list[Any]] = {  # the first nine in the order of ml_replay
    "linear": [_P, _P, _P, _I, _P, _I, _P, _P, _I, _I, _I],
    "nf4_linear": [_P, _I, _P, _I, _P, _P, _I, _I],
    "lora_delta": [_P, _P, _P, _I, _P, _I, _P, _I],
    "rms_norm": [_P, _I, _P, _I, _P, c_float, _I, _I, _P, _P],
    "silu_mul": [_P, _P, _I, _I],
    "rope": [_P, _I, _I, _P, _P, _I, _I, _I],
    "store_kv": [_P, _P, _P, _P, _P, _I, _I, _I, _I, _P],
    "paged_attention": [_P, _P, _P, _I, _I, _P, _P],
    "repacked_linear": [_P, _P, _P, _I, _P, _I, _P, _P, _I, _I, _I],
    "experts": [_P, _P, _P, _P, _P, _P, _I, _I, _I],
    "forbid": [_P, _I, _P, _I, _P, _I, _I],
}
_NUM_RECORDED = 9


@cache
def native_ops(dtype: torch.dtype) -> NativeOps | None:
    """The C kernels for CPU tensors of this dtype; None if they are not available."""
    suffix = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
    library = native_build().library
    if suffix is None or library is None:
        return None
    replay = _function(library, f"ml_replay_{suffix}", [_P, _I])
    kernels = {}
    for number, (name, argtypes) in enumerate(_SIGNATURES.items()):
        function = _function(library, f"ml_{name}_{suffix}", argtypes)
        kernels[name] = NativeKernel(function, number if number < _NUM_RECORDED else None, replay)
    limits = {}
    names = {name: f"ml_{name}_{suffix}" for name in ("linear_max_rows", "nf4_max_rows", "takes_prompts", "repacks")}
    for name, symbol in {**names, "linear_min_rows": "ml_linear_min_rows"}.items():
        limit = getattr(library, symbol)
        limit.restype = c_int64
        limits[name] = limit()
    return NativeOps(**kernels, **limits)  # type: ignore[arg-type]  # mypy takes both for one type


def _function(library: ctypes.CDLL, name: str, argtypes: list[Any]) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = argtypes, None
    return function
