"""Describes the machine that measures, and how fast it reads its memory. Knows hardware; knows no benchmark."""

from __future__ import annotations

import datetime
import platform
import time
from functools import cache
from pathlib import Path

import torch

from lora_kernels.cgroups import usable_cpus

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
READ_BYTES = 512 << 20


def machine_columns() -> dict[str, str | int]:
    """What every row of results says about where it comes from."""
    return {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def hardware() -> str:
    """CPU model, cores this process may use, and the instruction sets that matter here."""
    names = _cpu_field(("model name", "Model")) or platform.processor() or platform.machine()
    flags = set((_cpu_field(("flags", "Features")) or "").split())
    sets = " ".join(name for name in INSTRUCTION_SETS if name in flags)
    return f"{names}, {usable_cpus()} cores, {sets or platform.machine()}"


def _cpu_field(names: tuple[str, ...]) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), None)


@cache
def read_bandwidth(num_bytes: int = READ_BYTES) -> float:
    """Bytes per second at which torch's threads sum a tensor that no cache holds: the best of seven."""
    values = torch.ones(num_bytes // 4)
    best_s = float("inf")
    for _ in range(7):
        began_s = time.perf_counter()
        values.sum()
        best_s = min(best_s, time.perf_counter() - began_s)
    return num_bytes / best_s
