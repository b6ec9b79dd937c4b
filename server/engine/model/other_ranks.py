"""The ranks that share one base with this process. They are given each change of this rank's device as it happens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from adapters_store.packed.layout import PackedAdapter
from server.engine.model.batch import Batch


class OtherRanks(Protocol):
    """`server.engine.tensor_parallel.leader.Leader`."""

    def forward(self, batch: Batch) -> AbstractContextManager[None]:
        """All ranks take part in the forward that runs within it."""

    def zero_blocks(self, block_ids: list[int]) -> None: ...
    def load_adapter(self, slot: int, offset: int, adapter: PackedAdapter) -> None: ...
    def clear_slot(self, slot: int) -> None: ...
