"""Whether a training fits into the free memory, by the planner's estimate. Allocates nothing.

`Estimate` can be replaced: it is any function from a spec to bytes.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from lora_kernels.cgroups import free_host_bytes
from trainer.planner.advice import advise, case_of, process_bytes
from trainer.planner.memory import memory_need
from trainer.planner.shapes import PlanError
from trainer.spec import TrainSpec

Estimate = Callable[[TrainSpec], int]

MIB = 1024 * 1024
DISK_BYTES = 256 * MIB  # logs, events and the first checkpoints


def estimated_bytes(spec: TrainSpec) -> int:
    """Bytes of a run, its process included. If the planner cannot read the base, of the process alone: the trainer then
    reports what is wrong with the base."""
    try:
        return memory_need(case_of(spec, runtime_bytes=process_bytes(spec))).total
    except PlanError:
        return process_bytes(spec)


def advice(spec: TrainSpec, available_bytes: int) -> list[str]:
    """Changes that make the training fit; empty if it fits, or if the planner cannot read the base."""
    try:
        return advise(spec, available_bytes, runtime_bytes=process_bytes(spec))
    except PlanError:
        return []


def free_bytes(device: str = "cpu") -> int | None:
    """Memory that a training may take now; None if unknown."""
    if device != "cuda":
        return free_host_bytes()
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    return max((int(line) * MIB for line in lines), default=None)


def no_limit() -> int | None:
    """For trainings on other machines, whose scheduler knows their memory."""
    return None


def free_disk_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
