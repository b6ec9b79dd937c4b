"""What the first rank sends the others, in the order in which it happens there. Knows arrays; moves none.

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

_ON_HOST = ("query_starts", "context_lens", "block_tables", "positions_T", "sequences_T", "are_prompts", "block_size")


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
    """One forward, without what only the first rank needs: logits and samples.

    slots_T: each token's row of the adapter table; None: no token has an adapter. paged: what `PagedBatch` has on the
    host, by its names.
    """

    input_ids_T: NDArray[np.int64]
    last_positions_T: NDArray[np.int64]
    slots_T: NDArray[np.int32] | None
    slot_mapping_T: NDArray[np.int64]
    paged: dict[str, Any]

    @classmethod
    def of(cls, batch: Batch) -> Step:
        return cls(
            input_ids_T=batch.input_ids_1T[0].cpu().numpy(),
            last_positions_T=batch.last_positions_1T[0].cpu().numpy(),
            slots_T=None if batch.layer_adapters is None else batch.layer_adapters.row_slots,
            slot_mapping_T=batch.paged.slot_mapping_T.cpu().numpy(),
            paged={name: getattr(batch.paged, name) for name in _ON_HOST},
        )

    def batch(self, table: LoraTable, device: torch.device) -> Batch:
        """The same forward on another rank, which computes no logits."""

        def moved(array: NDArray[Any]) -> torch.Tensor:
            return to_device(torch.from_numpy(array), device)

        paged = PagedBatch(**self.paged, slot_mapping_T=moved(self.slot_mapping_T))
        return Batch(
            input_ids_1T=moved(self.input_ids_T)[None],
            position_ids_1T=moved(paged.positions_T.astype(np.int64))[None],
            last_positions_1T=moved(self.last_positions_T)[None],
            paged=paged,
            layer_adapters=None if self.slots_T is None else LoraBatch(table, self.slots_T),
            head_adapters=None,
            logits_rows_R=moved(np.empty(0, dtype=np.int64)),
        )


Message = LoadBase | Allocate | LoadAdapter | ClearSlot | ZeroBlocks | Stop | Step


def packed(message: Message) -> bytes:
    """As bytes. Plain pickle: the pipe is between a process and its own child."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def received(connection: Connection) -> Message:
    """The next message. Raises EOFError when the first rank is gone."""
    message: Message = pickle.loads(connection.recv_bytes())
    return message
