"""/v1/adapters/{name}/warm, pin, unpin: which adapters this server has on the device before requests want them.

A tenant warms its own; a pin takes memory that all tenants share, so only an operator sets it. Neither outlives the
process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from socket import gethostname
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from adapters_store.accounts.keys import Scope
from adapters_store.errors import StoreError
from adapters_store.tiers.entries import Owner, Residency
from adapters_store.versions.records import AdapterVersion
from server.api.auth import Caller, CallerDep, guarded, require_admin
from server.api.context import ApiContext, ContextDep
from server.api.edge.body_limits import UPLOAD_PATH
from server.api.target import find_version, quotas_of
from server.api.wire.errors import engine_dead
from server.api.wire.thread_route import ThreadRoute

router = APIRouter(route_class=ThreadRoute, prefix=f"{UPLOAD_PATH}/{{name:path}}", dependencies=guarded(Scope.ADAPTERS))


@router.post("/warm", status_code=202)
async def warm(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Begin to load `name` or `name@version` to the device, so that its first request need not wait. Asked again, it
    answers how far that is. Adapters that requests want come first; without room it stays in host memory. It counts as
    a request of the tenant's quota."""
    version = await run_in_threadpool(find_version, context, caller, name)
    quotas, engine = await quotas_of(context, version.tenant), context.engine
    await context.meters.admit(version.tenant, quotas)
    owner = Owner(version.tenant, quotas.weight)
    return await _answer(context, caller, version, lambda: engine.warm_adapter(version.digest, version.ref, owner))


@router.post("/pin")
async def pin(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Keep it on the device, until it is unpinned or leaves service or the server ends. It must be there: warm it
    first. Half of the device's adapter memory stays unpinned."""
    version = await _version_of_operator(name, caller, context)
    answer = await _answer(context, caller, version, lambda: context.engine.pin_adapter(version.digest))
    try:
        await _note(context, "adapter.pin", version)
    except StoreError:
        context.engine.unpin_adapter(version.digest)
        raise
    return answer


@router.post("/unpin")
async def unpin(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Allow its eviction again."""
    version = await _version_of_operator(name, caller, context)
    await _note(context, "adapter.unpin", version)
    return await _answer(context, caller, version, lambda: context.engine.unpin_adapter(version.digest))


async def _note(context: ApiContext, action: str, version: AdapterVersion) -> None:
    """In the audit log, with the machine: each server has pins of its own. Raises StoreError: what cannot be written
    down is not done."""
    record = partial(context.store.audit.record, digest=version.digest, host=gethostname())
    await run_in_threadpool(record, action, tenant=version.tenant, target=version.ref)


async def _version_of_operator(name: str, caller: Caller, context: ApiContext) -> AdapterVersion:
    """A name that is not the caller's is a 404 for every key, as on all routes."""
    version = await run_in_threadpool(find_version, context, caller, name)
    await require_admin(caller)
    return version


async def _answer(
    context: ApiContext, caller: Caller, version: AdapterVersion, ask: Callable[[], Future[Residency]]
) -> dict[str, Any]:
    if not context.engine.is_healthy():
        raise engine_dead()
    residency = await asyncio.wrap_future(ask())
    return {
        "id": caller.ref_to(version.tenant, version.ref),
        "object": "adapter.residency",
        "digest": version.digest,
        "state": residency.state,
        "pinned": residency.pinned,
    }
