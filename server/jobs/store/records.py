"""The nouns of onboarding: files, jobs and their statuses, events, checkpoints. Knows no database and no process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

TRAINING_FILE, VALIDATION_FILE, MIX_FILE = "training.jsonl", "validation.jsonl", "mix.jsonl"  # in a job's folder
INITIAL_ADAPTER = "initial_adapter"  # a folder there
_DATA = ("data", "validation", "mix")  # the spec's fields that name them


class JobStatus(StrEnum):
    """OpenAI's statuses, and `paused`."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
WORKING = frozenset({JobStatus.VALIDATING, JobStatus.QUEUED, JobStatus.RUNNING})

Wanted = Literal["run", "pause", "cancel"]
Level = Literal["info", "warn", "error"]


@dataclass(frozen=True, slots=True)
class DataFile:
    """One upload. digest: sha256 of its bytes. created_at: Unix seconds."""

    id: str
    tenant: str
    digest: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job failed, as an error of the API."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A row of `jobs`. request: as the API shows it; spec: TrainSpec.to_mapping(); progress: the last
    step's figures; override: an operator's decision against the gate ({by, reason, at}); executor: the kind that runs
    its processes, None before they begin. Times are Unix seconds. Paths in run_dir and spec are this host's."""

    number: int
    id: str
    tenant: str
    name: str
    status: JobStatus
    wanted: Wanted
    run_number: int
    request: Mapping[str, Any]
    spec: Mapping[str, Any]
    base_digest: str
    run_dir: Path
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    heartbeat_at: int | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    failure: JobFailure | None = None
    adapter_digest: str | None = None
    adapter_version: int | None = None
    verdict: str | None = None
    override: Mapping[str, Any] | None = None
    executor: str | None = None

    def at(self, data_dir: Path, bases: Mapping[str, Path]) -> Job:
        """The same job with the paths of one host. bases: each base's folder there, by digest."""
        run_dir = data_dir / self.run_dir
        own = {name: run_dir / Path(self.spec[name]).name for name in _DATA if self.spec.get(name) is not None}
        base = bases.get(self.base_digest, self.spec["base"])
        paths = {name: str(path) for name, path in {"base": base, **own}.items()}
        return replace(self, run_dir=run_dir, spec={**self.spec, **paths})

    @property
    def nodes(self) -> int:
        """Machines that train it together."""
        return int(self.request.get("nodes") or 1)

    @property
    def ranks(self) -> int:
        """Processes on each of them."""
        return int(self.request.get("ranks") or 1)

    @property
    def model_id(self) -> str | None:
        """What its owner sends as `model`; None before the job has succeeded. `ft:base:tenant:name:version`."""
        if self.adapter_version is None or self.status is not JobStatus.SUCCEEDED:
            return None
        return f"ft:{self.request['model']}:{self.tenant}:{self.name}:{self.adapter_version}"


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One entry of a job's history. type "metrics": data holds a step's or an evaluation's figures."""

    number: int
    created_at: int
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        return f"ftevent-{self.number}"


@dataclass(frozen=True, slots=True)
class JobCheckpoint:
    """A state of the training that a run can resume from. metrics: losses at that step."""

    number: int
    step: int
    metrics: Mapping[str, Any]
    created_at: int

    @property
    def id(self) -> str:
        return f"ftckpt-{self.number}"
