"""/v1/fine_tuning/jobs in OpenAI's shapes, with pause and resume; /admin/jobs for an operator. Decides no policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Query
from starlette.responses import FileResponse

from adapters_store.accounts.keys import Scope
from server.api.auth import Caller, CallerDep, guarded, require_admin
from server.api.context import ApiContext, ContextDep
from server.api.request_body import json_body
from server.api.routes.fine_tuning_schemas import NewFineTuningJob, Override
from server.api.routes.onboarding import OnboardingDep, owner
from server.api.routes.uploads import ensure_tenant
from server.api.target import find_version
from server.api.wire.errors import ApiError
from server.api.wire.json_body import body_schema
from server.api.wire.paging import After, page
from server.api.wire.thread_route import ThreadRoute
from server.jobs.service import Onboarding, starting_adapter
from server.jobs.store.job_request import StartingAdapter
from server.jobs.store.objects import checkpoint_object, event_object, job_object
from server.jobs.store.records import Job

JOBS_PATH = "/v1/fine_tuning/jobs"
DEFAULT_JOBS = 20

NewJobDep = Annotated[NewFineTuningJob, Depends(json_body(NewFineTuningJob))]
OverrideDep = Annotated[Override, Depends(json_body(Override))]
JobLimit = Annotated[int, Query(ge=1, le=1000)]
ReportFormat = Literal["html", "json"]

router = APIRouter(route_class=ThreadRoute)
_change, _look, _JOB = guarded(Scope.JOBS), guarded(Scope.READ, Scope.JOBS), f"{JOBS_PATH}/{{job_id}}"


@router.post(JOBS_PATH, dependencies=_change, openapi_extra=body_schema(NewFineTuningJob))
async def create_job(
    body: NewJobDep, caller: CallerDep, context: ContextDep, onboarding: OnboardingDep
) -> dict[str, Any]:
    """Queue a job. Bad data is refused here, by line, and bad fields by name."""

    def create() -> Job:
        ensure_tenant(context, caller.tenant)
        return onboarding.create(caller.tenant, body.to_request(), _start(context, caller, body.model))

    return job_object(await anyio.to_thread.run_sync(create, limiter=context.check_slots))


@router.get(JOBS_PATH, dependencies=_look)
def list_jobs(
    caller: CallerDep, onboarding: OnboardingDep, limit: JobLimit = DEFAULT_JOBS, after: After = None
) -> dict[str, Any]:
    """The caller's jobs, the newest first."""
    jobs = onboarding.jobs.list(owner(caller))
    return page([job_object(job) for job in jobs], limit, after)


@router.get(_JOB, dependencies=_look)
def get_job(job_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    return job_object(_find(onboarding, caller, job_id))


@router.get(f"{_JOB}/events", dependencies=_look)
def list_events(
    job_id: str, caller: CallerDep, onboarding: OnboardingDep, limit: JobLimit = DEFAULT_JOBS, after: After = None
) -> dict[str, Any]:
    """The job's events, the newest first."""
    job = _find(onboarding, caller, job_id)
    events = onboarding.jobs.events(job)
    return page([event_object(event) for event in events], limit, after)


@router.get(f"{_JOB}/checkpoints", dependencies=_look)
def list_checkpoints(
    job_id: str, caller: CallerDep, onboarding: OnboardingDep, limit: JobLimit = DEFAULT_JOBS, after: After = None
) -> dict[str, Any]:
    """Training states that the job was or can be resumed from, the newest first."""
    job = _find(onboarding, caller, job_id)
    checkpoints = onboarding.jobs.checkpoints(job)
    return page([checkpoint_object(job, each) for each in checkpoints], limit, after)


@router.get(f"{_JOB}/report", dependencies=_look, response_class=FileResponse)
def get_report(
    job_id: str, caller: CallerDep, onboarding: OnboardingDep, format: ReportFormat = "json"
) -> FileResponse:
    """How the training went and what the gate measured, as JSON or as one self-contained page."""
    job = _find(onboarding, caller, job_id)
    path = job.run_dir / f"report.{format}"
    if not path.is_file():
        raise ApiError(404, "report_not_found", f"{job_id} has no report yet; it is {job.status}.", param="job_id")
    headers = {
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox",
    }
    media_type = "text/html" if format == "html" else "application/json"
    return FileResponse(path, media_type=media_type, headers=headers)


@router.post(f"{_JOB}/cancel", dependencies=_change)
def cancel_job(job_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """End a job. One that trains ends within a step; what it had trained is deleted."""
    return _ask(onboarding, caller, job_id, onboarding.jobs.cancel)


@router.post(f"{_JOB}/pause", dependencies=_change)
def pause_job(job_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """Let a job write a checkpoint and wait. Other jobs may run meanwhile."""
    return _ask(onboarding, caller, job_id, onboarding.jobs.pause)


@router.post(f"{_JOB}/resume", dependencies=_change)
def resume_job(job_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """Queue a paused job again; it resumes from its checkpoint."""
    return _ask(onboarding, caller, job_id, onboarding.jobs.resume)


@router.post(
    "/admin/jobs/{job_id}/override", dependencies=[Depends(require_admin)], openapi_extra=body_schema(Override)
)
def override_gate(job_id: str, body: OverrideDep, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """Put an adapter into service that the gate blocked. The job keeps the admin's name and reason."""
    job = onboarding.jobs.get(job_id)
    return job_object(onboarding.jobs.override(job, by=caller.actor, reason=body.reason))


def _start(context: ApiContext, caller: Caller, model: str) -> StartingAdapter | None:
    """The adapter version that `model` names, as in OpenAI's API; None: it names the base, or nothing."""
    if model == context.engine.served_name:
        return None
    try:
        version = find_version(context, caller, model)
    except ApiError as error:
        if error.status != 404:
            raise
        return None
    return starting_adapter(context.store, version)


def _find(onboarding: Onboarding, caller: Caller, job_id: str) -> Job:
    return onboarding.jobs.get(job_id, owner(caller))


def _ask(onboarding: Onboarding, caller: Caller, job_id: str, ask: Callable[[Job], Job]) -> dict[str, Any]:
    return job_object(ask(_find(onboarding, caller, job_id)))
