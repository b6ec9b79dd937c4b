"""What a command may be told of the job worker that it brings. Decides names, bounds and help."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.common.texts import MIB
from server.jobs.limits import JobLimits

_PANEL = "Jobs"

JobsMaxRunningOption = Annotated[
    int,
    typer.Option(
        help="Trainings at once, of all tenants.", min=1, envvar="MULTILORA_JOBS_MAX_RUNNING", rich_help_panel=_PANEL
    ),
]
JobsMemoryOption = Annotated[
    int | None,
    typer.Option(
        help="For all trainings together (default: what is free).",
        min=1,
        envvar="MULTILORA_JOBS_MEMORY_MIB",
        rich_help_panel=_PANEL,
    ),
]


def job_limits(max_running: int, memory_mib: int | None) -> JobLimits:
    """The options' part of the job runner's limits."""
    return JobLimits(max_running=max_running, memory_bytes=None if memory_mib is None else memory_mib * MIB)
