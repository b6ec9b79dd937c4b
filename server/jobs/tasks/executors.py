"""The executor of a kind. Imports only what that kind needs: Ray's and Kubernetes' clients are optional extras."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.jobs.settings import KUBERNETES, RAY, JobSettings
from server.jobs.tasks.executor import Executor, SubprocessExecutor
from server.jobs.tasks.resident import PYTHON, Resident, can_be_resident

NICE = 5  # of tasks on this machine: above the server's


def executor_for(settings: JobSettings, *, num_gpus: int = 0, commands: Sequence[Sequence[str]] = ()) -> Executor:
    """num_gpus: that each rank of a training gets; this machine and a manifest know it themselves. commands: of the
    tasks, before their arguments; a resident process starts them if all are modules.

    Raises ModuleNotFoundError (an extra is not installed), and what the kind's own settings raise."""
    if settings.executor == RAY:
        from server.jobs.tasks.ray_jobs import RayJobExecutor

        return RayJobExecutor(settings.ray_address, num_gpus=num_gpus)
    if settings.executor == KUBERNETES:
        from server.jobs.tasks.kubernetes_jobs import KubernetesJobExecutor

        assert settings.kubernetes_template is not None
        return KubernetesJobExecutor.from_file(Path(settings.kubernetes_template))
    modules = tuple(command[-1] for command in commands if tuple(command[:-1]) == PYTHON)
    if not (modules and len(modules) == len(commands) and settings.resident_s and can_be_resident()):
        return SubprocessExecutor(NICE)
    resident = Resident(modules, settings.resident_s, NICE)
    resident.open()  # it imports while the worker reads its jobs
    return SubprocessExecutor(NICE, resident)
