"""/v1/batches in OpenAI's shapes: many requests of one file, answered when the server has room. Decides no pace."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Query
from pydantic import Field

from adapters_store.accounts.keys import Scope
from server.api.auth import CallerDep, guarded
from server.api.batches.lines import check_lines
from server.api.context import ContextDep
from server.api.request_body import json_body
from server.api.routes.onboarding import OnboardingDep, owner
from server.api.wire.body import Body, Metadata
from server.api.wire.json_body import body_schema
from server.api.wire.paging import After, page
from server.api.wire.thread_route import ThreadRoute
from server.jobs.limits import JobRefused
from server.jobs.store.batch_store import Batch, BatchStatus, NewBatch

DEFAULT_BATCHES = 20
INPUT_PURPOSE = "batch"


class NewBatchBody(Body):
    """endpoint: the route of every line. completion_window: what is not answered by then is not answered."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=128)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


NewBatchDep = Annotated[NewBatchBody, Depends(json_body(NewBatchBody))]
BatchesLimit = Annotated[int, Query(ge=1, le=100)]

router = APIRouter(route_class=ThreadRoute, prefix="/v1/batches")
_change, _look = guarded(Scope.INFERENCE), guarded(Scope.INFERENCE, Scope.READ)


@router.post("", dependencies=_change, openapi_extra=body_schema(NewBatchBody))
async def create_batch(
    body: NewBatchDep, caller: CallerDep, context: ContextDep, onboarding: OnboardingDep
) -> dict[str, Any]:
    """Answer every line of a file. A line that is no request is refused here, by its number."""

    def create() -> Batch:
        file = onboarding.files.get(caller.tenant, body.input_file_id, param="input_file_id")
        if file.purpose != INPUT_PURPOSE:
            message = f"input_file_id: the file's purpose must be {INPUT_PURPOSE!r}, got {file.purpose!r}"
            raise JobRefused("invalid_batch_file", message, param="input_file_id")
        num_lines = check_lines(
            onboarding.files.present_path(file),
            body.endpoint,
            max_lines=onboarding.batch_limits.max_lines,
            max_bytes=context.settings.max_body_bytes,
        )
        new = NewBatch(
            tenant=caller.tenant,
            base_digest=context.engine.base.digest,
            endpoint=body.endpoint,
            input_file_id=file.id,
            num_lines=num_lines,
            metadata=body.metadata,
        )
        return onboarding.batches.add(new)

    return batch_object(await anyio.to_thread.run_sync(create, limiter=context.check_slots))


@router.get("", dependencies=_look)
def list_batches(
    caller: CallerDep, onboarding: OnboardingDep, limit: BatchesLimit = DEFAULT_BATCHES, after: After = None
) -> dict[str, Any]:
    """The caller's batches, the newest first."""
    return page([batch_object(batch) for batch in onboarding.batches.list(owner(caller))], limit, after)


@router.get("/{batch_id}", dependencies=_look)
def get_batch(batch_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    return batch_object(onboarding.batches.get(owner(caller), batch_id))


@router.post("/{batch_id}/cancel", dependencies=_change)
def cancel_batch(batch_id: str, caller: CallerDep, onboarding: OnboardingDep) -> dict[str, Any]:
    """End a batch. Lines that are answered by then are in its files."""
    return batch_object(onboarding.batches.cancel(owner(caller), batch_id))


def batch_object(batch: Batch) -> dict[str, Any]:
    """As OpenAI's clients read it."""

    def ended(status: BatchStatus) -> int | None:
        return batch.ended_at if batch.status is status else None

    counts = {"total": batch.num_lines, "completed": batch.num_completed, "failed": batch.num_failed}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": _errors(batch),
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.created_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": ended(BatchStatus.COMPLETED),
        "failed_at": ended(BatchStatus.FAILED),
        "expired_at": ended(BatchStatus.EXPIRED),
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": ended(BatchStatus.CANCELLED),
        "request_counts": counts,
        "metadata": batch.metadata,
    }


def _errors(batch: Batch) -> dict[str, Any] | None:
    if batch.error_code is None:
        return None
    error = {"code": batch.error_code, "message": batch.error_message, "line": None, "param": "input_file_id"}
    return {"object": "list", "data": [error]}
