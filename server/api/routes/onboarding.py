"""What the routes for files and jobs share: the Onboarding service, and answers to its refusals. Knows no route."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.api.auth import Caller
from server.api.wire.errors import ApiError, to_api_error
from server.jobs.limits import JobLimit
from server.jobs.service import Onboarding


async def onboarding_of(request: Request) -> Onboarding:
    onboarding = request.app.state.onboarding
    assert isinstance(onboarding, Onboarding)
    return onboarding


OnboardingDep = Annotated[Onboarding, Depends(onboarding_of)]


def owner(caller: Caller) -> str | None:
    """The tenant whose files and jobs the caller sees; None for all tenants."""
    return None if caller.speaks_for_all else caller.tenant


@to_api_error.register
def _(error: JobLimit) -> ApiError:
    """Not to be repeated at once by a client that retries by itself: a second later nothing will have changed."""
    headers = {"x-should-retry": "false"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(int(error.retry_after_s))
    return ApiError(error.status, error.code, error.message, param=error.param, headers=headers)
