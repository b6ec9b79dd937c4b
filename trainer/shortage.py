"""What a run that is out of memory should change, by the planner's sums and the memory there is. Frees nothing."""

from __future__ import annotations

import os

import torch

from trainer.model.memory import available_bytes
from trainer.model.ranks import own_device
from trainer.planner.advice import advise, process_bytes
from trainer.planner.shapes import PlanError
from trainer.spec import TrainSpec

IN_GENERAL = "smaller batch.micro_tokens, checkpointing: true, method: qlora or more ranks take less"


def way_out(spec: TrainSpec | None) -> str:
    """The changes that would fit, each with its bytes; in general where the sums do not tell."""
    if spec is None:
        return IN_GENERAL
    try:
        return "; ".join(_advice(spec, own_device())) or f"by the plan it fits what is there; {IN_GENERAL}"
    except (PlanError, MemoryError):  # of what is left, the words may be too much as well
        return IN_GENERAL


def _advice(spec: TrainSpec, device: torch.device) -> list[str]:
    available = available_bytes(device)
    if available is None:
        return []
    runtime = 0 if device.type == "cuda" else process_bytes(spec)
    return advise(spec, available, devices=int(os.environ.get("WORLD_SIZE", "1")), runtime_bytes=runtime)
