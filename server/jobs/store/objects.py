"""Jobs, events and checkpoints as OpenAI's clients read them; fields of ours are under `multilora`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from server.jobs.store.job_request import usual_rate
from server.jobs.store.records import Job, JobCheckpoint, JobEvent, JobStatus

_PATHS = ("base", "data", "validation", "mix", "initial_adapter")  # of this machine: never shown


def job_object(job: Job) -> dict[str, Any]:
    spec, request = job.spec, job.request
    objective = spec.get("objective", "supervised")  # specs of earlier versions do not name it
    hyperparameters = {
        "n_epochs": spec["optim"]["epochs"],
        "batch_size": spec["batch"]["examples"],
        "learning_rate_multiplier": spec["optim"]["learning_rate"] / usual_rate(objective),
    }
    of_method = {**hyperparameters, "beta": spec["dpo"]["beta"]} if objective == "dpo" else hyperparameters
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": _estimated_finish(job),
        "model": request["model"],
        "fine_tuned_model": job.model_id,
        "organization_id": job.tenant,
        "status": job.status.value,
        "training_file": request["training_file"],
        "validation_file": request["validation_file"],
        "result_files": [],
        "hyperparameters": hyperparameters,
        "method": {"type": objective, objective: {"hyperparameters": of_method}},
        "seed": spec["seed"],
        "trained_tokens": job.progress.get("trained_tokens"),
        "error": None if job.failure is None else asdict(job.failure),
        "integrations": [],
        "metadata": request["metadata"],
        "user_provided_suffix": request["suffix"],
        "multilora": _ours(job),
    }


def _ours(job: Job) -> dict[str, Any]:
    return {
        "tenant": job.tenant,
        "adapter": job.name,
        "version": job.adapter_version,
        "digest": job.adapter_digest,
        "wanted": job.wanted,
        "verdict": job.verdict,
        "override": job.override,
        "executor": job.executor,
        "nodes": job.nodes,
        "ranks": job.ranks,
        "started_at": job.started_at,
        "heartbeat_at": job.heartbeat_at,
        "progress": job.progress,
        "spec": {name: value for name, value in job.spec.items() if name not in _PATHS},
    }


def _estimated_finish(job: Job) -> int | None:
    left_s = job.progress.get("eta_s")
    if job.status is not JobStatus.RUNNING or left_s is None or job.heartbeat_at is None:
        return None
    return job.heartbeat_at + round(float(left_s))


def event_object(event: JobEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": dict(event.data),
    }


def checkpoint_object(job: Job, checkpoint: JobCheckpoint) -> dict[str, Any]:
    """The checkpoint's name has OpenAI's form; only the last state of a job is served."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": f"ft:{job.request['model']}:{job.tenant}:{job.name}:ckpt-step-{checkpoint.step}",
        "step_number": checkpoint.step,
        "metrics": dict(checkpoint.metrics),
    }
