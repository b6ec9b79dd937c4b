"""/v1/adapters/{name}/...: which version a name means. What each verb does is the store's decision.

Every answer is the adapter with all its versions and shares, as GET /v1/adapters/{name} gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field

from adapters_store.accounts.keys import Scope
from adapters_store.errors import NotFound
from adapters_store.storage.names import split_ref
from adapters_store.versions.records import AdapterVersion
from server.api.auth import Caller, CallerDep, guarded
from server.api.context import ApiContext, ContextDep
from server.api.edge.body_limits import UPLOAD_PATH
from server.api.request_body import json_body
from server.api.routes.adapters import with_versions
from server.api.target import model_not_found, tenant_and_ref
from server.api.wire.body import Body
from server.api.wire.errors import ApiError
from server.api.wire.json_body import body_schema
from server.api.wire.thread_route import ThreadRoute


class Canary(Body):
    """percent: of the name's end users, distinguished by `user` in their requests. 0 ends the canary."""

    percent: Annotated[int, Field(ge=0, le=99)]


CanaryDep = Annotated[Canary, Depends(json_body(Canary))]

router = APIRouter(route_class=ThreadRoute, prefix=f"{UPLOAD_PATH}/{{name:path}}", dependencies=guarded(Scope.ADAPTERS))


@router.post("/activate")
def activate(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Let the bare name mean `name@version` alone. A version that was unloaded is in service again."""
    aliases = context.store.aliases
    return _changed(context, caller, name, lambda tenant, bare, number: aliases.activate(tenant, bare, _given(number)))


@router.post("/canary", openapi_extra=body_schema(Canary))
def canary(name: str, caller: CallerDep, context: ContextDep, body: CanaryDep) -> dict[str, Any]:
    """Answer a share of the bare name's users with `name@version`; the same users every time."""

    def change(tenant: str, bare: str, number: int | None) -> AdapterVersion:
        return context.store.aliases.set_canary(tenant, bare, _given(number), body.percent)

    return _changed(context, caller, name, change)


@router.post("/promote")
def promote(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Make the canary (`name@version` if there are several) what the bare name means."""
    return _changed(context, caller, name, context.store.aliases.promote)


@router.post("/rollback")
def roll_back(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """End the canaries; if there are none, activate the version that was active before."""

    def change(tenant: str, bare: str, number: int | None) -> AdapterVersion:
        if number is not None:
            raise ApiError(400, "invalid_value", f"name: rollback takes a name without a version, got {name!r}")
        return context.store.aliases.roll_back(tenant, bare)

    return _changed(context, caller, name, change)


@router.post("/unload")
def unload(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Take `name` or `name@version` out of service and out of memory until it is activated again. Its files stay.

    Requests that are running finish; new ones are answered 404 `adapter_unloaded`.
    """

    def change(tenant: str, bare: str, number: int | None) -> AdapterVersion:
        context.engine.forget_adapters(context.store.aliases.unload(tenant, bare, number))
        versions = context.store.versions(tenant, bare)
        chosen = (each for each in versions if (each.active if number is None else each.version == number))
        return next(chosen, versions[-1])

    return _changed(context, caller, name, change)


def _given(number: int | None) -> int:
    if number is None:
        raise ApiError(400, "invalid_value", "name: a version is required, as in name@3", param="name")
    return number


def _changed(
    context: ApiContext, caller: Caller, name: str, change: Callable[[str, str, int | None], AdapterVersion]
) -> dict[str, Any]:
    """change: of a tenant's name and the version's number, if the name has one; returns the version to show."""
    tenant, ref = tenant_and_ref(caller, name)
    try:
        version = change(tenant, *split_ref(ref))
    except NotFound as error:
        if error.code == "adapter_unloaded":
            raise
        raise model_not_found(name) from None
    return with_versions(caller, version, context.store.versions(version.tenant, version.name))
