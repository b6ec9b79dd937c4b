"""Compiles on a machine without a GPU what a server and the GPU suite launch on one, into Triton's cache.

The launchers run on tensors without content (the `meta` device), or on one layer of the model's shape on the CPU, and
Triton compiles for a GPU that is named to it. What they would launch is compiled in processes, under the same key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.gpu.bench import Bench, Call
from benchmarks.gpu.launch_forms import tiles_instead
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.random_base import random_base
from benchmarks.gpu.sizes import FULL
from lora_kernels.self_test import self_test
from lora_kernels.triton_common.available import triton_switch
from lora_kernels.triton_common.compile_ahead import Job, asked_for
from lora_kernels.triton_common.tiles import TILES, DeviceTiles
from server.engine.model.recorded.cuda_graphs import GraphSettings
from server.engine.startup.covering_steps import StepLimits, launch_covering

META = torch.device("meta")
MAX_ROWS, MAX_RANK, BLOCK_SIZE = 64, 256, 16
NEXT_TO_NOTHING_S = 1e-4


@dataclass(frozen=True)
class Gpu:
    """What the launchers and Triton ask of a device."""

    capability: int
    multiprocessors: int

    @property
    def tiles(self) -> DeviceTiles:
        tiles = TILES[max(known for known in TILES if known <= self.capability)]
        return DeviceTiles(tiles, self.multiprocessors * tiles.programs_per_multiprocessor)


H200 = Gpu(90, 132)


class _Driver:
    """As much of a Triton driver as a launch asks before it compiles."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._gpu.capability, 32)


class _NoTimes(Bench):
    """Calls each once; what it measures means nothing."""

    def seconds(self, calls: Sequence[Call]) -> float:
        calls[0]()
        return NEXT_TO_NOTHING_S

    @property
    def bandwidth(self) -> float:
        return 1.0


class _NothingComputed(TorchDispatchMode):
    """Products and random numbers are left as `empty` made them: only what is launched is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        options = {key: value for key, value in (kwargs or {}).items() if key in ("dtype", "device")}
        if name in ("mm", "addmm", "bmm"):
            left, right = args[-2:]
            return left.new_empty(*left.shape[:-1], right.shape[-1])
        if name == "linear":
            return args[0].new_empty(*args[0].shape[:-1], len(args[1]))
        if name in ("rand", "randn", "randint"):
            size = next(value for value in args if isinstance(value, list | tuple))
            return torch.empty(size, **options)
        if name in ("normal_", "uniform_", "random_"):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on(gpu: Gpu) -> Iterator[None]:
    """Triton compiles for this GPU, launchers choose its tiles, and every tensor goes to Triton."""
    before = triton_switch().on_cpu
    triton_switch().on_cpu = True
    driver.set_active(_Driver(gpu))
    try:
        with tiles_instead(gpu.tiles):
            yield
    finally:
        driver._active = None
        triton_switch().on_cpu = before


def jobs_of_a_server(*, nf4: bool) -> list[Job]:
    """The self-test, and every covering step over one layer of the 8B shape; its vocabulary is in no key."""
    base = random_base(replace(FULL.model, layers=1, vocab=512), torch.device("cpu"), nf4=nf4)
    graphs = GraphSettings.for_rows(MAX_ROWS, max_rank=MAX_RANK)
    limits = StepLimits(max_tokens=300, max_rows=MAX_ROWS, max_context=2 * 8192, graphs=graphs)
    return _asked_for(partial(launch_covering, base, limits, block_size=BLOCK_SIZE))


def _asked_for(launch_all: Callable[[], object]) -> list[Job]:
    with _NothingComputed():  # type: ignore[no-untyped-call]
        return asked_for(launch_all)


def jobs_in_order_of_use(say: Callable[[str], None] = print) -> Iterator[Job]:
    """Of the first run: its tests, the parts that need no engine, servers of the 8B shape. What a part that ends early
    had not come to is compiled at its first launch."""
    yield from jobs_of_part("correctness", say)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from _asked_for(partial(self_test, META, dtype))
    for name in ("attention", "nf4"):
        yield from jobs_of_part(name, say)
    for nf4 in (False, True):
        yield from jobs_of_a_server(nf4=nf4)
    yield from jobs_of_part("lora", say)


def jobs_of_part(name: str, say: Callable[[str], None]) -> list[Job]:
    return _asked_for(partial(_run_part, name, say))


def _run_part(name: str, say: Callable[[str], None]) -> None:
    try:
        PARTS[name].load()(_NoTimes(META, toy=False, say=lambda text: None))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        say(f"{name}: not to its end without a device: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
