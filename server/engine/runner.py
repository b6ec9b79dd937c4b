"""Runs one batch through the model and chooses its tokens. Knows tensors; knows no queues, text or HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lora_kernels.lora_batch import LoraTable
from server.engine.base_model import BaseModel
from server.engine.batch import Batch, PromptSpan
from server.engine.cuda_graphs import DecodeGraphs
from server.engine.kv_cache import KVCache
from server.engine.request import Request, TokenLogprob
from server.engine.sampler import Sampler
from server.engine.schedule import Schedule


@dataclass(slots=True)
class StepOutput:
    """What one forward gave. tokens and logprobs by request id; prompt_logprobs: the chunk's entries by request id.

    non_finite: requests whose logits held NaN or infinity; their token is not to be used.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    non_finite: list[Request] = field(default_factory=list)

    def merge(self, other: StepOutput) -> None:
        self.tokens |= other.tokens
        self.logprobs |= other.logprobs
        self.prompt_logprobs |= other.prompt_logprobs
        self.non_finite += other.non_finite


class ModelRunner:
    """Owns the model, the KV cache's tensors, the adapter table and the sampler."""

    def __init__(self, base: BaseModel, cache: KVCache, table: LoraTable, sampler: Sampler) -> None:
        self.base = base
        self.cache = cache
        self.table = table
        self.sampler = sampler
        self.graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> StepOutput:
        """One packed forward, then one token for every row that samples."""
        output = StepOutput()
        if self.graphs is not None and self.graphs.takes(schedule):
            self._sample(self.graphs.run(schedule.rows), [row.request for row in schedule.rows], output)
            return output
        batch = Batch.build(schedule, block_size=self.cache.block_size, table=self.table, device=self.base.device)
        logits_RV = self.forward(batch)
        for span in batch.prompt_spans:
            rows = logits_RV[span.first_row : span.first_row + len(span.targets)]
            self._add_prompt_logprobs(rows, span, output)
        if batch.sampling:
            wanted_RV = logits_RV if len(batch.sampling) == len(logits_RV) else logits_RV[batch.sampling_rows]
            self._sample(wanted_RV, batch.sampling, output)
        return output

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits of the batch's wanted rows, [R, vocabulary], in the model's dtype."""
        lora = self.base.lora
        lora.layers, lora.head = batch.layer_adapters, batch.head_adapters
        result = self.base.model(
            input_ids=batch.input_ids_1T,
            position_ids=batch.position_ids_1T,
            use_cache=False,
            logits_to_keep=batch.logits_rows_R,
            paged_batch=batch.paged,
            kv_caches=self.cache.layers,
        )
        logits: torch.Tensor = result.logits[0]
        return logits

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Wipe blocks whose numbers are not to be trusted."""
        if block_ids:
            self.cache.zero_blocks(block_ids)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self.sampler.forget(request_id)
        if self.graphs is not None:
            self.graphs.forget(request_id)

    def _add_prompt_logprobs(self, logits_TV: torch.Tensor, span: PromptSpan, output: StepOutput) -> None:
        logprobs = self.sampler.prompt_logprobs(logits_TV, span.targets, span.request.params.prompt_logprobs or 0)
        if any(math.isnan(entry.logprob) for entry in logprobs):
            output.non_finite.append(span.request)
        output.prompt_logprobs[span.request.id] = logprobs

    def _sample(self, logits_RV: torch.Tensor, requests: Sequence[Request], output: StepOutput) -> None:
        sampled = self.sampler.sample(logits_RV, requests)
        for index, request in enumerate(requests):
            if sampled.non_finite[index]:
                if request not in output.non_finite:
                    output.non_finite.append(request)
                continue
            output.tokens[request.id] = sampled.token_ids[index]
            logprob = sampled.logprobs[index]
            if logprob is not None:
                output.logprobs[request.id] = logprob
