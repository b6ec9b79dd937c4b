"""Whether a training fits into the free memory, by the planner's estimate. Allocates nothing.

`Estimate` can be replaced: it is any function from a spec to bytes.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

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


def free_bytes(device: str = "cpu", ranks: int = 1) -> int | None:
    """Memory that all ranks of a training may take now together; None if unknown. On GPUs each rank has a device of its
    own, the first ones of this process, and takes as much as the others."""
    if device != "cuda":
        return free_host_bytes()
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    free = {name: mib for index, uuid, mib in (line.split(", ") for line in lines) for name in (index, uuid)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [line.split(", ")[0] for line in lines] if visible is None else visible.split(",")
    found = [free.get(name.strip(), "") for name in names[:ranks]]  # "[N/A]": the driver does not know it
    return ranks * min(map(int, found)) * MIB if found and all(map(str.isdigit, found)) else None
