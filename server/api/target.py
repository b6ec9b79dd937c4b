"""What the `model` of a request means: the base, or adapter versions of one tenant that the caller may speak for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from adapters_store.accounts.records import UNLIMITED, Quotas
from adapters_store.base.description import AdapterDigest
from adapters_store.errors import NotFound
from adapters_store.packed.mix import MAX_MIX_RANK, Part, mix_of, not_combinable
from adapters_store.parsing.numbers import whole_number
from adapters_store.storage.names import FINE_TUNED
from adapters_store.versions.records import AdapterVersion
from server.api.auth import Caller
from server.api.context import ApiContext
from server.api.telemetry.metrics import SEVERAL
from server.api.wire.errors import ApiError
from server.api.wire.model_field import WeightedName, model_text

VERSION_HEADER = "x-multilora-adapter-version"
MAX_LABEL_CHARS = 160  # what usage rows hold


@dataclass(frozen=True)
class Target:
    """model: as the client wrote it. tenant: the one that pays. adapter None is the base; label names it in metrics and
    usage, versions in the answer's header: of several adapters both name all, the header with their weights.

    quotas: of the tenant. rank: the adapter's largest. tool_dialect, chat_template: the adapter's own.
    invocation_tokens: those that switch an activated LoRA on.
    """

    model: str
    tenant: str
    adapter: AdapterDigest | None = None
    label: str = "base"
    quotas: Quotas = UNLIMITED
    rank: int = 0
    tool_dialect: str | None = None
    chat_template: str | None = None
    invocation_tokens: tuple[int, ...] | None = None
    versions: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """The version that answers; the name alone does not show it."""
        return {} if self.adapter is None else {VERSION_HEADER: self.versions or self.label}


async def resolve_target(
    context: ApiContext, caller: Caller, model: str | Sequence[WeightedName], sticky: str
) -> Target:
    """sticky: requests with the same text get the same version of a name that has canaries.

    Raises ApiError 404 `model_not_found` for an unknown model and, in the same words, for another tenant's, alone or
    among several; NotCombinable for several that cannot be added.
    """
    if not isinstance(model, str):
        if len(model) > 1 or model[0].weight != 1:
            return await _resolve_several(context, caller, model, sticky)
        model = model[0].name
    if model == context.engine.served_name:
        return Target(model, caller.tenant, quotas=await quotas_of(context, caller.tenant))
    version = await run_in_threadpool(find_version, context, caller, model, sticky)
    quotas = await quotas_of(context, version.tenant)
    template = None
    if version.chat_template is not None:
        template = await run_in_threadpool(context.store.chat_template_of, version)
    return Target(
        model,
        version.tenant,
        version.digest,
        version.ref,
        quotas,
        version.rank,
        tool_dialect=version.tool_dialect,
        chat_template=template,
        invocation_tokens=version.invocation_tokens,
    )


async def _resolve_several(context: ApiContext, caller: Caller, model: Sequence[WeightedName], sticky: str) -> Target:
    """As resolve_target. Each name is resolved as it is alone, so each may be a canary of its own."""
    if any(part.name == context.engine.served_name for part in model):
        raise not_combinable("the base is in every answer; leave it out")
    found = [await run_in_threadpool(find_version, context, caller, part.name, sticky) for part in model]
    _check_together(found, context.settings.max_adapter_bytes)
    first, weights = found[0], [part.weight for part in model]
    label = SEVERAL.join(sorted(version.ref for version in found))
    if len(label) > MAX_LABEL_CHARS:
        label = f"{label[: MAX_LABEL_CHARS - 17]}~{hashlib.sha256(label.encode()).hexdigest()[:16]}"
    return Target(
        model_text(model),
        first.tenant,
        mix_of(Part(version.digest, weight) for version, weight in zip(found, weights, strict=True)),
        label,
        await quotas_of(context, first.tenant),
        sum(version.rank for version in found),
        versions=" + ".join(f"{weight:g}*{version.ref}" for version, weight in zip(found, weights, strict=True)),
        tool_dialect=first.tool_dialect,
        chat_template=await run_in_threadpool(context.store.chat_template_of, first),
    )


def _check_together(found: Sequence[AdapterVersion], max_bytes: int) -> None:
    """Checks rows; tensors are checked when they are added. max_bytes: the thread that loads for every tenant reads and
    adds them, and holds them twice meanwhile."""
    if len({version.tenant for version in found}) > 1:
        raise not_combinable("they belong to different tenants")
    if len({version.ref for version in found}) < len(found):
        raise not_combinable("two of the names mean the same version; add their weights")
    if any(version.invocation_tokens is not None for version in found):
        raise not_combinable("one is an activated LoRA (alora_invocation_tokens), which changes a part of the prompt")
    if len({(version.tool_dialect, version.chat_template) for version in found}) > 1:
        raise not_combinable("they have different chat templates or tool dialects")
    rank = sum(version.rank for version in found)
    if rank > MAX_MIX_RANK:
        raise not_combinable(f"their ranks are {rank} together, at most {MAX_MIX_RANK} are served")
    num_bytes = sum(version.num_bytes for version in found)
    if num_bytes > max_bytes:
        raise not_combinable(f"they take {num_bytes} bytes together, at most {max_bytes} are served")


async def quotas_of(context: ApiContext, tenant: str) -> Quotas:
    """What the tenant may use. A remembered answer costs less than a thread."""
    known = context.store.quotas.peek(tenant)
    return known if known is not None else await run_in_threadpool(context.store.quotas.get, tenant)


def find_version(context: ApiContext, caller: Caller, model: str, sticky: str | None = None) -> AdapterVersion:
    """What `name`, `name@version`, `tenant/name` or a job's model id means to this caller, made for the base served."""
    of_job = _of_job(caller, model)
    version = _resolved(context, of_job, sticky) if of_job is not None else None
    if version is None:
        version = _resolved(context, tenant_and_ref(caller, model), sticky)
    if version is None:
        raise model_not_found(model)
    if version.base_digest != context.engine.base.digest:
        message = f"The adapter {model!r} was made for another base model than {context.engine.served_name!r}."
        raise ApiError(409, "base_mismatch", message, param="model")
    return version


def _resolved(context: ApiContext, tenant_and_name: tuple[str, str], sticky: str | None) -> AdapterVersion | None:
    try:
        return context.store.resolve(*tenant_and_name, sticky)
    except NotFound as error:
        if error.code == "adapter_unloaded":
            raise
        return None


def tenant_and_ref(caller: Caller, model: str) -> tuple[str, str]:
    """The tenant a reference names, else the caller's own, and the rest. Raises `model_not_found` for another's."""
    named, slash, rest = model.partition("/")
    if not slash:
        return caller.tenant, model
    if not caller.may_speak_for(named):
        raise model_not_found(model)
    return named, rest


def _of_job(caller: Caller, model: str) -> tuple[str, str] | None:
    """`ft:base:tenant:name:version`, as a fine-tuning job names its model; no name that a job gives holds a colon.

    None if it is no such id, or not this caller's; an uploaded adapter may still have this name.
    """
    version = whole_number(model.rpartition(":")[2])
    if version is None or not model.startswith(FINE_TUNED) or model.count(":") < 4:
        return None
    before, name, _ = model.rsplit(":", 2)
    own = before.endswith(f":{caller.tenant}")
    if not own and not caller.speaks_for_all:
        return None
    return caller.tenant if own else before.rpartition(":")[2], f"{name}@{version}"


def model_not_found(model: str) -> ApiError:
    message = f"The model {model!r} does not exist or you do not have access to it."
    return ApiError(404, "model_not_found", message, param="model")
