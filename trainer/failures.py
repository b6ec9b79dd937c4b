"""Which errors end a run how: exit code, and code, message and param for a user. Knows errors; knows no training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from adapters_store.base.families import UnsupportedBase
from trainer.data.problems import DataRejected
from trainer.loop import Diverged
from trainer.model.memory import is_out_of_memory
from trainer.run_folder.events import is_disk_full
from trainer.shortage import way_out
from trainer.spec import TrainSpec
from trainer.spec_fields import SpecError


class Exit(IntEnum):
    """What the process says to who started it. BAD_INPUT: the same input fails again; FAILED: another try may work."""

    SUCCEEDED = 0
    FAILED = 1
    BAD_INPUT = 2
    PAUSED = 3
    CANCELLED = 4


class RunDirInUse(ValueError):
    """The run folder holds another run."""


_BAD_INPUT: tuple[tuple[type[Exception], str, str | None], ...] = (
    (UnsupportedBase, "unsupported_base", "base"),
    (Diverged, "diverged", "optim.learning_rate"),
    (RunDirInUse, "run_dir_in_use", "run_dir"),
    (FileNotFoundError, "file_not_found", None),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed run as it is told."""

    exit: Exit
    code: str
    message: str
    param: str | None = None

    @property
    def body(self) -> dict[str, str | None]:
        return {"code": self.code, "message": self.message, "param": self.param}


def failure_of(error: Exception, spec: TrainSpec | None = None) -> Failure:
    """What to tell of any error that ends a run; spec: where there was one to run."""
    if isinstance(error, SpecError | DataRejected):
        return Failure(Exit.BAD_INPUT, error.code, error.message, error.param)
    for kind, code, param in _BAD_INPUT:
        if isinstance(error, kind):
            return Failure(Exit.BAD_INPUT, code, str(error), param)
    return _of_machine(error, spec)


def _of_machine(error: Exception, spec: TrainSpec | None) -> Failure:
    """Another try may end otherwise: on another machine, with more room, or after a repair."""
    if is_disk_full(error):
        message = "the run folder's disk is full; checkpoints that were whole before still are"
        return Failure(Exit.FAILED, "disk_full", message)
    if is_out_of_memory(error):
        message = f"not enough memory ({_first_line(error)}); {way_out(spec)}"
        return Failure(Exit.FAILED, "out_of_memory", message, "batch.micro_tokens")
    return Failure(Exit.FAILED, "internal_error", f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
