"""The inputs of a step in memory that never moves, so that recorded launches can read them. Knows tokens, blocks and
slots; records nothing.

One packed int32 array on the host is filled and copied to the device at once. Tokens beyond the step's own are padding:
no key or value is stored, attention and adapters do nothing. The input tokens come from the host. If the step is
launched before the last step's tokens are known, they come from that step's result on the device.

Legend: T tokens of the step, R rows: requests, each with one token or a prompt chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.attention.query_tiles import RECORD as ATTENTION_RECORD
from lora_kernels.attention.query_tiles import query_records
from lora_kernels.captured import captured_lora_batch, captured_paged_batch, captured_scratch_elements
from lora_kernels.lora.batch import LoraBatch, LoraTable
from lora_kernels.lora.row_tiles import RECORD as LORA_RECORD
from lora_kernels.lora.row_tiles import tile_records
from lora_kernels.triton_common.tiles import DECODE_ROWS
from server.engine.model.batch import Batch, input_ids, token_slots
from server.engine.schedule import ScheduledRow

ALIGN_ELEMENTS = 4  # 16 bytes: kernels are compiled for sections aligned to that
PADDING_SLOT = -1


@dataclass(slots=True)
class _KnownTable:
    """A request's block table. The scheduler only appends to the list, or replaces it."""

    block_ids: list[int]
    array: NDArray[np.int32]


class DeviceTokens(NamedTuple):
    """Input ids that the host does not know: row r's is tokens_R[sources[r]], int64. A negative id means no token, and
    the row's result is discarded."""

    tokens_R: torch.Tensor
    sources: Sequence[int]


class DecodeBuffers:
    """max_rows tokens, of sequences of at most max_context. Owned by one thread.

    tokens_per_tile: neighbouring tokens of a prompt that share a tile of attention.
    """

    def __init__(
        self, table: LoraTable, *, max_rows: int, max_context: int, block_size: int, tokens_per_tile: int = 1
    ) -> None:
        self.table = table
        self.tokens_per_tile = tokens_per_tile
        self.max_rows = max_rows
        self.max_context = max_context
        self.block_size = block_size
        self.max_blocks = -(-max_context // block_size)
        device = table.arena.device
        widths = {
            "ids": 1,
            "sources": 1,
            "positions": 1,
            "slots": 1,
            "attention": ATTENTION_RECORD,
            "lora": LORA_RECORD,
            "rows": 1,
        }
        sizes = {name: _aligned(width * max_rows) for name, width in widths.items()}
        sizes["tables"] = max_rows * self.max_blocks
        total = sum(sizes.values())
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._fixed = total - sizes["tables"]
        self._host_parts = dict(
            zip(sizes, (part.numpy() for part in self._host.split(list(sizes.values()))), strict=True)
        )
        self._device_parts = dict(zip(sizes, self._device.split(list(sizes.values())), strict=True))
        self._scratch = torch.empty(0, dtype=torch.float32, device=device)
        self._known: dict[str, _KnownTable] = {}
        self._copied: torch.cuda.Event | None = None
        self.clear()

    def clear(self) -> None:
        """Only padding."""
        self._pad(0, self.max_rows)
        self._copy(0)

    def fill(self, rows: Sequence[ScheduledRow], bucket: int, tokens: DeviceTokens | None = None) -> None:
        """Start copying this step's tokens, padded to bucket, to the device. tokens None: the host knows them.
        Otherwise each row has one token."""
        self._wait_for_copy()
        parts = self._host_parts
        counts_R = np.fromiter((row.num_tokens for row in rows), np.int32, len(rows))
        starts_R = np.fromiter((row.start for row in rows), np.int32, len(rows))
        bounds = np.concatenate(([0], np.cumsum(counts_R))).astype(np.int32)
        count = int(bounds[-1])
        if tokens is None:
            parts["ids"][:count] = input_ids(rows)
        else:
            parts["sources"][:count] = tokens.sources
        tables = [self._table_of(row) for row in rows]
        ends = np.cumsum([len(table) for table in tables])
        table_starts = np.concatenate(([0], ends[:-1]))
        packed = parts["tables"][: int(ends[-1])]
        np.concatenate(tables, out=packed)
        if count == len(rows):  # the same in fewer steps: the host does this for every decode
            positions_T, starts_T = starts_R, table_starts
            records = np.column_stack([table_starts, bounds[:-1], counts_R, starts_R])
        else:
            positions_T = np.arange(count, dtype=np.int32) + np.repeat(starts_R - bounds[:-1], counts_R)
            starts_T, every = np.repeat(table_starts, counts_R), np.ones(len(rows), dtype=np.bool_)
            records = query_records(bounds, starts_R + counts_R, table_starts, every, self.tokens_per_tile)
        parts["positions"][:count] = positions_T
        blocks_T = packed[starts_T + positions_T // self.block_size]
        parts["slots"][:count] = blocks_T * self.block_size + positions_T % self.block_size
        self._pad(count, bucket)
        _write(parts["attention"][: bucket * ATTENTION_RECORD], records)
        self._fill_adapters(token_slots(rows, counts_R, bounds), bucket)
        self._copy(len(packed))
        if tokens is not None:
            ids = tokens.tokens_R.index_select(0, self._device_parts["sources"][:count]).clamp_(min=0)
            self._device_parts["ids"][:count].copy_(ids)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._known.pop(request_id, None)

    def max_rank(self, rows: Sequence[ScheduledRow]) -> int:
        """The largest rank of the step's adapters; 0: no row has one."""
        return max((int(self.table.max_ranks[slot]) for slot in _slots(rows)), default=0)

    def need_plain_launches(self, rows: Sequence[ScheduledRow]) -> bool:
        """Whether an adapter of the step has its own embedding or head, or changes experts: no recorded launch reads
        those. Which rows an expert gets is known while the step runs."""
        return any(self.table.token_rows[slot] or self.table.has_experts[slot] for slot in _slots(rows))

    def are_special(self, rows: Sequence[ScheduledRow]) -> bool:
        """Whether an adapter of the step is int8 or has DoRA's factors."""
        return any(self.table.int8[slot] or self.table.has_factors[slot] for slot in _slots(rows))

    def touched_modules(self, rows: Sequence[ScheduledRow]) -> NDArray[np.bool_]:
        """For each module of the adapter table before experts, whether an adapter of the step touches it."""
        return self.table.touched_by(list(_slots(rows)))

    def step(
        self, bucket: int, max_rank: int, modules: frozenset[int] | None = None, *, special: bool = False
    ) -> Batch:
        """A batch of `bucket` tokens over this memory. max_rank: of its adapters; 0: none. modules: the rows of the
        table that they may touch; None: all. special: they may be int8 or have DoRA's factors.

        Launches that are recorded with it read no memory but the batch's, so it must live as long as they are replayed.
        """
        parts = self._device_parts
        attention = parts["attention"][: bucket * ATTENTION_RECORD].view(bucket, ATTENTION_RECORD)
        paged = captured_paged_batch(
            parts["slots"][:bucket],
            attention,
            parts["tables"],
            block_size=self.block_size,
            max_context=self.max_context,
            tokens_per_tile=self.tokens_per_tile,
        )
        records, rows = parts["lora"][: bucket * LORA_RECORD].view(bucket, LORA_RECORD), parts["rows"][:bucket]
        adapters = None
        if max_rank:
            scratch = self._scratch_for(max_rank)
            adapters = captured_lora_batch(
                self.table, records, rows, max_rank=max_rank, scratch=scratch, modules=modules, special=special
            )
        return Batch(
            input_ids_1T=parts["ids"][None, :bucket],
            position_ids_1T=parts["positions"][None, :bucket],
            last_positions_1T=parts["positions"][None, :bucket],  # right for one token a row: see max_prompt_keys
            paged=paged,
            layer_adapters=adapters,
            head_adapters=adapters,
            logits_rows_R=None,
        )

    def _scratch_for(self, max_rank: int) -> torch.Tensor:
        """One for all steps, if the largest rank comes first."""
        device = self._device.device
        wanted = captured_scratch_elements(device, max_rows=self.max_rows, max_rank=max_rank)
        if wanted > len(self._scratch):
            self._scratch = torch.empty(wanted, dtype=torch.float32, device=device)
        return self._scratch

    def _table_of(self, row: ScheduledRow) -> NDArray[np.int32]:
        request = row.request
        known = self._known.get(request.id)
        if known is None or known.block_ids is not request.block_ids:
            known = self._known[request.id] = _KnownTable(request.block_ids, np.empty(0, dtype=np.int32))
        if len(known.array) < len(request.block_ids):
            added = np.array(request.block_ids[len(known.array) :], dtype=np.int32)
            known.array = np.concatenate([known.array, added])
        return known.array

    def _fill_adapters(self, slots_T: NDArray[np.int32], bucket: int) -> None:
        batch = LoraBatch(self.table, slots_T)
        records = tile_records(batch.slots, batch.starts, np.diff(batch.starts), DECODE_ROWS)
        _write(self._host_parts["lora"][: bucket * LORA_RECORD], records)
        self._host_parts["rows"][: len(batch.rows)] = batch.rows

    def _pad(self, first: int, last: int) -> None:
        parts = self._host_parts
        parts["ids"][first:last] = 0
        parts["positions"][first:last] = 0
        parts["slots"][first:last] = PADDING_SLOT
        parts["attention"][first * ATTENTION_RECORD : last * ATTENTION_RECORD] = 0
        parts["lora"][first * LORA_RECORD : last * LORA_RECORD] = 0

    def _copy(self, num_table_elements: int) -> None:
        used = self._fixed + num_table_elements
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._device.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _wait_for_copy(self) -> None:
        """The host array is about to be written, so the last copy must have read it. It has, once the tokens of the
        step before came back. A step that is launched ahead waits for microseconds, if at all."""
        if self._copied is not None:
            self._copied.synchronize()


def _slots(rows: Sequence[ScheduledRow]) -> set[int]:
    """Of the step's adapters."""
    return {row.request.slot for row in rows if row.request.slot is not None}


def _write(part: NDArray[np.int32], records: NDArray[np.int32]) -> None:
    """Tiles at the beginning, empty ones behind them."""
    part[: records.size] = records.ravel()
    part[records.size :] = 0


def _aligned(count: int) -> int:
    return -(-count // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
