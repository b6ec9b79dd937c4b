"""The first rank: everything that changes its device is given to the others before it happens here. Decides nothing.

The scheduler, the adapters' places and the sampler are those of a server with one process; they run here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from adapters_store.base.families import UnsupportedBase
from adapters_store.errors import AdapterRejected
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter
from adapters_store.packed.packed_file import as_bytes
from lora_kernels.background import TimeSlices
from lora_kernels.lora.batch import LoraTable
from server.engine.device_fault import device_error
from server.engine.model.base_model import BaseModel
from server.engine.model.batch import Batch
from server.engine.model.kv_tensors import KVCache
from server.engine.tensor_parallel.cuts import Cuts
from server.engine.tensor_parallel.followers import Followers
from server.engine.tensor_parallel.messages import Allocate, ClearSlot, LoadAdapter, LoadBase, Step, ZeroBlocks
from server.engine.tensor_parallel.ranks import Ranks
from server.engine.tensor_parallel.sharded_adapter import ShardedAdapter, sharded
from server.engine.tensor_parallel.sharded_base import load_shard

TIMEOUT_S = 60.0


class Leader:
    """The first of num_ranks ranks, which starts the others. timeout_s: the longest that one may keep it waiting."""

    def __init__(self, num_ranks: int, device: torch.device, *, timeout_s: float = TIMEOUT_S) -> None:
        """Raises UnsupportedBase if there are too few devices; DeviceLost if a rank does not start."""
        self.num_ranks = num_ranks
        own, *others = _devices(num_ranks, device)
        self.followers = Followers(others, timeout_s=timeout_s)
        self._cuts: Cuts | None = None
        try:
            self.ranks = Ranks(0, num_ranks, torch.device(own), self.followers.rendezvous, timeout_s)
        except BaseException:
            self.close()
            raise

    def load_base(self, path: Path, cuts: Cuts, *, num_threads: int) -> BaseModel:
        """This rank's part, while the others load theirs.

        Raises UnsupportedBase; DeviceLost with the error of another rank."""
        self._cuts = cuts
        quantize = "nf4" if cuts.base.nf4 else None
        self.followers.send_to_all(LoadBase(str(path), cuts.base.dtype, quantize, num_threads))
        base = load_shard(path, cuts, self.ranks)
        self.followers.wait_for_all()
        return base

    def cut(self, adapter: PackedAdapter, buffers: HostBuffers, slices: TimeSlices) -> ShardedAdapter:
        """All ranks' parts of an adapter, see `sharded`."""
        assert self._cuts is not None, "an adapter before its base"
        return sharded(adapter, self._cuts, buffers, slices)

    def allocate(self, cache: KVCache, table: LoraTable) -> None:
        """Let the others make caches of the same sizes. From here on all ranks run each step."""
        self.followers.send_to_all(Allocate(cache.num_blocks, cache.block_size, table.arena.numel(), table.num_slots))
        self.followers.wait_for_all()
        self.ranks.open()

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[None]:
        with self.followers.step():
            self.followers.send_to_all(Step.of(batch))
            yield

    def zero_blocks(self, block_ids: list[int]) -> None:
        self.followers.send_to_all(ZeroBlocks(block_ids))

    def load_adapter(self, slot: int, offset: int, adapter: PackedAdapter) -> None:
        """Each rank's part of one that was cut."""
        assert isinstance(adapter, ShardedAdapter), "an adapter that was not cut"
        for rank, part in enumerate(adapter.others, start=1):
            message = LoadAdapter(slot, offset, adapter.modules, adapter.is_int8, as_bytes(part))
            self.followers.send(rank, message)

    def clear_slot(self, slot: int) -> None:
        self.followers.send_to_all(ClearSlot(slot))

    def device_error(self) -> str | None:
        """Why no later step can succeed; None: all ranks answer."""
        return self.followers.failure or device_error(self.ranks.device)

    def int8_probe(self, plain: PackedAdapter, small: PackedAdapter) -> float:
        """Raises AdapterRejected (int8_not_measured): what is measured is on no other rank."""
        message = f"adapter_dtype: int8 is not measured with --tensor-parallel {self.num_ranks}"
        raise AdapterRejected("int8_not_measured", f"{message}; push it without", param="adapter_dtype")

    def close(self) -> None:
        self.followers.close()


def _devices(num_ranks: int, first: torch.device) -> list[str]:
    if first.type != "cuda":
        return [str(first)] * num_ranks
    if torch.cuda.device_count() < num_ranks:
        found = torch.cuda.device_count()
        raise UnsupportedBase(f"--tensor-parallel {num_ranks}: one GPU for each rank is needed, torch sees {found}")
    return [f"cuda:{index}" for index in range(num_ranks)]
