"""The steps of an onboarding: validate; train, gate, publish, activate. Each may be cut off anywhere and run again.

A step reads the row first, does what is left to do, and updates the row. It returns whether the next step follows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.base.description import BaseDescription
from adapters_store.errors import NotFound, StoreError, UserError
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from server.jobs.settings import SUBPROCESS
from server.jobs.steps.gate import GateStep, verdict_in
from server.jobs.steps.memory import DISK_BYTES, advice, free_bytes
from server.jobs.steps.training import SPEC_FILE, TRAINER_KILLED, Outcome, Training, write_spec
from server.jobs.store.job_store import JobStore
from server.jobs.store.records import MIX_FILE, TRAINING_FILE, VALIDATION_FILE, Job, JobFailure, JobStatus, Level
from trainer.data.jsonl import read_jsonl
from trainer.data.problems import DataRejected
from trainer.run_folder.folder import RunFolder
from trainer.spec import SpecError, TrainSpec

if TYPE_CHECKING:
    from adapters_store.store import AdapterStore

_PARAMS = {TRAINING_FILE: "training_file", VALIDATION_FILE: "validation_file", MIX_FILE: "mix_file"}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Everything a step needs. executor: its kind; running jobs of another kind are left alone.

    open_store: opened late, because the store imports torch, which an idle worker does not need.
    """

    jobs: JobStore
    open_store: Callable[[], AdapterStore]
    training: Training
    gating: GateStep
    executor: str = SUBPROCESS

    def validate(self, job_id: str) -> bool:
        """Check data, spec and disk again, as far as that needs no model; then queue the job."""
        job = self.jobs.find(job_id)
        if job is None or job.status is not JobStatus.VALIDATING:
            return False
        failure = self._fault(job)
        if failure is not None:
            self.jobs.end(job, JobStatus.FAILED, failure)
            return False
        self.jobs.note(job, f"validated:{job.run_number}", "Files validated; the job is queued")
        return self.jobs.move(job, JobStatus.QUEUED, only_in=(JobStatus.VALIDATING,))

    def train(self, job_id: str) -> bool:
        """Train to the end."""
        job = self._running(job_id)
        if job is None:
            return False
        self.jobs.note(job, f"train:{job.run_number}", "Training started")
        outcome, failure = self.training.run(job)
        if failure is not None and failure.code == TRAINER_KILLED:  # an error of the trainer has the advice already
            served = self.jobs.bases.find(job.base_digest)
            failure = _with_advice(job, failure, "cpu" if served is None else served.device)
        return self._settle(job, outcome, failure)

    def gate(self, job_id: str) -> bool:
        """Get the gate's verdict. A blocked adapter ends here, unless an operator has overridden the gate."""
        job = self._running(job_id)
        if job is None:
            return False
        if job.override is None:
            self.jobs.note(job, f"gate:{job.run_number}", "Measuring the adapter against the base")
            if not self._settle(job, *self.gating.run(job, self.jobs.bases.find(job.base_digest))):
                return False
            verdict = verdict_in(job.run_dir)
            assert verdict is not None
            self.jobs.record(job, {"verdict": verdict.verdict})
            level: Level = "info" if verdict.verdict == "pass" else "warn"
            self.jobs.note(job, "verdict", verdict.text, level=level, reasons=list(verdict.reasons))
            if verdict.blocks:
                return self._settle(job, "failed", verdict.failure)
        return True

    def publish(self, job_id: str) -> bool:
        """Put the adapter into the store, as an inactive version. From here on a job can no longer pause or cancel."""
        job = self._running(job_id)
        if job is None or job.adapter_version is not None:
            return job is not None
        if job.wanted != "run":
            return self._settle(job, "cancelled" if job.wanted == "cancel" else "paused", None)
        base = self._base(job)
        if base is None:
            failure = JobFailure("wrong_base", f"base {job.base_digest} is no longer registered", "model")
            return self._settle(job, "failed", failure)
        adapter = RunFolder(job.run_dir).adapter
        try:
            version = self.open_store().publish(
                tenant=job.tenant,
                name=job.name,
                config=_config(adapter / CONFIG_FILE, base.name),
                weights=adapter / WEIGHTS_FILE,
                base=base,
                activate=False,
                int8_change=lambda plain, small: 0.0,  # the gate has measured it on the held-out data
            )
        except UserError as error:
            return self._settle(job, "failed", JobFailure(error.code, error.message, error.param))
        self.jobs.record(job, {"adapter_digest": version.digest, "adapter_version": version.version})
        return True

    def activate(self, job_id: str) -> bool:
        """Make the new version the active one; the job has succeeded."""
        job = self._running(job_id)
        if job is None:
            return False
        assert job.adapter_version is not None, "activate before publish"
        try:
            self.open_store().aliases.activate(job.tenant, job.name, job.adapter_version)
        except NotFound as error:
            return self._settle(job, "failed", JobFailure("adapter_deleted", error.message))
        tokens = RunFolder(job.run_dir).result().get("tokens") or job.progress.get("tokens")
        self.jobs.record(job, {"progress": {**job.progress, "trained_tokens": tokens, "eta_s": 0}})
        self.jobs.end(job, JobStatus.SUCCEEDED)
        RunFolder(job.run_dir).drop_checkpoints()
        return True

    def fail(self, job_id: str, error: Exception) -> None:
        """A step failed for good: the job ends instead of hanging."""
        job = self.jobs.find(job_id)
        if job is None:
            return
        failure = JobFailure("internal_error", f"the job runner failed: {type(error).__name__}: {error}")
        if isinstance(error, UserError):
            failure = JobFailure(error.code, error.message, error.param)
        self.jobs.end(job, JobStatus.FAILED, failure)

    def _running(self, job_id: str) -> Job | None:
        job = self.jobs.find(job_id)
        if job is None or job.status is not JobStatus.RUNNING:
            return None
        return job if (job.executor or SUBPROCESS) == self.executor else None

    def _settle(self, job: Job, outcome: Outcome, failure: JobFailure | None) -> bool:
        """Set the status that follows from the outcome; True if the next step follows."""
        if outcome == "failed":
            self.jobs.end(job, JobStatus.FAILED, failure)
        elif outcome == "cancelled":
            self.jobs.end(job, JobStatus.CANCELLED)
        elif outcome == "paused":
            self.jobs.settle_pause(job)
            return False
        elif outcome == "gone":
            shutil.rmtree(job.run_dir, ignore_errors=True)
        if outcome != "done":
            RunFolder(job.run_dir).drop_checkpoints()
        return outcome == "done"

    def _fault(self, job: Job) -> JobFailure | None:
        try:
            TrainSpec.from_mapping(job.spec)
            for name, param in _PARAMS.items():
                if (job.run_dir / name).exists():
                    read_jsonl(job.run_dir / name, what=param)
            write_spec(job, SPEC_FILE)
        except (SpecError, DataRejected) as error:
            return JobFailure(error.code, error.message, error.param)
        except FileNotFoundError as error:
            return JobFailure("file_not_found", f"{error.filename} no longer exists", "training_file")
        except StoreError as error:
            return JobFailure(error.code, error.message)
        free = shutil.disk_usage(job.run_dir).free
        if free < DISK_BYTES:
            return JobFailure("disk_full", f"{free} bytes are free for the run, at least {DISK_BYTES} are needed")
        return None

    def _base(self, job: Job) -> BaseDescription | None:
        return next((base for base in self.open_store().bases() if base.digest == job.base_digest), None)


def _with_advice(job: Job, failure: JobFailure, device: str) -> JobFailure:
    """Out of memory is a common cause of a kill: add the changes that would fit the memory free now."""
    free = free_bytes(device, job.ranks)
    changes = [] if free is None else advice(TrainSpec.from_mapping(job.spec), free // job.ranks)
    return replace(failure, message="; ".join((failure.message, *changes)))


def _config(path: Path, base_name: str) -> bytes:
    """The adapter's config, without the path on this machine that PEFT writes into it."""
    body = {**json.loads(path.read_text()), "base_model_name_or_path": base_name}
    return json.dumps(body, indent=2, sort_keys=True).encode()
