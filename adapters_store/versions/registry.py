"""The rows about adapters: names, versions, their tenants, which is active. Knows no files.

Every function works inside the caller's transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, func, insert, select, true, update

from adapters_store.accounts import quotas
from adapters_store.accounts.tenant_rows import tenant_id
from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.errors import NotFound
from adapters_store.format.chat_fields import template_digest
from adapters_store.format.validate import AdapterPlan
from adapters_store.packed.packing import packed_bytes
from adapters_store.parsing.strict_json import shown
from adapters_store.storage import audit
from adapters_store.storage.database import now_s
from adapters_store.storage.names import is_name
from adapters_store.storage.schema import (
    adapter_versions,
    adapters,
    bases,
    few_at_a_time,
    quarantine,
    tenant_quarantine,
    tenants,
)
from adapters_store.versions import alias_rows
from adapters_store.versions.records import AdapterVersion

_IS_LOADED = adapter_versions.c.unloaded.is_(False)
_IS_ACTIVE = adapters.c.active_number == adapter_versions.c.number


def find_versions(
    connection: Connection,
    *,
    tenant: str | None = None,
    name: str | None = None,
    number: int | None = None,
    active_only: bool = False,
) -> list[AdapterVersion]:
    """Versions by tenant, name and number. `number` None with active_only: what the bare name means."""
    if not all(is_name(text) for text in (tenant, name) if text is not None):
        return []  # a driver raises for other text, as a lone surrogate
    conditions: list[ColumnElement[bool]] = [_IS_ACTIVE] if active_only else []
    for column, value in ((tenants.c.name, tenant), (adapters.c.name, name), (adapter_versions.c.number, number)):
        if value is not None:
            conditions.append(column == value)
    order = (tenants.c.name, adapters.c.name, adapter_versions.c.number)
    statement = _select_versions().where(true(), *conditions).order_by(*order)
    return [_to_version(row) for row in connection.execute(statement)]


def _select_versions() -> Select[Any]:
    columns = [column for column in adapter_versions.c if column.name not in ("id", "adapter_id", "config")]
    joined = adapter_versions.join(adapters).join(tenants)
    joined = joined.outerjoin(quarantine, quarantine.c.digest == adapter_versions.c.digest)
    own = (tenant_quarantine.c.digest == adapter_versions.c.digest) & (tenant_quarantine.c.tenant_id == tenants.c.id)
    joined = joined.outerjoin(tenant_quarantine, own)
    return select(
        tenants.c.name.label("tenant"),
        adapters.c.name.label("adapter"),
        adapters.c.active_number,
        alias_rows.percent_of_version().label("percent"),
        alias_rows.percent_of_canaries().label("all_canaries"),
        func.coalesce(quarantine.c.code, tenant_quarantine.c.code).label("quarantined"),
        *columns,
    ).select_from(joined)


def _to_version(row: Row[Any]) -> AdapterVersion:
    return AdapterVersion(
        tenant=row.tenant,
        name=row.adapter,
        version=row.number,
        digest=AdapterDigest(row.digest),
        base_digest=row.base_digest,
        rank=row.rank,
        target_modules=tuple(json.loads(row.target_modules)),
        num_bytes=row.num_bytes,
        created_at=row.created_at,
        active=row.number == row.active_number,
        percent=_percent_of(row),
        loaded=not row.unloaded,
        quarantined=row.quarantined,
        tool_dialect=row.tool_dialect,
        chat_template=row.chat_template,
        invocation_tokens=None if row.invocation_tokens is None else tuple(json.loads(row.invocation_tokens)),
        adapter_dtype=row.adapter_dtype,
    )


def _percent_of(row: Row[Any]) -> int:
    if row.unloaded:
        return 0
    return int(100 - row.all_canaries if row.number == row.active_number else row.percent or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A checked adapter that has no version number yet. activate: the bare name means it from now on."""

    tenant: str
    name: str
    digest: AdapterDigest
    plan: AdapterPlan
    config: bytes
    activate: bool


def require_room(connection: Connection, draft: Draft, *, max_versions: int) -> None:
    """Whether its row may be written: it is known under this name, or the tenant may have one more.

    Raises NotFound (tenant_not_found), Conflict (too_many_adapters, quota_adapters, quota_bytes).
    """
    owner = tenant_id(connection, draft.tenant)
    if _number_of(connection, owner, draft) is None:
        quotas.check_room(connection, owner, packed_bytes(draft.plan), max_versions=max_versions)


def add_version(connection: Connection, draft: Draft, *, max_versions: int) -> AdapterVersion:
    """Write the row of a new version. The same content under the same name is not new. Raises as `require_room`."""
    owner = tenant_id(connection, draft.tenant, lock=True)
    require_room(connection, draft, max_versions=max_versions)
    number = _number_of(connection, owner, draft) or _insert_version(connection, owner, draft)
    if draft.activate:
        alias_rows.set_active(connection, name_id(connection, draft.tenant, draft.name), number)
    version = find_versions(connection, tenant=draft.tenant, name=draft.name, number=number)[0]
    detail: dict[str, Any] = {"digest": version.digest, "active": version.active}
    audit.note(connection, "adapter.upload", tenant=version.tenant, target=version.ref, **detail)
    return version


def _number_of(connection: Connection, owner: int, draft: Draft) -> int | None:
    """The version of this content under this name; None if it is new."""
    known = select(adapter_versions.c.number).select_from(adapter_versions.join(adapters))
    own = known.where(adapters.c.tenant_id == owner, adapters.c.name == draft.name)
    return connection.execute(own.where(adapter_versions.c.digest == draft.digest)).scalar()


def _insert_version(connection: Connection, owner: int, draft: Draft) -> int:
    """Its number: one more than the name's last, also if that was deleted."""
    plan, columns = draft.plan, (adapters.c.id, adapters.c.last_number)
    own = (adapters.c.tenant_id == owner) & (adapters.c.name == draft.name)
    name = connection.execute(select(*columns).where(own)).first()
    if name is None:
        values = {"tenant_id": owner, "name": draft.name, "last_number": 0}
        name = connection.execute(insert(adapters).values(values).returning(*columns)).one()
    number = int(name.last_number) + 1
    invocation = plan.alora_invocation_tokens
    connection.execute(
        insert(adapter_versions).values(
            adapter_id=name.id,
            number=number,
            digest=draft.digest,
            base_digest=plan.base.digest,
            rank=plan.max_rank,
            target_modules=json.dumps(plan.target_modules),
            num_bytes=packed_bytes(plan),
            created_at=now_s(),
            config=draft.config,
            tool_dialect=plan.tool_dialect,
            chat_template=template_digest(plan.chat_template),
            invocation_tokens=None if invocation is None else json.dumps(invocation),
            adapter_dtype="int8" if plan.is_int8 else None,
        )
    )
    connection.execute(update(adapters).where(adapters.c.id == name.id).values(last_number=number))
    return number


def require_version(connection: Connection, tenant: str, name: str, number: int | None) -> AdapterVersion:
    """The version of that number, or the active one; NotFound (model_not_found)."""
    return _required(connection, tenant, name, number, active_only=number is None)[0]


def require_versions(connection: Connection, tenant: str, name: str, number: int | None) -> list[AdapterVersion]:
    """The version of that number, or all of the name; NotFound (model_not_found) if there is none."""
    return _required(connection, tenant, name, number, active_only=False)


def _required(
    connection: Connection, tenant: str, name: str, number: int | None, *, active_only: bool
) -> list[AdapterVersion]:
    found = find_versions(connection, tenant=tenant, name=name, number=number, active_only=active_only)
    if not found:
        message = f"no adapter {shown(ref_of(name, number))} for tenant {shown(tenant)}"
        raise NotFound("model_not_found", message, param="model")
    return found


def ref_of(name: str, number: int | None) -> str:
    """As a request names it."""
    return name if number is None else f"{name}@{number}"


def delete_versions(connection: Connection, tenant: str, name: str, number: int | None) -> list[AdapterDigest]:
    """Delete one version, or all of a name; returns their digests. An active version leaves the name inactive.

    Raises NotFound (model_not_found) if there is none.
    """
    doomed = require_versions(connection, tenant, name, number)
    adapter_id = name_id(connection, tenant, name)
    condition = adapter_versions.c.adapter_id == adapter_id
    if number is not None:
        condition &= adapter_versions.c.number == number
    connection.execute(delete(adapter_versions).where(condition))
    alias_rows.withdraw(connection, adapter_id, [version.version for version in doomed], is_gone=True)
    digests = [version.digest for version in doomed]
    audit.note(connection, "adapter.delete", tenant=tenant, target=ref_of(name, number), digests=digests)
    return digests


def name_id(connection: Connection, tenant: str, name: str) -> int:
    """The row of a name that exists."""
    condition = (tenants.c.name == tenant) & (adapters.c.name == name)
    return int(
        connection.execute(select(adapters.c.id).select_from(adapters.join(tenants)).where(condition)).scalar_one()
    )


def unreferenced(connection: Connection, digests: Iterable[AdapterDigest]) -> list[AdapterDigest]:
    """Those of `digests` that no version of any tenant has, each once."""
    return _without_version(connection, digests, true())


def not_in_service(connection: Connection, digests: Iterable[AdapterDigest]) -> list[AdapterDigest]:
    """Those of `digests` that no version in service has, each once: deleted, or unloaded by all owners."""
    return _without_version(connection, digests, _IS_LOADED)


def _without_version(
    connection: Connection, digests: Iterable[AdapterDigest], condition: ColumnElement[bool]
) -> list[AdapterDigest]:
    asked = list(dict.fromkeys(digests))
    found: set[str] = set()
    for few in few_at_a_time(asked):
        having = select(adapter_versions.c.digest).where(adapter_versions.c.digest.in_(few), condition)
        found.update(connection.execute(having).scalars())
    return [digest for digest in asked if digest not in found]


def base_of(connection: Connection, digest: AdapterDigest) -> str | None:
    """The base digest of an adapter digest; None if no version has it."""
    statement = select(adapter_versions.c.base_digest).where(adapter_versions.c.digest == digest).limit(1)
    found = connection.execute(statement).scalar()
    return None if found is None else str(found)


def config_of(connection: Connection, version: AdapterVersion) -> bytes | None:
    """The adapter_config.json as this tenant uploaded it."""
    adapter_id = select(adapters.c.id).select_from(adapters.join(tenants))
    owned = adapter_id.where(tenants.c.name == version.tenant, adapters.c.name == version.name).scalar_subquery()
    condition = (adapter_versions.c.adapter_id == owned) & (adapter_versions.c.number == version.version)
    found = connection.execute(select(adapter_versions.c.config).where(condition)).scalar()
    return None if found is None else bytes(found)


def remember_base(connection: Connection, base: BaseDescription) -> None:
    """Write the description down, as the one served last."""
    connection.execute(delete(bases).where(bases.c.digest == base.digest))
    last = connection.execute(select(func.coalesce(func.max(bases.c.remembered_at), 0))).scalar_one()
    moment = max(now_s(), int(last) + 1)  # strictly later than the others, also within one second
    connection.execute(insert(bases).values(digest=base.digest, description=base.to_json(), remembered_at=moment))


def all_digests(connection: Connection) -> list[AdapterDigest]:
    """Every digest that some version has, once."""
    rows = connection.execute(select(adapter_versions.c.digest).distinct().order_by(adapter_versions.c.digest))
    return [AdapterDigest(row.digest) for row in rows]


def all_bases(connection: Connection) -> list[BaseDescription]:
    """Every base remembered, the last one first."""
    rows = connection.execute(select(bases.c.description).order_by(bases.c.remembered_at.desc()))
    return [BaseDescription.from_json(row.description) for row in rows]
