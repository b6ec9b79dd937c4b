"""The inputs of a decode step in memory that never moves, so that recorded launches can read them. Knows rows, blocks
and slots; records nothing.

One packed int32 array on the host is filled and copied to the device at once. Rows beyond the step's own are padding:
no key or value is stored, attention and adapters do nothing. The input tokens come from the host. If the step is
launched before the last step's tokens are known, they come from that step's result on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lora_kernels.attention.query_tiles import RECORD as ATTENTION_RECORD
from lora_kernels.captured import captured_lora_batch, captured_paged_batch, captured_scratch_elements
from lora_kernels.lora.batch import LoraBatch, LoraTable
from lora_kernels.lora.row_tiles import RECORD as LORA_RECORD
from lora_kernels.lora.row_tiles import tile_records
from lora_kernels.triton_common.tiles import DECODE_ROWS
from server.engine.model.batch import Batch, row_slot
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
    """max_rows rows of at most max_context tokens. Owned by one thread."""

    def __init__(self, table: LoraTable, *, max_rows: int, max_context: int, block_size: int) -> None:
        self.table = table
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
        """Start copying this step's rows, padded to bucket, to the device. tokens None: the host knows them."""
        self._wait_for_copy()
        count, parts = len(rows), self._host_parts
        starts = np.fromiter((row.start for row in rows), dtype=np.int32, count=count)
        if tokens is None:
            parts["ids"][:count] = np.fromiter((row.request.token_at(row.start) for row in rows), np.int32, count)
        else:
            parts["sources"][:count] = tokens.sources
        parts["positions"][:count] = starts
        tables = [self._table_of(row) for row in rows]
        ends = np.cumsum([len(table) for table in tables])
        table_starts = np.concatenate(([0], ends[:-1]))
        packed = parts["tables"][: int(ends[-1])]
        np.concatenate(tables, out=packed)
        blocks = packed[table_starts + starts // self.block_size]
        parts["slots"][:count] = blocks * self.block_size + starts % self.block_size
        attention = parts["attention"][: count * ATTENTION_RECORD].reshape(count, ATTENTION_RECORD)
        attention[:, 0], attention[:, 1], attention[:, 2], attention[:, 3] = table_starts, np.arange(count), 1, starts
        self._pad(count, bucket)
        self._fill_adapters(rows, bucket)
        self._copy(len(packed))
        if tokens is not None:
            ids = tokens.tokens_R.index_select(0, self._device_parts["sources"][:count]).clamp_(min=0)
            self._device_parts["ids"][:count].copy_(ids)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._known.pop(request_id, None)

    def max_rank(self, rows: Sequence[ScheduledRow]) -> int:
        """The largest rank of the step's adapters; 0: no row has one."""
        slots = {row.request.slot for row in rows}
        return max((self.table.max_ranks[slot] for slot in slots if slot is not None), default=0)

    def have_token_rows(self, rows: Sequence[ScheduledRow]) -> bool:
        """Whether an adapter of the step has its own embedding or head: no recorded launch reads those."""
        slots = (row.request.slot for row in rows)
        return any(self.table.token_rows[slot] for slot in slots if slot is not None)

    def touched_modules(self, rows: Sequence[ScheduledRow]) -> NDArray[np.bool_]:
        """For each row of the adapter table, whether an adapter of the step touches that module."""
        slots = {row.request.slot for row in rows}
        used = [slot for slot in slots if slot is not None]
        touched: NDArray[np.bool_] = np.logical_or.reduce(self.table.touched[:, used], axis=1)
        return touched

    def step(self, bucket: int, max_rank: int, modules: frozenset[int] | None = None) -> Batch:
        """A batch of `bucket` rows over this memory. max_rank: of its adapters; 0: none. modules: the rows of the
        table that they may touch; None: all.

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
        )
        records, rows = parts["lora"][: bucket * LORA_RECORD].view(bucket, LORA_RECORD), parts["rows"][:bucket]
        adapters = None
        if max_rank:
            scratch = self._scratch_for(max_rank)
            adapters = captured_lora_batch(
                self.table, records, rows, max_rank=max_rank, scratch=scratch, modules=modules
            )
        return Batch(
            input_ids_1T=parts["ids"][None, :bucket],
            position_ids_1T=parts["positions"][None, :bucket],
            last_positions_1T=parts["positions"][None, :bucket],  # the one token is its sequence's last
            paged=paged,
            layer_adapters=adapters,
            head_adapters=adapters,
            logits_rows_R=None,
            sampling=[],
            sampling_rows=[],
            prompt_spans=[],
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

    def _fill_adapters(self, rows: Sequence[ScheduledRow], bucket: int) -> None:
        slots = np.fromiter((row_slot(row.request) for row in rows), dtype=np.int32, count=len(rows))
        batch = LoraBatch(self.table, slots)
        records = tile_records(batch.slots, batch.starts, np.diff(batch.starts), DECODE_ROWS)
        self._host_parts["lora"][: bucket * LORA_RECORD] = 0
        self._host_parts["lora"][: records.size] = records.ravel()
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


def _aligned(count: int) -> int:
    return -(-count // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
