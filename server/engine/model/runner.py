"""Runs one batch through the model and samples its tokens. Knows tensors; knows no queues, text or HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from lora_kernels.lora.batch import LoraTable
from lora_kernels.transfer import to_device
from server.engine.model.base_model import BaseModel
from server.engine.model.batch import Batch, PromptSpan
from server.engine.model.forward import Completed, InFlight, PendingForward, Pooler, StepOutput, hidden_states
from server.engine.model.kv_tensors import KVCache
from server.engine.model.other_ranks import OtherRanks
from server.engine.model.recorded.cpu_forwards import CpuForwards
from server.engine.model.recorded.cuda_graphs import DecodeGraphs
from server.engine.model.recorded.decode_buffers import DeviceTokens
from server.engine.sampling.sampler import Sampler
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.text.vocabulary import Vocabulary


class ModelRunner:
    """Owns the model, the KV cache's tensors, the adapter table and the sampler.

    vocabulary: the ids that may be sampled and scored; None: every row of the head. others: they run each forward too.
    """

    def __init__(
        self,
        base: BaseModel,
        cache: KVCache,
        table: LoraTable,
        sampler: Sampler,
        vocabulary: Vocabulary | None = None,
        *,
        others: OtherRanks | None = None,
    ) -> None:
        self.base = base
        self._vocabulary = vocabulary
        self._others = others
        self.cache = cache
        self.table = table
        self.sampler = sampler
        self._pooler = Pooler()
        self.graphs: DecodeGraphs | None = None
        self.cpu_forwards: CpuForwards | None = None
        self.overlaps = True  # recorded steps may be launched before the last one is read

    def replay_on_cpu(self) -> None:
        """Record small forwards when they come again; on a GPU nothing."""
        if self.base.device.type == "cpu":
            caches = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
            self.cpu_forwards = CpuForwards(self.forward, self.base, caches)

    @torch.inference_mode()
    def launch(self, schedule: Schedule) -> PendingForward:
        """One packed forward, then one token for every row that samples. Does not wait for a recorded step."""
        if self.graphs is None or not self.graphs.takes(schedule):
            return Completed(self.run(schedule))
        logits_TW, sampled = self.graphs.run(schedule.rows), [row for row in schedule.rows if row.samples]
        if len(sampled) == len(logits_TW):
            return self._sample(logits_TW, sampled)
        lasts = np.cumsum([row.num_tokens for row in schedule.rows]) - 1
        wanted_R = torch.from_numpy(lasts[[row.samples for row in schedule.rows]])
        return self._sample(logits_TW.index_select(0, to_device(wanted_R, logits_TW.device)), sampled)

    @torch.inference_mode()
    def launch_after(self, pending: PendingForward, schedule: Schedule) -> PendingForward | None:
        """The decode step after a pending one, from the tokens on the device. None: it cannot be launched yet.

        All launches are queued on one stream. So a step has finished with its inputs, logits, adapters and blocks
        before a later launch touches them, even those of requests that ended meanwhile.
        """
        if self.graphs is None or not isinstance(pending, InFlight) or not self.graphs.has_room(schedule.rows):
            return None
        sources = [pending.row_of[row.request.id] for row in schedule.rows]
        logits_RW = self.graphs.run(schedule.rows, DeviceTokens(pending.sampling.tokens_R, sources))
        return self._sample(logits_RW, schedule.rows, num_unknown=1)

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> StepOutput:
        """The same in plain launches; waits for the result."""
        output, batch = StepOutput(), self.batch_of(schedule)
        samples = batch.samples
        self.sampler.prepare(samples.requests)
        logits_RV = self._served(self._forward_pooled(schedule, batch, output))
        for span in samples.prompt_spans:
            rows = logits_RV[span.first_row : span.first_row + len(span.targets)]
            self._add_prompt_logprobs(rows, span, output)
        if samples.requests:
            wanted_RV = logits_RV if len(samples.requests) == len(logits_RV) else logits_RV[samples.rows]
            sampled = self.sampler.sample(wanted_RV, samples.requests, samples.offsets)
            drafts = {row.request.id: row.draft for row in schedule.rows if row.draft}
            for index, (request, offset) in enumerate(zip(samples.requests, samples.offsets, strict=True)):
                if offset == 0:
                    output.add(request, sampled, index, drafts.get(request.id, ()))
        return output

    def batch_of(self, schedule: Schedule) -> Batch:
        return Batch.build(schedule, block_size=self.cache.block_size, table=self.table, device=self.base.device)

    def _forward_pooled(self, schedule: Schedule, batch: Batch, output: StepOutput) -> torch.Tensor:
        if all(row.request.params.pooling is None for row in schedule.rows):
            return self.forward(batch) if self.cpu_forwards is None else self.cpu_forwards(batch)
        with hidden_states(self.base.model) as kept:
            logits_RW = self.forward(batch)
        self._pooler.add(schedule.rows, kept[0][0], output)
        return logits_RW

    def forward(self, batch: Batch) -> torch.Tensor:
        """The model's own logits of the batch's R rows, [R, width of the head], in float32."""
        lora = self.base.lora
        lora.layers, lora.head = batch.layer_adapters, batch.head_adapters
        if self.base.rope is not None:
            self.base.rope.last_positions_1T = batch.last_positions_1T
        with nullcontext() if self._others is None else self._others.forward(batch):
            result = self.base.model(
                input_ids=batch.input_ids_1T,
                position_ids=batch.position_ids_1T,
                use_cache=False,
                logits_to_keep=0 if batch.logits_rows_R is None else batch.logits_rows_R,
                paged_batch=batch.paged,
                kv_caches=self.cache.layers,
            )
        logits: torch.Tensor = result.logits[0]
        return logits

    def _served(self, logits_RW: torch.Tensor) -> torch.Tensor:
        return logits_RW if self._vocabulary is None else self._vocabulary.served_logits(logits_RW)

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Wipe blocks that may hold non-finite values."""
        if not block_ids:
            return
        if self._others is not None:
            self._others.zero_blocks(block_ids)
        self.cache.zero_blocks(block_ids)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self.sampler.forget(request_id)
        self._pooler.forget(request_id)
        if self.graphs is not None:
            self.graphs.forget(request_id)

    def _add_prompt_logprobs(self, logits_TV: torch.Tensor, span: PromptSpan, output: StepOutput) -> None:
        logprobs = self.sampler.prompt_logprobs(logits_TV, span.targets, span.request.params.prompt_logprobs or 0)
        if any(math.isnan(entry.logprob) for entry in logprobs):
            output.non_finite.append(span.request)
        output.prompt_logprobs[span.request.id] = logprobs

    def _sample(self, logits_RW: torch.Tensor, rows: Sequence[ScheduledRow], *, num_unknown: int = 0) -> InFlight:
        requests = [row.request for row in rows]
        sampling = self.sampler.launch(self._served(logits_RW), requests, num_unknown=num_unknown)
        row_of = {request.id: index for index, request in enumerate(requests)}
        return InFlight(row_of, sampling, self.overlaps and sampling.may_be_followed, self.sampler.resample)
