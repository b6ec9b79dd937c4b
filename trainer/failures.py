"""How an error ends a run: its exit code, and a code, message and param for the user. Knows errors; trains nothing.

A run that is out of memory gets the planner's advice: the changes that would fit the memory there is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from adapters_store.base.families import UnsupportedBase
from trainer.data.problems import DataRejected
from trainer.loop import Diverged
from trainer.model.memory import available_bytes, is_out_of_memory
from trainer.model.packing_check import PackingBroken
from trainer.model.ranks import own_device
from trainer.planner.advice import advise, process_bytes
from trainer.planner.shapes import PlanError
from trainer.run_folder.events import is_disk_full
from trainer.run_folder.folder import Exit, RunDirInUse
from trainer.spec import SpecError, TrainSpec

GENERAL_ADVICE = "smaller batch.micro_tokens, checkpointing: true, method: qlora or more ranks take less"
_BAD_INPUT = (SpecError, DataRejected, UnsupportedBase, Diverged, RunDirInUse, PackingBroken)


@dataclass(frozen=True, slots=True)
class Failure:
    """What the user is shown of a failed run."""

    exit: Exit
    code: str
    message: str
    param: str | None = None

    @property
    def body(self) -> dict[str, str | None]:
        return {"code": self.code, "message": self.message, "param": self.param}


def failure_of(error: Exception, spec: TrainSpec | None = None) -> Failure:
    """The failure of any error that ends a run. spec: None if it could not be read."""
    if isinstance(error, _BAD_INPUT):
        return Failure(Exit.BAD_INPUT, error.code, error.message, error.param)
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return Failure(Exit.BAD_INPUT, "file_not_found", str(error))
    return _of_machine(error, spec)


def _of_machine(error: Exception, spec: TrainSpec | None) -> Failure:
    """Another attempt may succeed: on another machine, with more memory, or after a repair."""
    if is_disk_full(error):
        message = "the run folder's disk is full; earlier checkpoints are intact"
        return Failure(Exit.FAILED, "disk_full", message)
    if is_out_of_memory(error):
        message = f"not enough memory ({_first_line(error)}); {_memory_advice(spec)}"
        return Failure(Exit.FAILED, "out_of_memory", message, "batch.micro_tokens")
    return Failure(Exit.FAILED, "internal_error", f"{type(error).__name__}: {_first_line(error)}")


def _memory_advice(spec: TrainSpec | None) -> str:
    """The changes that would fit, each with its bytes; general advice if the planner has none."""
    if spec is None:
        return GENERAL_ADVICE
    try:
        return "; ".join(_planned_advice(spec, own_device())) or f"by the plan it fits what is there; {GENERAL_ADVICE}"
    except (PlanError, MemoryError):  # planning itself may need more memory than is left
        return GENERAL_ADVICE


def _planned_advice(spec: TrainSpec, device: torch.device) -> list[str]:
    available = available_bytes(device)
    if available is None:
        return []
    runtime = 0 if device.type == "cuda" else process_bytes(spec)
    return advise(spec, available, devices=int(os.environ.get("WORLD_SIZE", "1")), runtime_bytes=runtime)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
