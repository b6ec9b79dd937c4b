"""The start on a GPU: compiles and tests every kernel there, measures a step, records decode steps.

Decides whether decode steps are recorded. On a CPU it does nothing. A kernel that does not compile or launch turns its
operation off: torch serves it, slower, and the log says so.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import UnsupportedBase
from lora_kernels.captured import decode_tokens_per_tile
from lora_kernels.nf4.launcher import NF4_MAX_ROWS
from lora_kernels.self_test import check_before_use, turn_off_uncompiled, with_failing_ops_off
from lora_kernels.triton_common.available import has_triton
from server.engine.model.adapter_copier import empty_table
from server.engine.model.base_model import BaseModel
from server.engine.model.kv_tensors import KVCache
from server.engine.model.recorded.cuda_graphs import CudaCapture, DecodeGraphs, GraphSettings, why_no_graphs
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.model.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.schedule import CPU_STEP, StepSize
from server.engine.startup.covering_steps import StepLimits, largest_batches, launch_covering
from server.engine.startup.memory_plan import Reserved, free_device_bytes
from server.engine.startup.settings import MIB, EngineSettings

MAX_RANK = 256
ATTENTION = re.compile(r"\.(self_attn|attn|attention)\.")
GPU_STEP, LARGE_GPU_STEP = StepSize(2048, 64), StepSize(8192, 256)
LARGE_GPU_BYTES = 64 << 30
# Of steps with prompt chunks: the device computes more tokens in no less time than the host launches them in
RECORDED_TOKENS, LARGE_GPU_RECORDED_TOKENS = 256, 640
MAX_PROMPT_KEYS = 1 << 17  # an H200 reads them in about 5 ms from L2, by count; a plain step costs the host 18 and more
MAX_STEP_TOKENS = 65_535  # CUDA's limit of a grid's second axis, on which kernels have rows
LOGIT_BYTES = 4
SAMPLING_BYTES_PER_LOGIT = 4 * LOGIT_BYTES  # the logits, and three copies while they are filtered
GRAPH_BYTES = 2 * MIB  # one recording's launches
GRAPHS_BYTES = 64 * MIB  # once, for the driver

_log = logging.getLogger(__name__)
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GpuStart:
    """The result of `prepare`. graphs None: decode steps are launched plainly."""

    reserved: Reserved = field(default_factory=Reserved)
    graphs: GraphSettings | None = None


def prepare(base: BaseModel, settings: EngineSettings, *, max_context: int, report_progress: Report) -> GpuStart:
    """Test, compile and measure, on a GPU."""
    if base.device.type != "cuda":
        return GpuStart()
    max_tokens, max_rows = settings.scheduler.tokens_per_step, settings.scheduler.running_slots
    report_progress("compiling every kernel that a step can need")
    check_before_use(base.device, base.dtype)
    limit, most_tokens = max_rows, min(max_tokens, recorded_tokens(base.device))
    if base.quantized:
        limit, most_tokens = min(limit, NF4_MAX_ROWS), min(most_tokens, NF4_MAX_ROWS)
    every = GraphSettings.for_rows(
        limit,
        max_rank=MAX_RANK,
        module_sets=attention_modules(base.description),
        max_tokens=most_tokens,
        max_prompt_keys=MAX_PROMPT_KEYS,
        with_special=True,
    )
    could = settings.cuda_graphs and why_no_graphs(base.config, base.device) is None
    limits = StepLimits(
        max_tokens=max_tokens, max_rows=max_rows, max_context=max_context, graphs=every if could else None
    )
    compile_kernels(base, limits, block_size=settings.block_size, report_progress=report_progress)
    reason = why_no_graphs(base.config, base.device) if settings.cuda_graphs else "turned off"
    if reason is not None:
        _log.warning("no CUDA graphs: %s", reason)
    elif limit < max_rows:
        message = (
            "--max-running %d: of an NF4 base, steps of more than %d rows are not recorded, and several times slower"
        )
        _log.warning(message, max_rows, limit)
    graphs = every if reason is None else None
    report_progress("measuring the largest step")
    reserved = profile_run(
        base, num_tokens=max_tokens, num_rows=max_rows, block_size=settings.block_size, graphs=graphs
    )
    return GpuStart(reserved=reserved, graphs=graphs)


def compile_kernels(base: BaseModel, limits: StepLimits, *, block_size: int, report_progress: Report) -> None:
    """With Triton; without it nothing. Logs a line for each operation that torch now serves."""
    if not has_triton():
        _log.warning("Triton is not installed: torch serves, slower; pip install 'multilora[gpu]'")
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


def profile_run(
    base: BaseModel, *, num_tokens: int, num_rows: int, block_size: int, graphs: GraphSettings | None = None
) -> Reserved:
    """Run steps of num_tokens tokens, num_rows of which get logits: without adapters, and with each compiled rank.

    Measuring needs a GPU; on a CPU the steps run too and nothing is reserved.
    """
    num_blocks = -(-num_tokens // block_size) + 1
    cache = KVCache.allocate(base, num_blocks=num_blocks, block_size=block_size)
    table = empty_table(base.description, torch.zeros(64, dtype=base.dtype, device=base.device), 1)
    runner = ModelRunner(base, cache, table, Sampler())
    before = _start_measuring(base.device)
    with torch.inference_mode():
        for batch in largest_batches(runner, num_tokens):
            runner.forward(batch)
    if before is None:
        return Reserved()
    forward_bytes = torch.cuda.max_memory_allocated(base.device) - before
    num_logits = num_rows * int(base.config.vocab_size)
    del runner, cache
    torch.cuda.empty_cache()
    step_bytes = forward_bytes + num_logits * SAMPLING_BYTES_PER_LOGIT
    if graphs is None:
        return Reserved(step_bytes)
    recorded = graphs.buckets[-1]
    return Reserved(
        step_bytes,
        graph_bytes(
            num_graphs=graphs.num_recordings,
            forward_bytes=forward_bytes * recorded // num_tokens,
            logits_bytes=recorded * int(base.config.vocab_size) * LOGIT_BYTES,
        ),
    )


def graph_bytes(*, num_graphs: int, forward_bytes: int, logits_bytes: int) -> int:
    """All recordings together, at most: launches, the largest one's activations, which the others reuse, and its logits
    twice, as the head leaves them and where every recording writes its own."""
    if num_graphs == 0:
        return 0
    return GRAPHS_BYTES + num_graphs * GRAPH_BYTES + forward_bytes + 2 * logits_bytes


def _start_measuring(device: torch.device) -> int | None:
    """Bytes in use now; None if the device keeps no count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def default_step(device: torch.device) -> StepSize:
    """The largest step if the operator names none. A plain step costs the host as much as a large GPU computes in
    about 1,000 tokens, so smaller steps leave it idle; a larger step lets running requests wait longer."""
    if device.type != "cuda":
        return CPU_STEP
    return LARGE_GPU_STEP if _is_large(device) else GPU_STEP


def recorded_tokens(device: torch.device) -> int:
    """Of the largest step with prompt chunks that is worth a recording."""
    return LARGE_GPU_RECORDED_TOKENS if _is_large(device) else RECORDED_TOKENS


def _is_large(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU_BYTES


def check_step_size(device: torch.device, max_tokens: int) -> None:
    """Raises UnsupportedBase if a step of max_tokens tokens cannot be launched on the device."""
    if device.type == "cuda" and max_tokens > MAX_STEP_TOKENS:
        raise UnsupportedBase(f"--max-batch-tokens must be at most {MAX_STEP_TOKENS:,} on a GPU, got {max_tokens:,}")


def attention_modules(base: BaseDescription) -> tuple[frozenset[int], ...]:
    """Rows of the adapter table: of q/k/v, then of all of attention. Most adapters touch no others, or all."""
    groups = [paths for paths in base.groups if ATTENTION.search(paths[0])]  # q/k/v and the output, layer by layer
    return tuple(frozenset(base.module_index[path] for path in chain(*chosen)) for chosen in (groups[::2], groups))


def record_graphs(start: GpuStart, runner: ModelRunner, *, max_context: int, report_progress: Report) -> None:
    """Give the runner its recordings, if they can be made."""
    if start.graphs is None:
        return
    report_progress(f"recording {start.graphs.num_recordings} CUDA graphs")
    buffers = DecodeBuffers(
        runner.table,
        max_rows=start.graphs.buckets[-1],
        max_context=max_context,
        block_size=runner.cache.block_size,
        tokens_per_tile=_tokens_per_tile(runner.base),
    )
    graphs = DecodeGraphs(buffers, runner.forward, CudaCapture(runner.base.device), start.graphs)
    before = free_device_bytes(runner.base.device)
    graphs.record_all()
    torch.cuda.synchronize(runner.base.device)
    taken = max(0, before - free_device_bytes(runner.base.device))
    if taken > start.reserved.graph_bytes:
        _log.warning(
            "CUDA graphs take %d MiB, but %d MiB were kept free", taken // MIB, start.reserved.graph_bytes // MIB
        )
    report_progress(f"{graphs.num_recorded} CUDA graphs take {taken // MIB} MiB")
    runner.graphs = graphs


def _tokens_per_tile(base: BaseModel) -> int:
    group = int(base.config.num_attention_heads) // base.num_kv_heads
    return decode_tokens_per_tile(base.device, head_dim=base.head_dim, group=group, num_bytes=base.dtype.itemsize)
