"""Recorded decode steps where there is no GPU, on the CPU's own kernels: each replay reads what recorded launches would
read, from the memory they would read it from."""

from __future__ import annotations

import numpy as np
import torch

from lora_kernels.attention.batch import PagedBatch
from lora_kernels.captured import CapturedPagedBatch
from lora_kernels.lora.batch import NO_ADAPTER, LoraBatch, LoraTable
from server.engine.model.batch import Batch
from server.engine.model.recorded.cuda_graphs import DecodeGraphs, GraphSettings
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.model.runner import ModelRunner
from support.kernels.eager_capture import EagerCapture


def record_steps(runner: ModelRunner, *, max_rows: int, max_context: int, max_tokens: int = 0) -> EagerCapture:
    """Give the runner recordings, and so the engine forwards that it may launch ahead. Returns what counts replays.

    max_tokens: of steps with prompt chunks that are recorded too; none of a base whose keys are outgrown."""
    max_tokens = 0 if runner.base.rope_switches else max_tokens
    prompts = {"max_tokens": max_tokens, "max_prompt_keys": max_tokens * max_context}
    settings = GraphSettings.for_rows(max_rows, max_rank=256, **prompts)
    buffers = DecodeBuffers(
        runner.table, max_rows=settings.buckets[-1], max_context=max_context, block_size=runner.cache.block_size
    )
    capture = EagerCapture()
    graphs = DecodeGraphs(buffers, _CpuForward(runner), capture, settings)
    graphs.record_all()
    runner.graphs = graphs
    return capture


class _CpuForward:
    """The model's forward over the live tokens of a recorded batch, each a row of its own; padding gets zeros."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def __call__(self, recorded: Batch) -> torch.Tensor:
        paged = recorded.paged
        assert isinstance(paged, CapturedPagedBatch)
        records = paged.tiles.decode.records.numpy()
        live = int((records[:, 2] > 0).sum())
        logits = torch.zeros(len(records), self._runner.base.config.vocab_size, dtype=self._runner.base.dtype)
        if live:
            logits[:live] = self._runner.forward(self._plain(recorded, paged, live))
        return logits

    def _plain(self, recorded: Batch, paged: CapturedPagedBatch, live: int) -> Batch:
        records = paged.tiles.decode.records.numpy()[:live]
        starts, rows = records[:, 3], np.arange(live, dtype=np.int32)
        assert (records[:, 1] == rows).all()
        widths = starts // paged.block_size + 1
        tables = np.zeros((live, int(widths.max())), dtype=np.int32)
        for row, (first, width) in enumerate(zip(records[:, 0], widths, strict=True)):
            tables[row, :width] = paged.tiles.block_tables[first : first + width].numpy()
        adapters = _adapters(self._runner.table, recorded.layer_adapters, live)
        return Batch(
            input_ids_1T=recorded.input_ids_1T[:, :live].long(),
            position_ids_1T=recorded.position_ids_1T[:, :live].long(),
            last_positions_1T=recorded.last_positions_1T[:, :live].long(),
            paged=PagedBatch(
                query_starts=np.arange(live + 1, dtype=np.int32),
                context_lens=starts + 1,
                block_tables=tables,
                slot_mapping_T=paged.slot_mapping_T[:live].long(),
                positions_T=starts.copy(),
                sequences_T=rows,
                block_size=paged.block_size,
            ),
            layer_adapters=adapters,
            head_adapters=adapters,
            logits_rows_R=torch.arange(live),
        )


def _adapters(table: LoraTable, recorded: LoraBatch | None, live: int) -> LoraBatch | None:
    if recorded is None:
        return None
    slots = np.full(live, NO_ADAPTER, dtype=np.int32)
    tiles = recorded.row_tiles
    for slot, first, count in tiles.records.tolist():
        slots[tiles.rows[first : first + count].numpy()] = slot
    return LoraBatch(table, slots) if bool((slots != NO_ADAPTER).any()) else None
