"""Calls vLLM's `lora_shrink` and `lora_expand` as its Punica wrapper does. Knows their arguments, from vLLM 0.9 on."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks.gpu.bench import Call
from benchmarks.gpu.others.job import Job, MakeCalls
from benchmarks.gpu.others.load import Source, importable
from lora_kernels.triton_common.tiles import power_of_two

NAME = "vllm"
FOLDERS = ("vllm/runtime/modeling/lora/ops/triton_ops", "vllm/lora/ops/triton_ops")
CACHES = ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT")  # of pointers by address: addresses come again with other shapes


class _Platform:
    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    def has_device_capability(self, capability: int) -> bool:
        return self.is_cuda() and _capability() >= capability

    def is_device_capability(self, capability: int) -> bool:
        return self.is_cuda() and _capability() == capability


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _logger(name: str) -> SimpleNamespace:
    log = logging.getLogger(name)
    return SimpleNamespace(warning_once=log.debug, info_once=log.debug, warning=log.debug, info=log.debug)


def _not_registered(*_: object, **__: object) -> None:
    raise AttributeError("operations are called as they are")  # which their modules answer by not wrapping them


def _to_device(data: list[int], device: torch.device | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.tensor(data, dtype=dtype, device=device)


NAMES: Mapping[str, object] = {
    "triton": triton,
    "tl": tl,
    "current_platform": _Platform(),
    "init_logger": _logger,
    "next_power_of_2": power_of_two,
    "direct_register_custom_op": _not_registered,
    "async_tensor_h2d": _to_device,
    "envs": SimpleNamespace(  # each at its default
        VLLM_BATCH_INVARIANT=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_DISABLE_PDL=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
    ),
}


def ways(source: Source) -> dict[str, MakeCalls]:
    """Raises ImportError, or whatever their files raise, if they cannot be loaded."""
    with importable(source, NAMES):
        shrink, expand, metadata, utils = (
            import_module(f"{source.package}.{module}")
            for module in ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "utils")
        )
    new = torch.empty if ".zero_()" in inspect.getsource(shrink) else torch.zeros  # some versions clear h themselves
    return {NAME: partial(_calls, _Ops(shrink.lora_shrink, expand.lora_expand, metadata.LoRAKernelMeta, new, utils))}


class _Ops(NamedTuple):
    """new: makes h. utils: the module that keeps pointers."""

    shrink: Callable[..., None]
    expand: Callable[..., None]
    metadata: Any
    new: Callable[..., torch.Tensor]
    utils: object


def _calls(ops: _Ops, job: Job) -> list[Call]:
    """Ranks are padded to the largest, as vLLM's slots are."""
    for name in CACHES:
        getattr(ops.utils, name, {}).clear()
    rows, members, rank = len(job.slots), len(job.shape.out_features), max(job.ranks)
    arguments = _metadata(ops.metadata, job)
    stacks = [_stacks(job, layer, rank) for layer in range(len(job.inputs))]

    def call(layer: int) -> None:
        a, b = stacks[layer]
        h = ops.new(members, rows, rank, dtype=torch.float32, device=job.device)
        ops.shrink(job.inputs[layer], a, h, *arguments, job.scale)
        ops.expand(h, b, job.outputs[layer], *arguments, offset_start=0, add_inputs=True)

    return [partial(call, layer) for layer in range(len(stacks))]


def _metadata(metadata: Any, job: Job) -> tuple[torch.Tensor, ...]:
    made = metadata.make(len(job.ranks), len(job.slots), job.device)
    made.prepare_tensors(torch.tensor(job.slots, dtype=torch.int32, device=job.device))
    specializes = "specialize_active_lora" in inspect.signature(made.meta_args).parameters
    arguments: tuple[torch.Tensor, ...] = made.meta_args(len(job.slots), *([True] if specializes else []))
    return arguments


def _stacks(job: Job, layer: int, rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A: [adapters, 1, rank, H] of each member; B: [adapters, 1, O, rank]."""
    slots = range(len(job.ranks))
    a, b = [], []
    for member, out in enumerate(job.shape.out_features):
        parts = [job.a(layer, member, slot) for slot in slots]
        a.append(job.stack(parts, rank, job.shape.in_features)[:, None])
        b.append(job.stack([job.b(layer, member, slot) for slot in slots], out, rank)[:, None])
    assert all(one.is_contiguous() for one in chain(a, b)), "their pointers take contiguous stacks"
    return a, b
