"""/v1/files: upload, list, read and delete a tenant's training data, in OpenAI's shapes. Disk runs on threads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse

from adapters_store.accounts.keys import Scope
from server.api.auth import CallerDep, guarded
from server.api.context import ContextDep
from server.api.edge.body_limits import FILES_PATH
from server.api.routes.onboarding import OnboardingDep, owner
from server.api.routes.uploads import ensure_tenant, receive, upload_slot
from server.api.wire.paging import After, page
from server.api.wire.thread_route import ThreadRoute
from server.jobs.limits import JobRefused
from server.jobs.store.data_files import PURPOSES
from server.jobs.store.readable_data import SOURCES
from server.jobs.store.records import DataFile
from trainer.data.formats.convert import Report, check_file, columns_of
from trainer.data.problems import DataRejected

MAX_PURPOSE_BYTES = 64
MAX_LISTED = 10_000
FILE_PART = "file"

FileLimit = Annotated[int, Query(ge=1, le=MAX_LISTED)]
Order = Literal["asc", "desc"]
Columns = Annotated[str, Query(max_length=1024)]
Purpose = Annotated[str | None, Query(max_length=64)]

router = APIRouter(route_class=ThreadRoute, prefix=FILES_PATH)
_change, _look = guarded(Scope.JOBS), guarded(Scope.READ, Scope.JOBS)


def _upload_schema() -> dict[str, Any]:
    properties = {
        FILE_PART: {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
    }
    schema = {"type": "object", "required": [FILE_PART, "purpose"], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post("", dependencies=_change, openapi_extra=_upload_schema())
async def upload_file(
    request: Request, caller: CallerDep, context: ContextDep, onboarding: OnboardingDep
) -> dict[str, Any]:
    """Keep a file: parts `file` and `purpose` ("fine-tune" or "batch"). Its lines are checked when a job or a batch
    names it."""
    limits = {"purpose": MAX_PURPOSE_BYTES, FILE_PART: onboarding.limits.max_file_bytes}
    async with upload_slot(context, caller.tenant) as (incoming, spool):
        upload = await receive(request, spool, limits, file_part=FILE_PART, incoming=incoming)
        purpose = upload.fields["purpose"].decode("utf-8", "replace")

        def add() -> DataFile:
            ensure_tenant(context, caller.tenant)
            context.upload_slots.check_room(spool.stat().st_size)  # what is kept is a copy
            name = upload.filename or "upload.jsonl"
            return onboarding.files.add(tenant=caller.tenant, filename=name, purpose=purpose, source=spool)

        return file_object(await anyio.to_thread.run_sync(add, limiter=context.check_slots))


@router.get("", dependencies=_look)
def list_files(
    caller: CallerDep,
    onboarding: OnboardingDep,
    *,
    purpose: Purpose = None,
    limit: FileLimit = MAX_LISTED,
    after: After = None,
    order: Order = "desc",
) -> dict[str, Any]:
    """The caller's files, the newest first."""
    files = onboarding.files.list(owner(caller), purpose)
    return page([file_object(file) for file in (files if order == "desc" else files[::-1])], limit, after)


@router.get("/{file_id}", dependencies=_look)
def get_file(file_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    return file_object(onboarding.files.get(owner(caller), file_id))


@router.get("/{file_id}/check", dependencies=_look)
async def check_content(
    file_id: str, caller: CallerDep, context: ContextDep, onboarding: OnboardingDep, columns: Columns = ""
) -> dict[str, Any]:
    """What a file holds, how a job would read it, and every line that it would refuse.

    columns: "user=NAME,assistant=NAME" shows how a table of other names would read."""

    def check() -> dict[str, Any]:
        file = onboarding.files.get(owner(caller), file_id)
        try:
            report = check_file(onboarding.files.present_path(file), columns=columns_of(columns), sources=SOURCES)
        except ValueError as error:
            raise JobRefused("invalid_value", f"columns: {error}", param="columns") from None
        except DataRejected as error:
            return {"id": file_id, "object": "file.check", "usable": False, **Report.of(error).to_mapping()}
        return {"id": file_id, "object": "file.check", "usable": report.is_usable, **report.to_mapping()}

    return await anyio.to_thread.run_sync(check, limiter=context.check_slots)


@router.get("/{file_id}/content", dependencies=_look, response_class=FileResponse)
def get_content(file_id: str, caller: CallerDep, onboarding: OnboardingDep) -> FileResponse:
    """The bytes as they were uploaded."""
    file = onboarding.files.get(owner(caller), file_id)
    path = onboarding.files.present_path(file)
    headers = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}", dependencies=_change)
def delete_file(file_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """Delete a file. A job that was made from it keeps its own copy."""
    onboarding.files.delete(owner(caller), file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def file_object(file: DataFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
