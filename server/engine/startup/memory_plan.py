"""Divides the machine's memory at start: KV blocks, adapter arena, host tier. Knows bytes; allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from adapters_store.base.families import UnsupportedBase
from lora_kernels.cgroups import free_host_bytes
from server.engine.model.base_model import BaseModel
from server.engine.model.kv_tensors import bytes_per_block
from server.engine.startup.settings import MIB, MemoryBudget

GIB = 1024 * MIB
UNKNOWN_HOST_BYTES = 4 * GIB  # if the system does not report free memory
GPU_SLACK = 0.05  # of what is free: fragments of the allocator, libraries' workspaces
NOTHING = "0 MiB"


@dataclass(frozen=True, slots=True)
class Reserved:
    """Device memory kept free for steps, in bytes. step_bytes: the largest step beside weights and caches, measured.
    graph_bytes: the recorded decode steps, at most."""

    step_bytes: int = 0
    graph_bytes: int = 0

    @property
    def total(self) -> int:
        return self.step_bytes + self.graph_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How memory is divided. num_blocks x block_size tokens fit the KV cache."""

    device: str
    base_bytes: int
    kv_bytes: int
    num_blocks: int
    block_size: int
    adapter_pool_bytes: int
    host_cache_bytes: int
    reserved: Reserved = field(default_factory=Reserved)

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), for display."""
        tokens = self.num_blocks * self.block_size
        rows = [
            ("base weights", _mib(self.base_bytes)),
            ("KV cache", f"{_mib(self.kv_bytes)}  ({tokens} tokens in blocks of {self.block_size})"),
            ("adapters on the device", _mib(self.adapter_pool_bytes)),
            ("the largest step (measured)", _mib(self.reserved.step_bytes)),
            ("CUDA graphs (at most)", _mib(self.reserved.graph_bytes)),
            ("adapters in host memory", _mib(self.host_cache_bytes)),
        ]
        return [row for row in rows if row[1] != NOTHING]


def plan_memory(
    base: BaseModel,
    budget: MemoryBudget,
    *,
    block_size: int,
    max_tokens_useful: int,
    reserved: Reserved | None = None,
    num_ranks: int = 1,
) -> MemoryPlan:
    """Divide the memory that is free after the base is loaded. max_tokens_useful: the most KV tokens in use at once.
    num_ranks: processes that do the same; on a CPU they share what is free.

    Raises UnsupportedBase with the numbers if fewer than two blocks fit, or none if a context needs one.
    """
    reserved = reserved or Reserved()
    free = free_device_bytes(base.device) // (1 if base.device.type == "cuda" else num_ranks)
    pool, spare = divided(free, budget, reserved, on_gpu=base.device.type == "cuda")
    block_bytes = bytes_per_block(base, block_size)
    num_blocks = min((budget.kv_cache or spare) // block_bytes, -(-max_tokens_useful // block_size))
    needed = -(-min(base.max_model_len, max_tokens_useful) // block_size)
    if num_blocks < min(needed, 2):
        raise UnsupportedBase(
            f"KV cache: one block takes {_mib(block_bytes)}, {_mib(max(spare, 0))} are left of {_mib(free)} free on "
            f"{base.device} beside the base: {_mib(pool)} are for adapters, {_mib(reserved.step_bytes)} for the "
            f"largest step, {_mib(reserved.graph_bytes)} for CUDA graphs"
        )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in resident_tensors(base))
    host = budget.host_cache or min(free_device_bytes(torch.device("cpu")) // 4, 16 * GIB)
    kv_bytes = num_blocks * block_bytes
    return MemoryPlan(str(base.device), weights, kv_bytes, num_blocks, block_size, pool, host, reserved)


def divided(free: int, budget: MemoryBudget, reserved: Reserved, *, on_gpu: bool) -> tuple[int, int]:
    """Bytes for adapters, and for keys and values. A GPU is filled; on a CPU part of the memory stays free."""
    if not on_gpu:
        return budget.adapter_pool or min(free // 8, GIB), free // 4
    usable = int(free * (1 - GPU_SLACK)) - reserved.total
    pool = budget.adapter_pool or min(max(usable, 0) // 8, 8 * GIB)
    return pool, usable - pool


def resident_tensors(base: BaseModel) -> list[torch.Tensor]:
    """The base's weights, each once: the model's parameters and those that its groups hold."""
    held = [tensor for module in base.model.modules() for tensor in getattr(module, "resident", ())]
    unique = {tensor.data_ptr(): tensor for tensor in [*base.model.parameters(), *held]}
    return list(unique.values())


def free_device_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes() or UNKNOWN_HOST_BYTES


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"
