"""/admin: tenants with their keys and quotas, and the audit log. Admin key only, also with auth off."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from pydantic import Field

from adapters_store.accounts.keys import KeyInfo, KeySpec, parse_scopes
from adapters_store.accounts.records import MAX_OVERLAP_S, Quotas, Tenant, TenantKey
from adapters_store.parsing.numbers import MAX_INT
from server.api.auth import require_admin
from server.api.context import ApiContext, ContextDep
from server.api.request_body import json_body
from server.api.wire.body import Body
from server.api.wire.json_body import body_schema
from server.api.wire.paging import DEFAULT_LIMIT, After, Limit, page
from server.api.wire.thread_route import ThreadRoute

MAX_KEY_SCOPES = 64
_LAST_SECOND = 2**53
_TENANT = "/tenants/{name}"

Overlap = Annotated[int, Query(ge=0, le=MAX_OVERLAP_S)]
KeyId = Annotated[int | None, Query(ge=1, le=MAX_INT)]
KeyNumber = Annotated[int, Path(ge=1, le=MAX_INT)]
Count = Annotated[int, Field(ge=0, lt=2**63)] | None
Before = Annotated[int | None, Query(ge=1, le=2**53)]
OfTenant = Annotated[str | None, Query(max_length=128)]

router = APIRouter(route_class=ThreadRoute, prefix="/admin", dependencies=[Depends(require_admin)])


class NewTenant(Body):
    name: Annotated[str, Field(min_length=1, max_length=128)]


class NewKey(Body):
    """scopes None: all. expires_at: Unix seconds, None for never."""

    scopes: Annotated[list[str], Field(max_length=MAX_KEY_SCOPES)] | None = None
    expires_at: Annotated[int, Field(ge=0, le=_LAST_SECOND)] | None = None
    label: Annotated[str, Field(max_length=128)] | None = None


class QuotasBody(Body):
    """A quota that is left out has no limit."""

    weight: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    requests_per_minute: Count = None
    tokens_per_minute: Count = None
    max_concurrent: Count = None
    max_adapters: Count = None
    max_adapter_bytes: Count = None


NewTenantDep = Annotated[NewTenant, Depends(json_body(NewTenant))]
NewKeyDep = Annotated[NewKey, Depends(json_body(NewKey))]
QuotasDep = Annotated[QuotasBody, Depends(json_body(QuotasBody))]


@router.post("/tenants", status_code=201, openapi_extra=body_schema(NewTenant))
def create_tenant(body: NewTenantDep, context: ContextDep) -> dict[str, Any]:
    """Make a tenant. Its key is in this answer and never again."""
    key = context.store.tenants.create(body.name)
    return {**_tenant(context.store.tenants.get(body.name)), "api_key": key.api_key}


@router.get("/tenants")
def list_tenants(context: ContextDep, limit: Limit = DEFAULT_LIMIT, after: After = None) -> dict[str, Any]:
    return page([_tenant(tenant) for tenant in context.store.tenants.list_tenants()], limit, after)


@router.get(_TENANT)
def get_tenant(name: str, context: ContextDep) -> dict[str, Any]:
    return _tenant(context.store.tenants.get(name))


@router.post(f"{_TENANT}/disable")
def disable_tenant(name: str, context: ContextDep) -> dict[str, Any]:
    """The tenant's keys are refused until it is enabled again."""
    return _set_disabled(context, name, True)


@router.post(f"{_TENANT}/enable")
def enable_tenant(name: str, context: ContextDep) -> dict[str, Any]:
    return _set_disabled(context, name, False)


def _set_disabled(context: ApiContext, name: str, disabled: bool) -> dict[str, Any]:
    context.store.tenants.set_disabled(name, disabled)
    return _tenant(context.store.tenants.get(name))


@router.delete(_TENANT)
def delete_tenant(name: str, context: ContextDep) -> dict[str, Any]:
    """Delete a tenant, its keys and its adapters. Requests that are running finish."""
    digests = context.store.tenants.delete(name)
    context.engine.forget_adapters(digests)
    return {"id": name, "object": "tenant.deleted", "deleted": True, "digests": digests}


@router.post(f"{_TENANT}/keys", status_code=201, openapi_extra=body_schema(NewKey))
def create_key(name: str, body: NewKeyDep, context: ContextDep) -> dict[str, Any]:
    """Make one more key. It is in this answer and never again."""
    scopes = None if body.scopes is None else parse_scopes(body.scopes)
    new = KeySpec(scopes, body.expires_at, body.label)
    return _shown_once(context, context.store.tenants.create_key(name, new))


@router.get(f"{_TENANT}/keys")
def list_keys(name: str, context: ContextDep, limit: Limit = DEFAULT_LIMIT, after: After = None) -> dict[str, Any]:
    return page([_key(name, key) for key in context.store.tenants.keys(name)], limit, after)


@router.delete(f"{_TENANT}/keys/{{key_id}}")
def revoke_key(name: str, key_id: KeyNumber, context: ContextDep) -> dict[str, Any]:
    """End a key now."""
    context.store.tenants.revoke_key(name, key_id)
    return {"id": str(key_id), "object": "key.deleted", "deleted": True}


@router.post(f"{_TENANT}/rotate-key")
def rotate_key(name: str, context: ContextDep, overlap_s: Overlap = 0, key_id: KeyId = None) -> dict[str, Any]:
    """Make a new key. The old one works for overlap_s more seconds; without key_id all keys of the tenant do."""
    return _shown_once(context, context.store.tenants.rotate_key(name, overlap_s, key_id))


@router.get(f"{_TENANT}/quotas")
def get_quotas(name: str, context: ContextDep) -> dict[str, Any]:
    """What the tenant may use; null is no limit."""
    context.store.tenants.get(name)
    return _quotas(name, context.store.quotas.get(name))


@router.put(f"{_TENANT}/quotas", openapi_extra=body_schema(QuotasBody))
def set_quotas(name: str, body: QuotasDep, context: ContextDep) -> dict[str, Any]:
    """Replace all quotas of the tenant. They apply from the next request on."""
    quotas = Quotas(**body.model_dump())
    context.store.quotas.set(name, quotas)
    return _quotas(name, quotas)


@router.get("/audit")
def show_audit(
    context: ContextDep, tenant: OfTenant = None, before: Before = None, limit: Limit = DEFAULT_LIMIT
) -> dict[str, Any]:
    """Who did what, the newest first. before: the last id of the page before."""
    entries = context.store.audit.entries(tenant=tenant, before=before, limit=limit + 1)
    shown = [{"object": "audit_entry", **asdict(entry)} for entry in entries[:limit]]
    return {"object": "list", "data": shown, "has_more": len(entries) > limit}


def _tenant(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.name,
        "object": "tenant",
        "tenant": tenant.name,
        "created": tenant.created_at,
        "disabled": tenant.disabled,
    }


def _shown_once(context: ApiContext, made: TenantKey) -> dict[str, Any]:
    info = next(key for key in context.store.tenants.keys(made.tenant) if key.key_id == made.key_id)
    return {**_key(made.tenant, info), "api_key": made.api_key}


def _key(tenant: str, key: KeyInfo) -> dict[str, Any]:
    return {
        "id": str(key.key_id),
        "object": "key",
        "tenant": tenant,
        "label": key.label,
        "scopes": sorted(key.scopes),
        "created": key.created_at,
        "expires_at": key.expires_at,
    }


def _quotas(tenant: str, quotas: Quotas) -> dict[str, Any]:
    return {"object": "tenant.quotas", "tenant": tenant, **asdict(quotas)}
