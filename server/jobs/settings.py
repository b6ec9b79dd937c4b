"""How a server runs jobs: whether at all, and on what their processes run. Names, limits and help only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from server.settings import check_settings, setting
from trainer.tracking.tracker import TRACKERS, fault_of

SUBPROCESS, RAY, KUBERNETES = "subprocess", "ray", "kubernetes"
EXECUTORS = (SUBPROCESS, RAY, KUBERNETES)


def _check_name(name: str) -> None:
    if name not in TRACKERS:
        raise ValueError(f"jobs_track must be one of {', '.join(TRACKERS)}, got {name!r:.80}")


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
    resident_s: float = setting(
        120.0,
        "How long a process that holds the base for trainings waits for the next one. 0: each loads it itself.",
        at_least=0,
        at_most=86_400,
        name="jobs_resident_s",
    )
    track: tuple[str, ...] = setting(
        (),
        f"Show every training in {', '.join(TRACKERS)}, too, with the samples that its tenant asked for.",
        name="jobs_track",
        metavar="NAME",
        check=_check_name,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name in () if self.is_remote else self.track:  # the trainer's image has its own packages
            if fault := fault_of(name):
                raise ValueError(f"jobs_track must be {fault}, got {name!r}")
        if self.executor == KUBERNETES and self.kubernetes_template is None:
            raise ValueError("jobs_executor kubernetes needs jobs_kubernetes_template")

    @property
    def is_remote(self) -> bool:
        """Whether trainings run on other machines."""
        return self.executor != SUBPROCESS

    def to_json(self) -> str:
        """For the worker's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> JobSettings:
        """What it leaves out has its default. Raises ValueError."""
        body = json.loads(text)
        return cls(**{**body, "track": tuple(body.get("track", ()))})
