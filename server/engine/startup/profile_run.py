"""The profile run: runs steps of the largest size before serving and measures their memory.

Knows the model and its device; divides no memory.
"""

from __future__ import annotations

import torch

from server.engine.model.adapter_copier import empty_table
from server.engine.model.base_model import BaseModel
from server.engine.model.kv_tensors import KVCache
from server.engine.model.recorded.cuda_graphs import GraphSettings
from server.engine.model.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.startup.covering_steps import largest_batches
from server.engine.startup.memory_plan import MIB, Reserved

LOGIT_BYTES = 4
SAMPLING_BYTES_PER_LOGIT = 4 * LOGIT_BYTES  # the logits, and three copies while they are filtered
GRAPH_BYTES = 2 * MIB  # one recording's launches
GRAPHS_BYTES = 64 * MIB  # once, for the driver


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
