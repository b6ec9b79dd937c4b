"""/admin/tenants/{name}/quotas: what a tenant may use. Admin key only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from pydantic import Field

from adapters_store.versions.records import Quotas
from server.api.auth import require_admin
from server.api.context import ContextDep, off_loop
from server.api.request_body import json_body
from server.api.wire.body import Body
from server.api.wire.json_body import body_schema

Count = Annotated[int, Field(ge=0, lt=2**63)] | None


class QuotasBody(Body):
    """What is left out has no limit."""

    weight: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    requests_per_minute: Count = None
    tokens_per_minute: Count = None
    max_concurrent: Count = None
    max_adapters: Count = None
    max_adapter_bytes: Count = None


QuotasDep = Annotated[QuotasBody, Depends(json_body(QuotasBody))]


async def get_quotas(name: str, context: ContextDep) -> dict[str, Any]:
    """What the tenant may use; null is no limit."""
    await off_loop(context.store.tenants.get, name)
    return _object(name, await off_loop(context.store.quotas.get, name))


async def set_quotas(name: str, body: QuotasDep, context: ContextDep) -> dict[str, Any]:
    """Replace the tenant's quotas as a whole. They hold for the next request."""
    quotas = Quotas(**body.model_dump())
    await off_loop(context.store.quotas.set, name, quotas)
    return _object(name, quotas)


def _object(tenant: str, quotas: Quotas) -> dict[str, Any]:
    return {"object": "tenant.quotas", "tenant": tenant, **asdict(quotas)}


def register(app: FastAPI) -> None:
    guarded, path = [Depends(require_admin)], "/admin/tenants/{name}/quotas"
    app.add_api_route(path, get_quotas, methods=["GET"], dependencies=guarded)
    app.add_api_route(path, set_quotas, methods=["PUT"], dependencies=guarded, openapi_extra=body_schema(QuotasBody))
