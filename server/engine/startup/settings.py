"""Settings of the engine. Names and limits only; imports no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_kernels.cgroups import usable_cpus
from server.engine.schedule import SchedulerSettings
from server.settings import check_settings, section, setting

MIB = 1024 * 1024


def _power_of_two(value: int) -> None:
    """Raises ValueError for another number."""
    if value & (value - 1):
        raise ValueError(f"block_size must be a power of two, got {value}")


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Budgets in bytes; None: chosen from what is free."""

    kv_cache: int | None = setting(
        None, "Size of the KV cache (default: from what is free).", at_least=1, name="kv_cache_mib", factor=MIB
    )
    adapter_pool: int | None = setting(
        None,
        "Memory for adapters on the device (default: from what is free).",
        at_least=1,
        name="adapter_pool_mib",
        factor=MIB,
    )
    host_cache: int | None = setting(
        None,
        "Host memory for adapters (default: a quarter of what is free, at most 16 GiB).",
        at_least=1,
        name="host_cache_mib",
        factor=MIB,
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What one engine serves, and how. None: from the base or from the machine."""

    base: Path
    served_name: str | None = None
    dtype: str = setting(
        "auto", "Type of the base's weights. auto: the base's own.", choices=("auto", "bfloat16", "float32")
    )
    quantize: str | None = setting(None, "nf4: 4-bit base weights (bitsandbytes).", choices=("nf4",))
    device: str = setting("auto", "auto: a GPU if the machine has one.", choices=("auto", "cpu", "cuda"))
    tensor_parallel: int = setting(
        1,
        "Processes that share the base, each with a part of every layer; on GPUs one each. No step is then recorded.",
        at_least=1,
        at_most=64,
    )
    max_model_len: int | None = setting(
        None, "Maximum tokens of prompt and answer together (default: the base's).", at_least=2, unit="tokens"
    )
    max_adapters: int = setting(512, "Maximum adapters on the device at once.", at_least=1)
    block_size: int = setting(
        16, "Tokens of one KV block, a power of two.", at_least=1, unit="tokens", check=_power_of_two
    )
    prefix_cache: bool = setting(True, "Reuse the KV blocks of prompts that begin alike.")
    cuda_graphs: bool = setting(True, "Replay recorded decode steps on a GPU.")
    cpu_replays: bool = setting(True, "Replay recorded forwards of up to 512 tokens on a CPU.")
    num_threads: int | None = setting(
        None, "CPU threads of the engine, of each rank (default: physical cores, divided).", at_least=1, name="threads"
    )
    scheduler: SchedulerSettings = section("Scheduling", default_factory=SchedulerSettings)
    memory: MemoryBudget = section("Memory", default_factory=MemoryBudget)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def compute_threads(self) -> int:
        """Of each rank: num_threads, or torch's own choice (OMP_NUM_THREADS, else the physical cores), limited to this
        process's and container's CPUs and divided among the ranks."""
        import torch

        return self.num_threads or max(1, min(torch.get_num_threads(), usable_cpus()) // self.tensor_parallel)
