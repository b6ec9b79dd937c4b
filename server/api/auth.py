"""Which tenant a request acts for, and which routes its key opens. A dependency of every route but /health, /ready and
/metrics.

A tenant's key acts for that tenant. An admin key, and any request with auth off, acts for the tenant in `X-Tenant-Id`.
Without the header it acts for all tenants, and as `default_tenant` if a route needs one.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from adapters_store.accounts.keys import ALL_SCOPES, Scope, Scopes
from adapters_store.storage.audit import Actor, act_as
from adapters_store.storage.names import check_name
from server.api.context import ApiContext, ContextDep
from server.api.settings import ApiSettings
from server.api.wire.errors import ApiError

MAX_KEY_BYTES = 512
CALLER_IN_SCOPE = "multilora.caller"  # what the server itself asks for; no client can write into a scope


@dataclass(frozen=True)
class Caller:
    """tenant: the one that this request acts for. speaks_for_all: neither key nor header limits it to that tenant.

    actor: the caller's name in the audit log. scopes: those of its key.
    """

    tenant: str
    is_admin: bool = False
    speaks_for_all: bool = False
    actor: str = "anyone"
    scopes: Scopes = ALL_SCOPES

    def may_speak_for(self, tenant: str) -> bool:
        return self.speaks_for_all or tenant == self.tenant

    def ref_to(self, tenant: str, ref: str) -> str:
        """The `model` with which this caller reaches `ref` of `tenant`."""
        return ref if tenant == self.tenant else f"{tenant}/{ref}"


async def authenticate(request: Request, context: ContextDep) -> Caller:
    """The caller behind a request. Raises ApiError 401 without a valid key, 403 for another's tenant."""
    caller = await _caller(request, context)
    act_as(Actor(caller.actor, getattr(request.state, "request_id", None)))
    return caller


async def _caller(request: Request, context: ApiContext) -> Caller:
    if isinstance(known := request.scope.get(CALLER_IN_SCOPE), Caller):
        return known
    named = _named_tenant(request)
    settings = context.settings
    if settings.auth == "off":
        key = request.headers.get("authorization", "").partition(" ")[2].strip()
        return _any_tenant(settings, named, is_admin=_is_admin_key(settings, key))
    key = _bearer_key(request)
    if _is_admin_key(settings, key):
        return _any_tenant(settings, named, is_admin=True)
    return await _tenant_caller(context, key, named)


def guarded(*scopes: Scope) -> list[Any]:
    """The dependencies of a route that takes a key with one of these scopes."""
    return [Depends(authenticate), Depends(_opened_by(frozenset(scopes)))]


def _opened_by(scopes: Scopes) -> Callable[[Caller], Awaitable[None]]:
    async def check(caller: CallerDep) -> None:
        if caller.scopes & scopes:
            return
        wanted, has = (" or ".join(sorted(each)) for each in (scopes, caller.scopes))
        message = f"This route needs a key with the scope {wanted}; this key has {has}."
        raise ApiError(403, "insufficient_scope", message)

    return check


async def require_admin(caller: CallerDep) -> Caller:
    if not caller.is_admin:
        raise ApiError(403, "admin_key_required", "This route needs an admin key in Authorization: Bearer KEY.")
    return caller


def _any_tenant(settings: ApiSettings, named: str | None, *, is_admin: bool) -> Caller:
    actor = "admin" if is_admin else "anyone"
    return Caller(named or settings.default_tenant, is_admin=is_admin, speaks_for_all=named is None, actor=actor)


async def _tenant_caller(context: ApiContext, key: str, named: str | None) -> Caller:
    grant = await run_in_threadpool(context.store.tenants.authenticate, key)
    if grant is None:
        raise _unauthorized("invalid_api_key", "The API key is not valid.")
    caller = Caller(grant.tenant, actor=f"key:{grant.key_id}", scopes=grant.scopes)
    if named is not None and not caller.may_speak_for(named):
        message = "The API key does not belong to the tenant in X-Tenant-Id."
        raise ApiError(403, "tenant_mismatch", message, param="X-Tenant-Id")
    return caller


def _named_tenant(request: Request) -> str | None:
    values = request.headers.getlist("x-tenant-id")
    if not values:
        return None
    if len(values) > 1:
        raise ApiError(
            400, "invalid_value", f"X-Tenant-Id must be sent once, got {len(values)} values", param="X-Tenant-Id"
        )
    check_name("X-Tenant-Id", values[0])
    return values[0]


def _bearer_key(request: Request) -> str:
    values = request.headers.getlist("authorization")
    if not values and (keys := request.headers.getlist("x-api-key")):  # Anthropic's clients
        values = [f"Bearer {key}" for key in keys]
    if not values:
        raise _unauthorized("missing_api_key", "No API key: send Authorization: Bearer KEY.")
    scheme, _, key = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not 0 < len(key.strip()) <= MAX_KEY_BYTES:
        raise _unauthorized("invalid_api_key", "The Authorization header must have the form: Bearer KEY.")
    return key.strip()


def _is_admin_key(settings: ApiSettings, key: str) -> bool:
    """Compares all hashes, so the time shows neither length nor content nor position of a match."""
    offered = hashlib.sha256(key.encode()).digest()
    matches = [hmac.compare_digest(offered, hashlib.sha256(known.encode()).digest()) for known in settings.admin_keys]
    return any(matches)


def _unauthorized(code: str, message: str) -> ApiError:
    return ApiError(401, code, message, headers={"www-authenticate": "Bearer"})


CallerDep = Annotated[Caller, Depends(authenticate)]
