"""GET /v1/models: the base, and the adapters of the caller that fit it, each with the base as its parent."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from adapters_store.accounts.keys import Scope
from adapters_store.versions.records import AdapterVersion
from server.api.auth import CallerDep, guarded
from server.api.context import ApiContext, ContextDep
from server.api.target import find_version
from server.api.wire.thread_route import ThreadRoute

router = APIRouter(route_class=ThreadRoute, prefix="/v1/models", dependencies=guarded(Scope.READ, Scope.INFERENCE))


@router.get("")
def list_models(caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """The base and the adapters of the caller's tenant; of every tenant for a caller that speaks for all."""
    versions = context.store.list_versions(None if caller.speaks_for_all else caller.tenant)
    usable = [version for version in versions if version.base_digest == context.engine.base.digest and version.loaded]
    adapters = [_adapter(context, version, caller.ref_to(version.tenant, version.name)) for version in usable]
    return {"object": "list", "data": [_base(context), *adapters]}


@router.get("/{model:path}")
def get_model(model: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """One model, by any reference that `model` of a completion may be."""
    if model == context.engine.served_name:
        return _base(context)
    return _adapter(context, find_version(context, caller, model), model)


def _base(context: ApiContext) -> dict[str, Any]:
    engine = context.engine
    return {
        "id": engine.served_name,
        "object": "model",
        "created": context.created,
        "owned_by": "base",
        "root": engine.base.name,
        "parent": None,
        "max_model_len": engine.max_model_len,
    }


def _adapter(context: ApiContext, version: AdapterVersion, model_id: str) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": version.created_at,
        "owned_by": version.tenant,
        "root": version.digest,
        "parent": context.engine.served_name,
        "max_model_len": context.engine.max_model_len,
    }
