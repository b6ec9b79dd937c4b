"""/v1/adapters: upload, list, show and delete a tenant's adapters. Checks and disk run on threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from adapters_store.accounts.keys import Scope
from adapters_store.dialects.catalog import DIALECTS
from adapters_store.errors import Conflict, NotFound
from adapters_store.format.chat_fields import ADAPTER_DTYPES
from adapters_store.parsing.adapter_files import refuse_shard
from adapters_store.parsing.template_sandbox import MAX_TEMPLATE_BYTES
from adapters_store.remote.imports import ImportLimits, fetch_import
from adapters_store.storage.names import check_name, split_ref
from adapters_store.versions.records import AdapterVersion
from server.api.auth import Caller, CallerDep, guarded, require_admin
from server.api.context import ApiContext, ContextDep
from server.api.edge.body_limits import UPLOAD_PATH
from server.api.request_body import is_json, json_body
from server.api.routes.uploads import ensure_tenant, receive, upload_slot
from server.api.target import model_not_found, tenant_and_ref
from server.api.wire.body import Body
from server.api.wire.errors import ApiError
from server.api.wire.json_body import body_schema
from server.api.wire.multipart import WEIGHTS
from server.api.wire.paging import DEFAULT_LIMIT, After, Limit, page
from server.api.wire.thread_route import ThreadRoute

MAX_NAME_BYTES = 512
_OPTIONAL = {"tool_dialect": 64, "chat_template": MAX_TEMPLATE_BYTES, "adapter_dtype": 64}
_ADAPTER = f"{UPLOAD_PATH}/{{name:path}}"

router = APIRouter(route_class=ThreadRoute)
_change, _look = guarded(Scope.ADAPTERS), guarded(Scope.READ, Scope.ADAPTERS)


class NewImport(Body):
    """source: the adapter's folder, s3://BUCKET/PATH or a folder of this server's disk."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    source: Annotated[str, Field(min_length=1, max_length=1024)]


def _upload_schema() -> dict[str, Any]:
    file = {"type": "string", "format": "binary"}
    schema = {
        "type": "object",
        "required": ["name", "config", WEIGHTS],
        "properties": {
            "name": {"type": "string", "maxLength": 128},
            "config": file,
            WEIGHTS: file,
            "tool_dialect": {"type": "string", "enum": list(DIALECTS)},
            "chat_template": {"type": "string", "maxLength": MAX_TEMPLATE_BYTES},
            "adapter_dtype": {"type": "string", "enum": list(ADAPTER_DTYPES)},
        },
    }
    imported = body_schema(NewImport)["requestBody"]["content"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}, **imported}}}


@router.post(UPLOAD_PATH, dependencies=_change, status_code=201, openapi_extra=_upload_schema())
async def upload_adapter(
    request: Request, caller: CallerDep, context: ContextDep, activate: bool = True
) -> dict[str, Any]:
    """Publish a PEFT LoRA: parts `name`, `config` (adapter_config.json), `weights` (adapter_model.safetensors), and how
    its chats are written, where that differs from the base: `tool_dialect`, `chat_template`. `adapter_dtype`
    int8 serves it in half the memory, and is refused if that changes its log-probabilities by more than 0.01 nats.

    activate false: the bare name keeps its meaning, and the new version answers to `name@version`, or as a canary.
    With an admin key, a JSON body of `name` and `source` imports it from a place that --import-prefix allows.
    """
    if is_json(request):
        return await _import(request, caller, context, activate=activate)
    settings = context.settings
    limits = {"name": MAX_NAME_BYTES, "config": settings.max_config_bytes, WEIGHTS: settings.max_adapter_bytes}
    limits |= _OPTIONAL
    async with upload_slot(context, caller.tenant) as (incoming, weights):
        upload = await receive(request, weights, limits, file_part=WEIGHTS, incoming=incoming, optional=_OPTIONAL)
        refuse_shard(upload.filename)
        name = upload.fields["name"].decode("utf-8", "replace")
        version = await _publish(context, caller, name, upload.fields, weights, activate=activate)
    return adapter_object(caller, version)


async def _import(request: Request, caller: Caller, context: ApiContext, *, activate: bool) -> dict[str, Any]:
    """Read by this server, then checked as an upload is."""
    await require_admin(caller)
    body = await json_body(NewImport)(request, caller, context)
    check_name("name", body.name)
    settings = context.settings
    limits = ImportLimits(settings.import_prefixes, settings.max_config_bytes, settings.max_adapter_bytes)
    async with upload_slot(context, caller.tenant) as (_, weights):
        require_room = context.upload_slots.check_room
        config = await run_in_threadpool(fetch_import, body.source, weights, limits, require_room)
        version = await _publish(context, caller, body.name, {"config": config}, weights, activate=activate)
    return adapter_object(caller, version)


@router.get(UPLOAD_PATH, dependencies=_look)
def list_adapters(
    caller: CallerDep, context: ContextDep, limit: Limit = DEFAULT_LIMIT, after: After = None
) -> dict[str, Any]:
    """The active versions of the caller's tenant; of every tenant for a caller that speaks for all."""
    versions = context.store.list_versions(None if caller.speaks_for_all else caller.tenant)
    return page([adapter_object(caller, version) for version in versions], limit, after)


@router.get(_ADAPTER, dependencies=_look)
def get_adapter(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """One adapter: `name` with all its versions, or `name@version`."""
    tenant, ref = tenant_and_ref(caller, name)
    try:
        bare, number = split_ref(ref)
    except NotFound:
        raise model_not_found(name) from None
    versions = context.store.versions(tenant, bare)
    chosen = [v for v in versions if v.version == number or (number is None and v.active)]
    if not versions or (number is not None and not chosen):
        raise model_not_found(name)
    return with_versions(caller, chosen[0] if chosen else versions[-1], versions)


def with_versions(caller: Caller, shown: AdapterVersion, versions: Sequence[AdapterVersion]) -> dict[str, Any]:
    """One version, and all that its name has."""
    return {**adapter_object(caller, shown), "versions": [adapter_object(caller, each) for each in versions]}


@router.delete(_ADAPTER, dependencies=_change)
def delete_adapter(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Delete `name` with all its versions, or `name@version`. Requests that are running finish."""
    tenant, ref = tenant_and_ref(caller, name)
    try:
        digests = context.store.delete(tenant, ref)
    except NotFound:
        raise model_not_found(name) from None
    context.engine.forget_adapters(digests)
    return {"id": name, "object": "adapter.deleted", "deleted": True, "digests": digests}


def adapter_object(caller: Caller, version: AdapterVersion) -> dict[str, Any]:
    """`id` is what this caller may send as `model` to get exactly this version."""
    return version.to_json(caller.ref_to(version.tenant, version.ref))


def _text(fields: Mapping[str, bytes], name: str) -> str | None:
    """An optional part. Raises ApiError 400 for one that is not UTF-8."""
    try:
        return fields[name].decode() if name in fields else None
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_value", f"{name}: byte {error.start} is not UTF-8", param=name) from None


async def _publish(
    context: ApiContext, caller: Caller, name: str, fields: Mapping[str, bytes], weights: Path, *, activate: bool
) -> AdapterVersion:
    check_name("name", name)
    if name == context.engine.served_name:
        raise Conflict("name_is_base", f"name: {name!r} is the name of the base model", param="name")

    def publish() -> AdapterVersion:
        ensure_tenant(context, caller.tenant)
        return context.store.publish(
            tenant=caller.tenant,
            name=name,
            config=fields["config"],
            weights=weights,
            base=context.engine.base,
            activate=activate,
            takes_file=True,
            tool_dialect=_text(fields, "tool_dialect"),
            chat_template=_text(fields, "chat_template"),
            adapter_dtype=_text(fields, "adapter_dtype"),
            int8_change=lambda plain, small: context.engine.int8_change(plain, small).result(),
        )

    return await anyio.to_thread.run_sync(publish, limiter=context.check_slots)
