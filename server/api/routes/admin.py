"""/admin/tenants: who the tenants are. Admin key only, also where auth is off."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI
from pydantic import Field

from adapters_store.versions.records import Tenant
from server.api.auth import require_admin
from server.api.context import ApiContext, ContextDep, off_loop
from server.api.request_body import json_body
from server.api.wire.body import Body
from server.api.wire.json_body import body_schema
from server.api.wire.paging import DEFAULT_LIMIT, After, Limit, page


class NewTenant(Body):
    name: Annotated[str, Field(min_length=1, max_length=128)]


NewTenantDep = Annotated[NewTenant, Depends(json_body(NewTenant))]


async def create_tenant(body: NewTenantDep, context: ContextDep) -> dict[str, Any]:
    """Make a tenant. Its key is in this answer and never again."""
    key = await off_loop(context.store.tenants.create, body.name)
    tenant = await off_loop(context.store.tenants.get, body.name)
    return {**_tenant(tenant), "api_key": key.api_key}


async def list_tenants(context: ContextDep, limit: Limit = DEFAULT_LIMIT, after: After = None) -> dict[str, Any]:
    tenants = await off_loop(context.store.tenants.list)
    return page([_tenant(tenant) for tenant in tenants], limit, after)


async def get_tenant(name: str, context: ContextDep) -> dict[str, Any]:
    return _tenant(await off_loop(context.store.tenants.get, name))


async def disable_tenant(name: str, context: ContextDep) -> dict[str, Any]:
    """Its keys open nothing until it is enabled again."""
    return await _set_disabled(context, name, True)


async def enable_tenant(name: str, context: ContextDep) -> dict[str, Any]:
    return await _set_disabled(context, name, False)


async def _set_disabled(context: ApiContext, name: str, disabled: bool) -> dict[str, Any]:
    await off_loop(context.store.tenants.set_disabled, name, disabled)
    return _tenant(await off_loop(context.store.tenants.get, name))


async def delete_tenant(name: str, context: ContextDep) -> dict[str, Any]:
    """Delete a tenant, its keys and its adapters. What is being generated for it comes to its end."""
    digests = await off_loop(context.store.tenants.delete, name)
    context.engine.forget_adapters(digests)
    return {"id": name, "object": "tenant.deleted", "deleted": True, "digests": digests}


def _tenant(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.name,
        "object": "tenant",
        "tenant": tenant.name,
        "created": tenant.created_at,
        "disabled": tenant.disabled,
    }


def register(app: FastAPI) -> None:
    guarded = [Depends(require_admin)]
    one, schema = "/admin/tenants/{name}", body_schema(NewTenant)
    app.add_api_route(
        "/admin/tenants", create_tenant, methods=["POST"], dependencies=guarded, status_code=201, openapi_extra=schema
    )
    app.add_api_route("/admin/tenants", list_tenants, methods=["GET"], dependencies=guarded)
    app.add_api_route(one, get_tenant, methods=["GET"], dependencies=guarded)
    app.add_api_route(f"{one}/disable", disable_tenant, methods=["POST"], dependencies=guarded)
    app.add_api_route(f"{one}/enable", enable_tenant, methods=["POST"], dependencies=guarded)
    app.add_api_route(one, delete_tenant, methods=["DELETE"], dependencies=guarded)
