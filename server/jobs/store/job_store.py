"""Jobs as the rest of the product sees them: created, read, paused, cancelled, resumed. Knows no process.

Any caller may change what is `wanted` of a job. A job that is validating, queued or paused changes its status at once;
a running job's status is changed by the worker alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection

from adapters_store.accounts.tenant_rows import tenant_id
from adapters_store.errors import Conflict, NotFound
from adapters_store.parsing.strict_json import shown
from adapters_store.storage import audit
from adapters_store.storage.database import Database, now_s
from server.jobs.limits import JobLimit, JobLimits
from server.jobs.store import job_rows
from server.jobs.store.records import WORKING, Job, JobCheckpoint, JobEvent, JobFailure, JobStatus, Level
from server.jobs.store.served_bases import ServedBases
from trainer.redaction import redact_folders

DAY_S = 86_400
RUNS = "runs"  # in the data directory
_IDLE = (JobStatus.VALIDATING, JobStatus.QUEUED, JobStatus.PAUSED)
_ACTIVE = (*WORKING, JobStatus.PAUSED)
_NOT_CANCELLED = ("run", "pause")


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a job is created with."""

    tenant: str
    name: str
    request: Mapping[str, Any]
    spec: Mapping[str, Any]
    base_digest: str


# Inside the class `list` is the method.
Events = list[JobEvent]
Checkpoints = list[JobCheckpoint]


class JobStore:
    """Safe from many threads and processes. runs: the folder that holds every job's own folder.

    Rows hold no path of a host; the jobs that are handed out have this host's.
    """

    def __init__(self, database: Database, data_dir: Path, limits: JobLimits) -> None:
        self._database = database
        self._data_dir = data_dir
        self.runs = data_dir / RUNS
        self.bases = ServedBases(database)
        self._limits = limits

    def new_id(self) -> str:
        return f"ftjob-{uuid4().hex[:24]}"

    def add(self, job_id: str, new: NewJob) -> Job:
        """Raises JobLimit (too_many_jobs, too_many_jobs_today), NotFound (tenant_not_found)."""
        with self._database.write(changes_answers=False) as connection:
            owner = tenant_id(connection, new.tenant, lock=True)
            self._check_limits(connection, owner)
            values = {"id": job_id, "name": new.name, "status": JobStatus.VALIDATING, "request": new.request}
            values |= {"spec": new.spec, "base_digest": new.base_digest, "run_dir": str(PurePosixPath(RUNS, job_id))}
            job_rows.insert_job(connection, owner, values)
            job = self._found(connection, job_id)
            audit.note(connection, "job.create", tenant=new.tenant, target=job_id)
            assert job is not None
            job_rows.add_event(connection, job, "created", f"Created fine-tuning job: {job_id}")
        return job

    def check_limits(self, tenant: str) -> None:
        """Raises as `add` does: so that no data is read for a job that is one too many."""
        with self._database.read() as connection:
            self._check_limits(connection, tenant_id(connection, tenant))

    def _check_limits(self, connection: Connection, owner: int) -> None:
        active = job_rows.count_jobs(connection, owner, statuses=_ACTIVE)
        today = job_rows.count_jobs(connection, owner, since_s=now_s() - DAY_S)
        limits = self._limits
        if active >= limits.max_active_jobs:
            message = f"the tenant has {active} jobs that have not ended, the limit is {limits.max_active_jobs}"
            raise JobLimit("too_many_jobs", message, retry_after_s=60)
        if today >= limits.max_jobs_per_day:
            message = f"the tenant made {today} jobs in 24 hours, the limit is {limits.max_jobs_per_day}"
            raise JobLimit("too_many_jobs_today", message, retry_after_s=3600)

    def get(self, job_id: str, tenant: str | None = None) -> Job:
        """Raises NotFound (job_not_found); the message is the same for another tenant's job."""
        job = self.find(job_id, tenant)
        if job is None:
            raise NotFound("job_not_found", f"no fine-tuning job {shown(job_id)}", param="fine_tuning_job_id")
        return job

    def find(self, job_id: str, tenant: str | None = None) -> Job | None:
        """None: the rows are proved to be this directory's, and hold no such job. Its training is then ended.

        Raises StoreError (wrong_store).
        """
        with self._database.proven() as connection:
            return self._found(connection, job_id, tenant)

    def _found(self, connection: Connection, job_id: str, tenant: str | None = None) -> Job | None:
        job = job_rows.find_job(connection, job_id, tenant)
        return None if job is None else job.at(self._data_dir, self.bases.paths(connection))

    def list(self, tenant: str | None = None, statuses: Collection[JobStatus] | None = None) -> list[Job]:
        """The newest first; of every tenant if none is given."""
        with self._database.read() as connection:
            jobs = job_rows.list_jobs(connection, tenant, statuses)
            paths = self.bases.paths(connection) if jobs else {}
            return [job.at(self._data_dir, paths) for job in jobs]

    def events(self, job: Job) -> Events:
        with self._database.read() as connection:
            return job_rows.list_events(connection, job)

    def find_event(self, job: Job, key: str) -> JobEvent | None:
        """None: it was never noted, or the job's tenant is deleted."""
        with self._database.read() as connection:
            return job_rows.find_event(connection, job, key)

    def checkpoints(self, job: Job) -> Checkpoints:
        with self._database.read() as connection:
            return job_rows.list_checkpoints(connection, job)

    def has_work(self) -> bool:
        """Whether a worker would find something to do."""
        return bool(self.list(statuses=WORKING))

    def last_starts(self) -> dict[str, int]:
        with self._database.read() as connection:
            return job_rows.last_starts(connection)

    def cancel(self, job: Job) -> Job:
        """Raises Conflict (job_has_ended)."""
        ended = {"status": JobStatus.CANCELLED, "wanted": "cancel", "finished_at": now_s()}
        return self._request(job, "cancel", ended, "The job has been cancelled")

    def pause(self, job: Job) -> Job:
        """Raises Conflict (job_has_ended)."""
        return self._request(job, "pause", {"status": JobStatus.PAUSED, "wanted": "pause"}, "The job is paused")

    def _request(self, job: Job, wanted: str, at_once: Mapping[str, Any], message: str) -> Job:
        """Change an idle job at once; record what is wanted of a running one. A cancel stays."""
        before = () if wanted == "cancel" else _NOT_CANCELLED
        with self._database.write(changes_answers=False) as connection:
            if job_rows.change(connection, job.id, at_once, only_in=_IDLE):
                job_rows.add_event(connection, job, f"{wanted}:{uuid4().hex[:8]}", message)
            elif not job_rows.change(connection, job.id, {"wanted": wanted}, (JobStatus.RUNNING,), wanted=before):
                raise self._ended(job.id, wanted)
            audit.note(connection, f"job.{wanted}", tenant=job.tenant, target=job.id)
        return self.get(job.id)

    def resume(self, job: Job) -> Job:
        """Queue a paused job again, or withdraw a request to pause. Raises Conflict (job_has_ended)."""
        status = JobStatus.VALIDATING if job.started_at is None else JobStatus.QUEUED
        with self._database.write(changes_answers=False) as connection:
            again = {"status": status, "wanted": "run", "run_number": job.run_number + 1}
            if job_rows.change(connection, job.id, again, only_in=(JobStatus.PAUSED,)):
                job_rows.add_event(connection, job, f"resume:{job.run_number}", "The job was resumed")
            elif not job_rows.change(connection, job.id, {"wanted": "run"}, tuple(WORKING), wanted=_NOT_CANCELLED):
                raise self._ended(job.id, "resume")
            audit.note(connection, "job.resume", tenant=job.tenant, target=job.id)
        return self.get(job.id)

    def override(self, job: Job, *, by: str, reason: str) -> Job:
        """Activate an adapter although the gate blocked it; the operator and the reason are recorded.

        Raises Conflict (not_blocked) for any other job.
        """
        if job.failure is None or job.failure.code != "gate_blocked":
            raise Conflict("not_blocked", f"{job.id}: is {job.status} and was not blocked by the gate", param="job")
        decision = {"by": by, "reason": reason, "at": now_s()}
        again = {"status": JobStatus.QUEUED, "wanted": "run", "run_number": job.run_number + 1, "override": decision}
        again |= {"finished_at": None, "error_code": None, "error_message": None, "error_param": None}
        with self._database.write(changes_answers=False) as connection:
            if not job_rows.change(connection, job.id, again, only_in=(JobStatus.FAILED,)):
                raise Conflict("not_blocked", f"{job.id}: its status changed meanwhile", param="job")
            message = f"The gate's verdict was overridden by {by}: {reason}"
            job_rows.add_event(connection, job, f"override:{job.run_number}", message, level="warn", data=decision)
            audit.note(connection, "job.override", tenant=job.tenant, target=job.id, by=by, reason=reason)
        return self.get(job.id)

    def move(self, job: Job, status: JobStatus, *, only_in: Collection[JobStatus], **values: Any) -> bool:
        """For the worker: set the next status if the job is still in one of `only_in`."""
        with self._database.write(changes_answers=False) as connection:
            return job_rows.change(connection, job.id, {"status": status, **values}, only_in)

    def settle_pause(self, job: Job) -> None:
        """For the worker: its training has paused; set the status that the owner wants by now."""
        running = (JobStatus.RUNNING,)
        again = {"status": JobStatus.QUEUED, "run_number": job.run_number + 1}
        with self._database.write(changes_answers=False) as connection:
            if job_rows.change(connection, job.id, {"status": JobStatus.PAUSED}, running, wanted=("pause",)):
                job_rows.add_event(connection, job, f"paused:{job.run_number}", "The job is paused")
                return
            if job_rows.change(connection, job.id, again, running, wanted=("run",)):
                return
        self.end(job, JobStatus.CANCELLED)

    def end(self, job: Job, status: JobStatus, failure: JobFailure | None = None) -> bool:
        """For the worker: end the job, with a last event. A job that has ended already stays as it is."""
        values: dict[str, Any] = {"status": status, "finished_at": now_s()}
        message = f"The job has {status}" if status is not JobStatus.CANCELLED else "The job has been cancelled"
        if failure is not None:
            reason = redact_folders(failure.message)
            values |= {"error_code": failure.code, "error_message": reason, "error_param": failure.param}
            message = f"{message}: {reason}"
        level: Level = "error" if failure is not None else "info"
        with self._database.write(changes_answers=False) as connection:
            if not job_rows.change(connection, job.id, values, only_in=_ACTIVE):
                return False
            job_rows.add_event(connection, job, f"end:{job.run_number}", message, level=level)
        return True

    def note(self, job: Job, key: str, message: str, *, level: Level = "info", **data: Any) -> None:
        """For the worker: an event, once per key."""
        with self._database.write(changes_answers=False) as connection:
            if job_rows.find_job(connection, job.id) is not None:  # else its tenant was deleted
                text = redact_folders(message)
                job_rows.add_event(connection, job, key, text, level=level, data=redact_folders(data))

    def record(self, job: Job, values: Mapping[str, Any], entries: Collection[Mapping[str, Any]] = ()) -> None:
        """For the worker: a heartbeat with the columns, metric events and checkpoints ("step") since the last one."""
        with self._database.write(changes_answers=False) as connection:
            is_here = job_rows.change(connection, job.id, {"heartbeat_at": now_s(), **values})
            for each in entries if is_here else ():
                if "checkpoint" in each:
                    job_rows.add_checkpoint(connection, job, each["checkpoint"], each["data"])
                else:
                    job_rows.add_event(connection, job, **each)

    def _ended(self, job_id: str, wanted: str) -> Conflict:
        job = self.get(job_id)
        state = "being cancelled" if job.wanted == "cancel" and not job.status.has_ended else job.status
        return Conflict("job_has_ended", f"{job_id}: cannot {wanted} a job that is {state}", param="status")
