"""Calls SGLang's LoRA kernels as its two Triton backends do at decode. Knows their arguments, from SGLang 0.5 on.

`sglang`: the sgemm kernels over rows sorted by adapter. `sglang_chunked`: the segments of its `csgmv` backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import Call
from benchmarks.gpu.others.job import Job, MakeCalls
from benchmarks.gpu.others.load import Source, importable

NAME = "sglang"
FOLDERS = ("sglang/kernels/ops/lora/dense", "sglang/srt/lora/triton_ops")
SGEMM = ("sgemm_lora_a", "sgemm_lora_b", "gate_up_lora_b", "qkv_lora_b")
CHUNKED = ("chunked_sgmv_shrink", "chunked_sgmv_expand")
Segments = list[tuple[int, int, int]]  # slot, first of the sorted rows, number of rows


class _Environment:
    """Every switch at its default, which is off."""

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(get=lambda: False)


def _as_it_is(key: object = None) -> Callable[[Any], Any]:
    return lambda kernel: kernel


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


NAMES: Mapping[str, object] = {
    "LoRABatchInfo": SimpleNamespace,
    "envs": _Environment(),
    "cached_triton_kernel": _as_it_is,
    "get_device_name": _device_name,
}


def ways(source: Source) -> dict[str, MakeCalls]:
    """Raises ImportError, or whatever their files raise, if they cannot be loaded."""
    with importable(source, NAMES):
        modules = {name: import_module(f"{source.package}.{name}") for name in (*SGEMM, *CHUNKED)}
    shrink, *expands = (modules[name] for name in SGEMM)
    chunked_shrink, chunked_expand = (modules[name] for name in CHUNKED)
    return {
        NAME: partial(_sgemm_calls, shrink, expands),
        f"{NAME}_chunked": partial(_chunked_calls, chunked_shrink, chunked_expand),
    }


def _sgemm_calls(shrink: ModuleType, expands: Sequence[ModuleType], job: Job) -> list[Call]:
    """Versions that do not sort by adapter take every row as a segment of its own."""
    sorts = "permutation" in inspect.getsource(shrink)
    segments = _segments(job, len(job.slots)) if sorts else [(slot, row, 1) for row, slot in enumerate(job.slots)]
    info = _batch_info(job, segments, max_len=len(job.slots) if sorts else 1, sorts=sorts)
    outs = job.shape.out_features
    offsets = _offsets(job)
    one, two, three = expands

    def expand(h: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> None:
        if len(outs) == 1:
            one.sgemm_lora_b_fwd(h, b, info, y)
        elif len(outs) == 2:
            two.gate_up_lora_b_fwd(h, b, info, outs[0], y)
        else:
            three.qkv_lora_b_fwd(h, b, info, offsets, max(outs), y)

    def call(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        expand(shrink.sgemm_lora_a_fwd(x, a, info, stack_num=len(outs)), b, y)

    return [partial(call, *tensors) for tensors in _layers(job)]


def _chunked_calls(shrink: ModuleType, expand: ModuleType, job: Job) -> list[Call]:
    chunk = _chunk_size(len(job.slots))
    info = _batch_info(job, _segments(job, chunk), max_len=chunk, sorts=True)
    outs = job.shape.out_features
    offsets = _offsets(job)
    takes_host_copy = "slice_offsets_cpu" in inspect.signature(expand.chunked_sgmv_lora_expand_forward).parameters
    extra = {"slice_offsets_cpu": offsets.cpu()} if takes_host_copy else {}

    def call(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        h = shrink.chunked_sgmv_lora_shrink_forward(x, a, info, len(outs))
        expand.chunked_sgmv_lora_expand_forward(h, b, info, offsets, max(outs), y, **extra)

    return [partial(call, *tensors) for tensors in _layers(job)]


def _chunk_size(rows: int) -> int:
    """As its backend chooses it."""
    if rows >= 256:
        return 128
    return 32 if rows >= 64 else 16


def _segments(job: Job, longest: int) -> Segments:
    """Of rows sorted by adapter, none longer than `longest`."""
    counts = np.bincount(job.slots, minlength=len(job.ranks))
    firsts = np.cumsum(counts) - counts
    return [
        (slot, int(first) + done, min(longest, int(count) - done))
        for slot, (first, count) in enumerate(zip(firsts, counts, strict=True))
        for done in range(0, int(count), longest)
    ]


def _batch_info(job: Job, segments: Segments, *, max_len: int, sorts: bool) -> SimpleNamespace:
    slots, firsts, lengths = zip(*segments, strict=True)
    integers = partial(torch.tensor, dtype=torch.int32, device=job.device)
    order = np.argsort(job.slots, kind="stable").tolist()
    return SimpleNamespace(
        use_cuda_graph=False,
        bs=len(segments),
        num_segments=len(segments),
        max_len=max_len,
        seg_lens=integers(lengths),
        seg_indptr=integers([*firsts, len(job.slots)]),
        weight_indices=integers(slots),
        lora_ranks=integers(job.ranks),
        scalings=torch.full((len(job.ranks),), job.scale, dtype=torch.float32, device=job.device),
        permutation=integers(order) if sorts else None,
    )


def _offsets(job: Job) -> torch.Tensor:
    return torch.tensor(np.cumsum((0, *job.shape.out_features)), dtype=torch.int32, device=job.device)


def _layers(job: Job) -> Iterator[tuple[torch.Tensor, ...]]:
    """x, y, A [adapters, members * rank, H] with an adapter's own rows first, and B [adapters, sum(O), rank]."""
    members, rank = len(job.shape.out_features), max(job.ranks)
    for layer, (x, y) in enumerate(zip(job.inputs, job.outputs, strict=True)):
        a, b = (
            [torch.cat([matrix(layer, member, slot) for member in range(members)]) for slot in range(len(job.ranks))]
            for matrix in (job.a, job.b)
        )
        stacked_a = job.stack(a, members * rank, job.shape.in_features)
        yield x, y, stacked_a, job.stack(b, sum(job.shape.out_features), rank)
