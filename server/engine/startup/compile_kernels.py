"""Compiles every kernel that a server can need before it is ready: in several processes, then launched once each.

A kernel that does not compile or launch turns its operation off: torch serves it, slower, and the log says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from lora_kernels.self_test import turn_off_uncompiled, with_failing_ops_off
from lora_kernels.triton_common.available import has_triton
from server.engine.model.adapter_copier import empty_table
from server.engine.model.base_model import BaseModel
from server.engine.model.kv_tensors import KVCache
from server.engine.model.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.startup.covering_steps import StepLimits, covering_batches

NUM_BLOCKS = 4  # block tables repeat them: what is read does not matter

_log = logging.getLogger(__name__)


def compile_kernels(
    base: BaseModel, limits: StepLimits, *, block_size: int, report_progress: Callable[[str], None]
) -> None:
    """On a GPU with Triton; elsewhere nothing. Logs a line for each operation that torch now serves."""
    if base.device.type != "cuda" or not has_triton():
        return
    from lora_kernels.triton_common.compile_ahead import compile_ahead

    launch_all = partial(launch_covering, base, limits, block_size=block_size)
    compiled = compile_ahead(launch_all)
    report_progress(f"compiled {compiled.text}")
    off = turn_off_uncompiled(compiled.failures)
    began_s = time.perf_counter()
    off += with_failing_ops_off(launch_all)
    torch.cuda.synchronize(base.device)
    report_progress(f"launched every kernel in {time.perf_counter() - began_s:.1f} s")
    torch.cuda.empty_cache()
    for line in off:
        _log.warning("%s", line)


@torch.inference_mode()
def launch_covering(base: BaseModel, limits: StepLimits, *, block_size: int) -> None:
    """Run every covering step once, over a small cache and adapters that touch nothing."""
    cache = KVCache.allocate(base, num_blocks=NUM_BLOCKS, block_size=block_size)
    arena = torch.zeros(64, dtype=base.dtype, device=base.device)
    table = empty_table(base.description, arena, max(1, limits.max_rows))
    runner = ModelRunner(base, cache, table, Sampler())
    for batch in covering_batches(runner, limits):
        runner.forward(batch)
