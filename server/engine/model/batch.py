"""Turns a schedule into the arrays that one forward reads. Knows tokens, blocks and slots; decides nothing.

Legend: T tokens of the step, R rows with logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.attention.batch import PagedBatch
from lora_kernels.lora.batch import NO_ADAPTER, LoraBatch, LoraTable
from lora_kernels.transfer import to_device
from server.engine.request import Request
from server.engine.schedule import Schedule, ScheduledRow


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A prompt chunk that needs all its logits: rows first_row.. of the logits predict positions start+1.. ."""

    request: Request
    first_row: int
    start: int
    num_tokens: int

    @property
    def targets(self) -> list[int]:
        """The prompt tokens that the span's logits predict (the last row of a prompt predicts none of them)."""
        stop = min(self.start + self.num_tokens + 1, len(self.request.prompt_ids))
        return self.request.prompt_ids[self.start + 1 : stop]


@dataclass(frozen=True, slots=True)
class Samples:
    """What is read of a forward's logits. requests[i] takes its token from row rows[i]. A request with a draft is there
    once more for each token of it; offsets[i] tokens of it come before row i."""

    requests: list[Request] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    prompt_spans: list[PromptSpan] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed forward.

    logits_rows_R: the tokens that get logits; None: every token, as they are.
    last_positions_1T: for each token the last position of its whole sequence, even if the chunk ends before it.
    """

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    last_positions_1T: torch.Tensor
    paged: PagedBatch
    layer_adapters: LoraBatch | None
    head_adapters: LoraBatch | None
    logits_rows_R: torch.Tensor | None
    samples: Samples = field(default_factory=Samples)

    @classmethod
    def build(cls, schedule: Schedule, *, block_size: int, table: LoraTable, device: torch.device) -> Batch:
        rows = schedule.rows
        counts = np.fromiter((row.num_tokens for row in rows), dtype=np.int32, count=len(rows))
        query_starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        paged = _paged_batch(rows, counts, query_starts, block_size=block_size, device=device)
        slots_T = token_slots(rows, counts, query_starts)
        token_rows, samples = _samples(rows, query_starts)
        lasts_T = np.repeat(_last_positions(rows), counts)
        positions, lasts = to_device(torch.from_numpy(np.stack([paged.positions_T, lasts_T])).long(), device)
        return cls(
            input_ids_1T=to_device(torch.tensor([input_ids(rows)]), device),
            position_ids_1T=positions[None],
            last_positions_1T=lasts[None],
            paged=paged,
            layer_adapters=_adapters(table, slots_T),
            head_adapters=_adapters(table, slots_T[token_rows]),
            logits_rows_R=to_device(torch.from_numpy(token_rows), device),
            samples=samples,
        )


def token_slots(
    rows: Sequence[ScheduledRow], counts: NDArray[np.int32], query_starts: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Each token's row of the adapter table. Tokens before a request's `active_from` have none."""
    slots = (NO_ADAPTER if row.request.slot is None else row.request.slot for row in rows)
    slots_T = np.repeat(np.fromiter(slots, dtype=np.int32, count=len(rows)), counts)
    inactive = np.fromiter((row.request.active_from - row.start for row in rows), dtype=np.int64, count=len(rows))
    for index in np.flatnonzero(inactive > 0):
        first = query_starts[index]
        slots_T[first : first + min(inactive[index], counts[index])] = NO_ADAPTER
    return slots_T


def _last_positions(rows: list[ScheduledRow]) -> NDArray[np.int32]:
    """The last known position of each row's sequence. A token that is still being sampled counts through its row."""
    ends = (max(row.request.num_tokens, row.start + row.num_tokens) for row in rows)
    return np.fromiter(ends, dtype=np.int32, count=len(rows)) - 1


def input_ids(rows: Sequence[ScheduledRow]) -> list[int]:
    """Of all rows, one after the other. The host must know them."""
    ids: list[int] = []
    for row in rows:
        if row.num_tokens == 1:
            ids.append(row.request.token_at(row.start))
        else:
            ids += row.request.tokens(row.start, row.start + row.num_tokens - len(row.draft))
            ids += row.draft
    return ids


def _adapters(table: LoraTable, row_slots: NDArray[np.int32]) -> LoraBatch | None:
    return LoraBatch(table, row_slots) if bool((row_slots != NO_ADAPTER).any()) else None


def _paged_batch(
    rows: list[ScheduledRow],
    counts: NDArray[np.int32],
    query_starts: NDArray[np.int32],
    *,
    block_size: int,
    device: torch.device,
) -> PagedBatch:
    starts = np.fromiter((row.start for row in rows), dtype=np.int32, count=len(rows))
    sequences_T = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    positions_T = np.arange(query_starts[-1], dtype=np.int32) + np.repeat(starts - query_starts[:-1], counts)
    prompts = np.fromiter((row.start < len(row.request.prompt_ids) for row in rows), dtype=np.bool_, count=len(rows))
    width = max(len(row.request.block_ids) for row in rows)
    block_tables = np.zeros((len(rows), width), dtype=np.int32)
    for index, row in enumerate(rows):
        block_tables[index, : len(row.request.block_ids)] = row.request.block_ids
    blocks_T = block_tables[sequences_T, positions_T // block_size].astype(np.int64)
    return PagedBatch(
        query_starts=query_starts,
        context_lens=starts + counts,
        block_tables=block_tables,
        slot_mapping_T=to_device(torch.from_numpy(blocks_T * block_size + positions_T % block_size), device),
        positions_T=positions_T.astype(np.int32),
        sequences_T=sequences_T,
        block_size=block_size,
        are_prompts=prompts,
    )


def _samples(rows: list[ScheduledRow], query_starts: NDArray[np.int32]) -> tuple[NDArray[np.int64], Samples]:
    """The tokens that need logits, and what is read of those."""
    token_rows: list[int] = []
    samples = Samples()
    for row, first, last in zip(rows, query_starts[:-1].tolist(), query_starts[1:].tolist(), strict=True):
        request = row.request
        if request.params.prompt_logprobs is not None and row.start < len(request.prompt_ids):
            samples.prompt_spans.append(PromptSpan(request, len(token_rows), row.start, row.num_tokens))
            token_rows += range(first, last)
        elif row.samples:
            token_rows += range(last - 1 - len(row.draft), last)
        if row.samples and request.params.max_tokens > 0:
            num_sampled = 1 + len(row.draft)
            samples.requests.extend([request] * num_sampled)
            samples.rows.extend(range(len(token_rows) - num_sampled, len(token_rows)))
            samples.offsets.extend(range(num_sampled))
    return np.array(token_rows, dtype=np.int64), samples
