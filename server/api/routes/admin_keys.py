"""/admin/tenants/NAME/keys: what keys a tenant holds, what each opens and until when. Admin key only."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query
from pydantic import Field

from adapters_store.accounts.keys import KeyInfo, KeyWishes, parse_scopes
from adapters_store.parsing.numbers import MAX_INT
from adapters_store.versions.records import TenantKey
from server.api.auth import require_admin
from server.api.context import ApiContext, ContextDep, off_loop
from server.api.request_body import json_body
from server.api.wire.body import Body
from server.api.wire.json_body import body_schema
from server.api.wire.paging import DEFAULT_LIMIT, After, Limit, page

MAX_OVERLAP_S = 30 * 86_400
_LAST_SECOND = 2**53
MAX_KEY_SCOPES = 64

Overlap = Annotated[int, Query(ge=0, le=MAX_OVERLAP_S)]
KeyId = Annotated[int | None, Query(ge=1, le=MAX_INT)]
KeyNumber = Annotated[int, Path(ge=1, le=MAX_INT)]


class NewKey(Body):
    """scopes None: all. expires_at: Unix seconds, None for never."""

    scopes: Annotated[list[str], Field(max_length=MAX_KEY_SCOPES)] | None = None
    expires_at: Annotated[int, Field(ge=0, le=_LAST_SECOND)] | None = None
    label: Annotated[str, Field(max_length=128)] | None = None


NewKeyDep = Annotated[NewKey, Depends(json_body(NewKey))]


async def create_key(name: str, body: NewKeyDep, context: ContextDep) -> dict[str, Any]:
    """Make one more key. It is in this answer and never again."""
    scopes = None if body.scopes is None else parse_scopes(body.scopes)
    wishes = KeyWishes(scopes, body.expires_at, body.label)
    return await _shown_once(context, await off_loop(context.store.tenants.create_key, name, wishes))


async def list_keys(
    name: str, context: ContextDep, limit: Limit = DEFAULT_LIMIT, after: After = None
) -> dict[str, Any]:
    keys = await off_loop(context.store.tenants.keys, name)
    return page([_key(name, key) for key in keys], limit, after)


async def revoke_key(name: str, key_id: KeyNumber, context: ContextDep) -> dict[str, Any]:
    """End a key now."""
    await off_loop(context.store.tenants.revoke_key, name, key_id)
    return {"id": str(key_id), "object": "key.deleted", "deleted": True}


async def rotate_key(name: str, context: ContextDep, overlap_s: Overlap = 0, key_id: KeyId = None) -> dict[str, Any]:
    """A new key; the old one, or all of the tenant where no key_id says which, open for overlap_s more seconds."""
    return await _shown_once(context, await off_loop(context.store.tenants.rotate_key, name, overlap_s, key_id))


async def _shown_once(context: ApiContext, made: TenantKey) -> dict[str, Any]:
    keys = await off_loop(context.store.tenants.keys, made.tenant)
    info = next(key for key in keys if key.key_id == made.key_id)
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


def register(app: FastAPI) -> None:
    guarded = [Depends(require_admin)]
    one, schema = "/admin/tenants/{name}", body_schema(NewKey)
    app.add_api_route(
        f"{one}/keys", create_key, methods=["POST"], dependencies=guarded, status_code=201, openapi_extra=schema
    )
    app.add_api_route(f"{one}/keys", list_keys, methods=["GET"], dependencies=guarded)
    app.add_api_route(f"{one}/keys/{{key_id}}", revoke_key, methods=["DELETE"], dependencies=guarded)
    app.add_api_route(f"{one}/rotate-key", rotate_key, methods=["POST"], dependencies=guarded)
