"""How a server runs jobs: whether at all, and on what their processes run. Names, limits and help only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from server.settings import check_settings, setting

SUBPROCESS, RAY, KUBERNETES = "subprocess", "ray", "kubernetes"
EXECUTORS = (SUBPROCESS, RAY, KUBERNETES)


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """worker: "off" leaves jobs to the workers of other servers on the same database."""

    worker: str = setting("worker", "Run jobs here, or leave them to others.", choices=("worker", "off"), name="jobs")
    executor: str = setting(
        SUBPROCESS,
        "What runs trainings: this machine, Ray or Kubernetes.",
        choices=EXECUTORS,
        name="jobs_executor",
    )
    ray_address: str = setting(
        "http://127.0.0.1:8265", "Ray's job server, for --jobs-executor ray.", metavar="URL", name="jobs_ray_address"
    )
    kubernetes_template: str | None = setting(
        None,
        "A Job manifest that every training is made of, for --jobs-executor kubernetes.",
        metavar="FILE",
        name="jobs_kubernetes_template",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.executor == KUBERNETES and self.kubernetes_template is None:
            raise ValueError("jobs_executor kubernetes needs jobs_kubernetes_template")

    @property
    def is_remote(self) -> bool:
        """Whether trainings run on other machines."""
        return self.executor != SUBPROCESS

    def as_options(self) -> Iterator[str]:
        """For the worker's command line."""
        yield from ("--executor", self.executor, "--ray-address", self.ray_address)
        if self.kubernetes_template is not None:
            yield from ("--kubernetes-template", self.kubernetes_template)
