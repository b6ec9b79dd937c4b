"""/v1/fine_tuning/jobs in OpenAI's shapes, with pause and resume; /admin/jobs for an operator. Decides no policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import Depends, FastAPI, Query
from starlette.responses import FileResponse

from adapters_store.accounts.keys import Scope
from server.api.auth import Caller, CallerDep, guarded, require_admin
from server.api.context import ContextDep, off_loop
from server.api.request_body import json_body
from server.api.routes.fine_tuning_schemas import NewFineTuningJob, Override
from server.api.routes.onboarding import OnboardingDep, owner
from server.api.routes.uploads import ensure_tenant
from server.api.wire.errors import ApiError
from server.api.wire.json_body import body_schema
from server.api.wire.paging import After, page
from server.jobs.service import Onboarding
from server.jobs.store.objects import checkpoint_object, event_object, job_object
from server.jobs.store.records import Job

JOBS_PATH = "/v1/fine_tuning/jobs"
DEFAULT_JOBS = 20

NewJobDep = Annotated[NewFineTuningJob, Depends(json_body(NewFineTuningJob))]
OverrideDep = Annotated[Override, Depends(json_body(Override))]
JobLimit = Annotated[int, Query(ge=1, le=1000)]
ReportFormat = Literal["html", "json"]


async def create_job(
    body: NewJobDep, caller: CallerDep, context: ContextDep, onboarding: OnboardingDep
) -> dict[str, Any]:
    """Queue a job. Bad data is refused here, by line, and bad fields by name."""

    def create() -> Job:
        ensure_tenant(context, caller.tenant)
        return onboarding.create(caller.tenant, body.to_request())

    return job_object(await anyio.to_thread.run_sync(create, limiter=context.check_slots))


async def list_jobs(
    caller: CallerDep, onboarding: OnboardingDep, limit: JobLimit = DEFAULT_JOBS, after: After = None
) -> dict[str, Any]:
    """The caller's jobs, the newest first."""
    jobs = await off_loop(onboarding.jobs.list, owner(caller))
    return page([job_object(job) for job in jobs], limit, after)


async def get_job(job_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    return job_object(await _find(onboarding, caller, job_id))


async def list_events(
    job_id: str, caller: CallerDep, onboarding: OnboardingDep, limit: JobLimit = DEFAULT_JOBS, after: After = None
) -> dict[str, Any]:
    """What the job has told, the newest first."""
    job = await _find(onboarding, caller, job_id)
    events = await off_loop(onboarding.jobs.events, job)
    return page([event_object(event) for event in events], limit, after)


async def list_checkpoints(
    job_id: str, caller: CallerDep, onboarding: OnboardingDep, limit: JobLimit = DEFAULT_JOBS, after: After = None
) -> dict[str, Any]:
    """The states that training was or can be gone on from, the newest first."""
    job = await _find(onboarding, caller, job_id)
    checkpoints = await off_loop(onboarding.jobs.checkpoints, job)
    return page([checkpoint_object(job, each) for each in checkpoints], limit, after)


async def get_report(
    job_id: str, caller: CallerDep, onboarding: OnboardingDep, format: ReportFormat = "json"
) -> FileResponse:
    """How the training went and what the gate measured, as JSON or as one self-contained page."""
    job = await _find(onboarding, caller, job_id)
    path = job.run_dir / f"report.{format}"
    if not path.is_file():
        raise ApiError(404, "report_not_found", f"{job_id} has no report yet; it is {job.status}.", param="job_id")
    headers = {
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox",
    }
    media_type = "text/html" if format == "html" else "application/json"
    return FileResponse(path, media_type=media_type, headers=headers)


async def cancel_job(job_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """End a job. One that trains ends within a step; what it had trained is dropped."""
    return await _ask(onboarding, caller, job_id, onboarding.jobs.cancel)


async def pause_job(job_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """Let a job checkpoint and wait. Its place goes to others."""
    return await _ask(onboarding, caller, job_id, onboarding.jobs.pause)


async def resume_job(job_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """Queue a paused job again; it goes on from its checkpoint."""
    return await _ask(onboarding, caller, job_id, onboarding.jobs.resume)


async def override_gate(job_id: str, body: OverrideDep, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """Put an adapter into service that the gate blocked. Who said so and why stays with the job."""
    job = await off_loop(onboarding.jobs.get, job_id)
    return job_object(await off_loop(onboarding.jobs.override, job, by=caller.actor, reason=body.reason))


async def _find(onboarding: Onboarding, caller: Caller, job_id: str) -> Job:
    return await off_loop(onboarding.jobs.get, job_id, owner(caller))


async def _ask(onboarding: Onboarding, caller: Caller, job_id: str, ask: Callable[[Job], Job]) -> dict[str, Any]:
    return job_object(await off_loop(ask, await _find(onboarding, caller, job_id)))


def register(app: FastAPI) -> None:
    change, look, one = guarded(Scope.JOBS), guarded(Scope.READ, Scope.JOBS), f"{JOBS_PATH}/{{job_id}}"
    schema = body_schema(NewFineTuningJob)
    app.add_api_route(JOBS_PATH, create_job, methods=["POST"], dependencies=change, openapi_extra=schema)
    app.add_api_route(JOBS_PATH, list_jobs, methods=["GET"], dependencies=look)
    app.add_api_route(one, get_job, methods=["GET"], dependencies=look)
    app.add_api_route(f"{one}/events", list_events, methods=["GET"], dependencies=look)
    app.add_api_route(f"{one}/checkpoints", list_checkpoints, methods=["GET"], dependencies=look)
    app.add_api_route(f"{one}/report", get_report, methods=["GET"], dependencies=look, response_class=FileResponse)
    for verb, ask in (("cancel", cancel_job), ("pause", pause_job), ("resume", resume_job)):
        app.add_api_route(f"{one}/{verb}", ask, methods=["POST"], dependencies=change)
    app.add_api_route(
        "/admin/jobs/{job_id}/override",
        override_gate,
        methods=["POST"],
        dependencies=[Depends(require_admin)],
        openapi_extra=body_schema(Override),
    )
