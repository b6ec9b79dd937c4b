"""Runs the wrapped model on hand-made batches: the runner's forward without scheduler, pools or sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adapters_store.base.description import AdapterDigest
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter
from adapters_store.packed.packing import pack
from lora_kernels.background import TimeSlices
from server.engine.model.adapter_copier import ArenaCopier, empty_table
from server.engine.model.base_model import BaseModel
from server.engine.model.batch import Batch
from server.engine.model.kv_tensors import KVCache
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams
from server.engine.sampling.sampler import Sampler
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.tensor_parallel.leader import Leader

BLOCK_SIZE = 8
BLOCKS_PER_ROW = 32


def pack_folder(folder: Path, base: BaseModel) -> PackedAdapter:
    """A PEFT folder in device layout, checked as an upload is."""
    return pack(plan_folder(folder, base.description), folder / "adapter_model.safetensors", check=True)


class PackedForward:
    """A wrapped base with adapters resident in slots 0.. and a KV cache; one block range per sequence.

    leader: of the ranks that share the base.
    """

    def __init__(
        self,
        base: BaseModel,
        adapters: Sequence[Path | PackedAdapter],
        *,
        num_sequences: int = 16,
        leader: Leader | None = None,
    ) -> None:
        self.base = base
        packed = [each if isinstance(each, PackedAdapter) else pack_folder(each, base) for each in adapters]
        if leader is not None:
            packed = [leader.cut(each, HostBuffers(), TimeSlices()) for each in packed]
        size = sum(adapter.buffer.numel() + 64 for adapter in packed) + 64
        arena = torch.full((size,), torch.nan, dtype=base.dtype)
        self.table = empty_table(base.description, arena, max(len(packed), 1))
        self.cache = KVCache.allocate(base, num_blocks=num_sequences * BLOCKS_PER_ROW, block_size=BLOCK_SIZE)
        for layer in self.cache.layers:  # a recycled block may hold anything
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        if leader is not None:
            leader.allocate(self.cache, self.table)
        self.runner = ModelRunner(base, self.cache, self.table, Sampler(), others=leader)
        copier = ArenaCopier(self.table, base.description, TimeSlices(), others=leader)
        cursor = 32
        for slot, adapter in enumerate(packed):
            copier.start(slot, cursor, adapter)
            cursor += adapter.buffer.numel() + 64
        copier.close()

    def request(self, index: int, tokens: list[int], slot: int | None) -> Request:
        first = index * BLOCKS_PER_ROW
        return Request(
            id=str(index),
            tenant="t",
            prompt_ids=tokens,
            params=SamplingParams(prompt_logprobs=0),
            adapter=None if slot is None else AdapterDigest(f"slot{slot}"),
            slot=slot,
            block_ids=list(range(first, first + BLOCKS_PER_ROW)),
        )

    @torch.inference_mode()
    def logits(self, requests: Sequence[Request], counts: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Logits [tokens, V] of each request's next `counts` tokens (all that remain by default), in one forward."""
        rows = []
        for index, request in enumerate(requests):
            remaining = request.num_tokens - request.num_computed_tokens
            rows.append(ScheduledRow(request, request.num_computed_tokens, counts[index] if counts else remaining))
        rows = [row for row in rows if row.num_tokens]
        out = self.runner.forward(self.batch(rows))
        for row in rows:
            row.request.num_computed_tokens += row.num_tokens
        return list(out.split([row.num_tokens for row in rows]))

    def batch(self, rows: list[ScheduledRow]) -> Batch:
        schedule = Schedule(rows, sum(row.num_tokens for row in rows), 0)
        return Batch.build(schedule, block_size=BLOCK_SIZE, table=self.table, device=self.base.device)
