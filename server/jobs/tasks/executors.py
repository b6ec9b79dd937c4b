"""The executor of a kind. Imports only what that kind needs: Ray's and Kubernetes' clients are optional extras."""

from __future__ import annotations

from pathlib import Path

from server.jobs.settings import KUBERNETES, RAY, JobSettings
from server.jobs.tasks.executor import Executor, SubprocessExecutor


def executor_for(settings: JobSettings, *, num_gpus: int = 0) -> Executor:
    """num_gpus: that each rank of a training gets; this machine and a manifest know it themselves.

    Raises ModuleNotFoundError (an extra is not installed), and what the kind's own settings raise."""
    if settings.executor == RAY:
        from server.jobs.tasks.ray_jobs import RayJobExecutor

        return RayJobExecutor(settings.ray_address, num_gpus=num_gpus)
    if settings.executor == KUBERNETES:
        from server.jobs.tasks.kubernetes_jobs import KubernetesJobExecutor

        assert settings.kubernetes_template is not None
        return KubernetesJobExecutor.from_file(Path(settings.kubernetes_template))
    return SubprocessExecutor()
