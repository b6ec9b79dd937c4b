"""The contract of a run's folder: how its process exits, and whose folder it is. Knows no training and no torch."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """The training process's exit code. BAD_INPUT: the same input fails again. FAILED: another attempt may work."""

    SUCCEEDED = 0
    FAILED = 1
    BAD_INPUT = 2
    PAUSED = 3
    CANCELLED = 4


class RunDirInUse(ValueError):
    """The run folder holds another run."""
