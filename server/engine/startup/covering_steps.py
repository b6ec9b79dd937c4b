"""Steps that together launch every compiled form that a server can need, so that no request waits for a compiler.

Which form a launch takes is decided by tables: rows of a tile, ranks of a pass, whether a context is split. So steps on
both sides of each of the tables' limits are enough; lengths, counts and adapters in between compile nothing
(`tests/server/engine/startup/test_compile_ahead.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lora_kernels.lora.batch import LoraBatch
from lora_kernels.lora.row_tiles import MAX_RANK_BLOCK, MIN_RANK_BLOCK, row_tiles
from lora_kernels.triton_common.tiles import DECODE_ROWS, device_tiles
from server.engine.model.adapter_copier import empty_table
from server.engine.model.base_model import BaseModel
from server.engine.model.batch import Batch
from server.engine.model.kv_tensors import KVCache
from server.engine.model.recorded.cuda_graphs import GraphSettings
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams
from server.engine.sampling.sampler import Sampler
from server.engine.schedule import Schedule, ScheduledRow

NUM_BLOCKS = 4  # block tables repeat them: what is read does not matter
LONG_CONTEXT = 8192  # split wherever a longer one is


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The largest steps of a server. graphs: its recordings, if it makes any."""

    max_tokens: int
    max_rows: int
    max_context: int
    graphs: GraphSettings | None = None


@dataclass(frozen=True, slots=True)
class _Adapters:
    """rank: the largest. special: some are int8 or have DoRA's factors."""

    rank: int
    special: bool = False


NONE = _Adapters(0)


@torch.inference_mode()
def launch_covering(base: BaseModel, limits: StepLimits, *, block_size: int) -> None:
    """Run every covering step once, over a small cache and adapters that touch nothing."""
    cache = KVCache.allocate(base, num_blocks=NUM_BLOCKS, block_size=block_size)
    arena = torch.zeros(64, dtype=base.dtype, device=base.device)
    table = empty_table(base.description, arena, max(1, limits.max_rows))
    runner = ModelRunner(base, cache, table, Sampler())
    for batch in covering_batches(runner, limits):
        runner.forward(batch)


def covering_batches(runner: ModelRunner, limits: StepLimits) -> Iterator[Batch]:
    """Over the runner's cache and table; the table needs a slot for each of max_rows rows, none of which touches a
    module. The first is the largest step."""
    yield from _plain(runner, limits)
    if limits.graphs is not None:
        yield from _recorded(runner, limits, limits.graphs)


def largest_batches(runner: ModelRunner, max_tokens: int) -> Iterator[Batch]:
    """Steps of max_tokens tokens, one row of them a decode: without adapters, and with each compiled rank."""
    for adapters in _adapters():
        yield _one_and_a_prompt(runner, max_tokens, adapters)


def _plain(runner: ModelRunner, limits: StepLimits) -> Iterator[Batch]:
    largest, edge = limits.max_tokens, min(DECODE_ROWS + 1, limits.max_tokens)
    rows = min(limits.max_rows, limits.max_tokens)
    yield from largest_batches(runner, largest)
    for adapters in _adapters():
        yield _prompt(runner, edge, edge, adapters)  # all its rows get logits: the head's adapters meet large tiles
        for count in dict.fromkeys((1, min(edge, rows), rows)):
            yield _decodes(runner, count, 1, adapters)
            yield _decodes(runner, count, 1, adapters, distinct=True)
    context = min(limits.max_context, LONG_CONTEXT)
    for tokens in dict.fromkeys((edge, min(largest, context))):
        yield _prompt(runner, tokens, max(tokens, context), NONE)
    for count in dict.fromkeys((1, rows)):
        yield _decodes(runner, count, context, NONE)
    for tokens in _edges(runner, largest):
        yield _prompt(runner, tokens, tokens, NONE)


def _recorded(runner: ModelRunner, limits: StepLimits, graphs: GraphSettings) -> Iterator[Batch]:
    last = graphs.buckets[-1]
    buffers = DecodeBuffers(
        runner.table, max_rows=last, max_context=limits.max_context, block_size=runner.cache.block_size
    )
    counts = {graphs.buckets[0], last, *_edges(runner, last)}
    for bucket in sorted(counts):
        for rank in graphs.max_ranks:
            yield buffers.step(bucket, rank)
            if graphs.with_special and rank:
                yield buffers.step(bucket, rank, special=True)


def _edges(runner: ModelRunner, most: int) -> list[int]:
    """Numbers of rows on both sides of each limit of the tiles."""
    limits = [tile.block_m for tile in device_tiles(runner.base.device).tiles.nf4]
    return sorted({rows for limit in limits for rows in (limit, limit + 1) if rows <= most})


def _adapters() -> list[_Adapters]:
    ranks = (MIN_RANK_BLOCK, 32, MAX_RANK_BLOCK)
    return [NONE, *(_Adapters(rank, special) for special in (False, True) for rank in ranks)]


def _one_and_a_prompt(runner: ModelRunner, num_tokens: int, adapters: _Adapters) -> Batch:
    """One request decodes one token, another's prompt takes all others."""
    rows = [_row(runner, 1, 1)]
    if num_tokens > 1:
        rows.append(_row(runner, num_tokens - 1, num_tokens, first_block=1))
    return _batch(runner, rows, adapters)


def _prompt(runner: ModelRunner, num_tokens: int, context: int, adapters: _Adapters) -> Batch:
    """The last tokens of a prompt, with logits for each unless they are many."""
    wants_all = num_tokens == DECODE_ROWS + 1
    return _batch(runner, [_row(runner, num_tokens, context, logprobs=wants_all)], adapters)


def _decodes(runner: ModelRunner, count: int, context: int, adapters: _Adapters, *, distinct: bool = False) -> Batch:
    """Rows of one token, on one adapter or each on its own."""
    return _batch(runner, [_row(runner, 1, context) for _ in range(count)], adapters, distinct=distinct)


def _row(
    runner: ModelRunner, num_tokens: int, context: int, *, first_block: int = 0, logprobs: bool = False
) -> ScheduledRow:
    """The last num_tokens of a prompt of `context`. Its blocks repeat, because the cache here holds one step only."""
    needed = -(-context // runner.cache.block_size)
    blocks = [(first_block + index) % runner.cache.num_blocks for index in range(needed)]
    params = SamplingParams(prompt_logprobs=0 if logprobs else None)
    request = Request("covering", "start", [0] * context, params, block_ids=blocks)
    return ScheduledRow(request, context - num_tokens, num_tokens)


def _batch(runner: ModelRunner, rows: Sequence[ScheduledRow], adapters: _Adapters, *, distinct: bool = False) -> Batch:
    schedule = Schedule(list(rows), sum(row.num_tokens for row in rows), 0)
    batch = runner.batch_of(schedule)
    if adapters is NONE:
        return batch
    assert batch.logits_rows_R is not None, "a plain step names them"
    counts = (batch.input_ids_1T.shape[1], len(batch.logits_rows_R))
    layers, head = (_claiming(runner, count, adapters, distinct=distinct) for count in counts)
    return replace(batch, layer_adapters=layers, head_adapters=head)


def _claiming(runner: ModelRunner, num_rows: int, claimed: _Adapters, *, distinct: bool) -> LoraBatch:
    """Rows on slots that claim to be so, but touch no module in the table: kernels are compiled and return."""
    slots = np.arange(num_rows, dtype=np.int32) if distinct else np.zeros(num_rows, dtype=np.int32)
    adapters = LoraBatch(runner.table, slots)
    segments = (adapters.slots, adapters.starts, adapters.rows)
    adapters.row_tiles = row_tiles(*segments, max_rank=claimed.rank, device=runner.table.arena.device)
    adapters.touched_modules = np.ones(len(runner.table.ranks), dtype=np.bool_)
    adapters.has_int8, adapters.scaled_modules = claimed.special, None
    return adapters
