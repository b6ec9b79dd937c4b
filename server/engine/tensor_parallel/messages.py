"""What the first rank tells the others, in the order in which it happens there. Knows arrays; moves none.

Each message is one change of a rank's device: its base, its caches, an adapter, blocks that are wiped, a step.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adapters_store.packed.layout import PackedModule
from lora_kernels.attention.batch import PagedBatch
from lora_kernels.lora.batch import LoraBatch, LoraTable
from lora_kernels.transfer import to_device
from server.engine.model.batch import Batch


class LoadBase(NamedTuple):
    """Load this rank's part of the base in a folder. Answered when it is loaded."""

    path: str
    dtype: str
    quantize: str | None
    num_threads: int


class Allocate(NamedTuple):
    """Make the caches; from here on all ranks run each step. Answered."""

    num_blocks: int
    block_size: int
    arena_elements: int
    num_slots: int


class LoadAdapter(NamedTuple):
    """Put this rank's part of an adapter into a slot. data: the bytes of its buffer."""

    slot: int
    offset: int
    modules: tuple[PackedModule, ...]
    is_int8: bool
    data: NDArray[np.uint8]


class ClearSlot(NamedTuple):
    """The slot holds no adapter any more."""

    slot: int


class ZeroBlocks(NamedTuple):
    """Wipe blocks that may hold non-finite values."""

    block_ids: list[int]


class Stop(NamedTuple):
    """End the process."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward, as `Batch` and `PagedBatch` have it, without what only the first rank needs: logits and samples.

    slots_T: each token's row of the adapter table; None: no token has an adapter.
    """

    input_ids_T: NDArray[np.int64]
    last_positions_T: NDArray[np.int64]
    slots_T: NDArray[np.int32] | None
    query_starts: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    slot_mapping_T: NDArray[np.int64]
    positions_T: NDArray[np.int32]
    sequences_T: NDArray[np.int32]
    are_prompts: NDArray[np.bool_] | None
    block_size: int

    @classmethod
    def of(cls, batch: Batch) -> Step:
        paged = batch.paged
        return cls(
            input_ids_T=batch.input_ids_1T[0].cpu().numpy(),
            last_positions_T=batch.last_positions_1T[0].cpu().numpy(),
            slots_T=None if batch.layer_adapters is None else batch.layer_adapters.row_slots,
            query_starts=paged.query_starts,
            context_lens=paged.context_lens,
            block_tables=paged.block_tables,
            slot_mapping_T=paged.slot_mapping_T.cpu().numpy(),
            positions_T=paged.positions_T,
            sequences_T=paged.sequences_T,
            are_prompts=paged.are_prompts,
            block_size=paged.block_size,
        )

    def batch(self, table: LoraTable, device: torch.device) -> Batch:
        """The same forward on another rank, which computes no logits."""

        def moved(array: NDArray[Any]) -> torch.Tensor:
            return to_device(torch.from_numpy(array), device)

        paged = PagedBatch(
            query_starts=self.query_starts,
            context_lens=self.context_lens,
            block_tables=self.block_tables,
            slot_mapping_T=moved(self.slot_mapping_T),
            positions_T=self.positions_T,
            sequences_T=self.sequences_T,
            block_size=self.block_size,
            are_prompts=self.are_prompts,
        )
        return Batch(
            input_ids_1T=moved(self.input_ids_T)[None],
            position_ids_1T=moved(self.positions_T.astype(np.int64))[None],
            last_positions_1T=moved(self.last_positions_T)[None],
            paged=paged,
            layer_adapters=None if self.slots_T is None else LoraBatch(table, self.slots_T),
            head_adapters=None,
            logits_rows_R=moved(np.empty(0, dtype=np.int64)),
            sampling=[],
            sampling_rows=[],
            offsets=[],
            prompt_spans=[],
        )


Message = LoadBase | Allocate | LoadAdapter | ClearSlot | ZeroBlocks | Stop | Step


def packed(message: Message) -> bytes:
    """As bytes. Plain pickle: the pipe is between a process and its own child."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def received(connection: Connection) -> Message:
    """The next message. Raises EOFError when the first rank is gone."""
    message: Message = pickle.loads(connection.recv_bytes())
    return message
