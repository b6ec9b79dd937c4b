"""What a bare name means: the active version, or one of its canaries for a share of the users. Knows no bytes.

Requests with the same `sticky` text get the same version while the shares stay. A canary that grows keeps its users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sqlalchemy import Connection

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import AdapterUnavailable, Conflict, NotFound
from adapters_store.parsing.strict_json import shown
from adapters_store.storage import audit
from adapters_store.storage.database import Database
from adapters_store.storage.names import split_ref
from adapters_store.versions import alias_rows, registry
from adapters_store.versions.records import AdapterVersion

Versions = tuple[AdapterVersion, ...]


def choose(versions: Sequence[AdapterVersion], sticky: str | None) -> AdapterVersion:
    """The first is the active one; the others are canaries, in a fixed order. sticky None: the active one.

    sha256 spreads users evenly over 0..99; the first canary has the lowest shares, so a growing canary loses no user.
    """
    active, *canaries = versions
    if not canaries or sticky is None:
        return active
    digest = hashlib.sha256(f"{active.tenant}/{active.name}\0{sticky}".encode("utf-8", "replace")).digest()
    place = int.from_bytes(digest[:8]) * 100 >> 64
    for canary in canaries:
        place -= canary.percent
        if place < 0:
            return canary
    return active


def meaning_of(connection: Connection, tenant: str, ref: str) -> Versions:
    """The versions that `name` or `name@3` may be answered with, for `choose`.

    Raises NotFound: model_not_found, adapter_unloaded. AdapterUnavailable: adapter_quarantined.
    """
    name, number = split_ref(ref)
    version = registry.require_version(connection, tenant, name, number)
    if not version.loaded:
        raise _unloaded(version)
    if version.quarantined is not None:
        raise _quarantined(version)
    if number is not None or version.percent == 100:
        return (version,)
    every = registry.find_versions(connection, tenant=tenant, name=name)
    return (version, *(other for other in every if _is_canary(other)))


def _is_canary(version: AdapterVersion) -> bool:
    return version.percent > 0 and not version.active and version.quarantined is None


def _quarantined(version: AdapterVersion) -> AdapterUnavailable:
    message = f"adapter {shown(version.ref)} is not served ({version.quarantined}); push it again, or ask the operator"
    return AdapterUnavailable("adapter_quarantined", message, param="model")


def _unloaded(version: AdapterVersion) -> NotFound:
    message = f"adapter {shown(version.ref)} is unloaded; activate it to serve it again"
    return NotFound("adapter_unloaded", message, param="model")


class AliasStore:
    """Changes what names mean, each in one transaction. Every method raises NotFound (model_not_found)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def activate(self, tenant: str, name: str, number: int) -> AdapterVersion:
        """The bare name means this version alone from now on; an unloaded one comes back into service."""
        with self._database.write() as connection:
            registry.require_version(connection, tenant, name, number)
            alias_rows.set_active(connection, registry.name_id(connection, tenant, name), number)
            audit.note(connection, "adapter.activate", tenant=tenant, target=f"{name}@{number}")
            return registry.require_version(connection, tenant, name, number)

    def set_canary(self, tenant: str, name: str, number: int, percent: int) -> AdapterVersion:
        """Answer `percent` of the bare name's users with this version; 0 ends it.

        Raises:
            ValueError: percent is not 0..99. Conflict: is_active, no_active_version, canary_too_large.
            NotFound: adapter_unloaded.
        """
        if not 0 <= percent <= 99:
            raise ValueError(f"percent must be 0..99, got {percent}; promote makes it 100")
        with self._database.write() as connection:
            version = registry.require_version(connection, tenant, name, number)
            adapter_id = registry.name_id(connection, tenant, name)
            _check_canary(connection, adapter_id, version, percent)
            alias_rows.set_canary(connection, adapter_id, number, percent)
            audit.note(connection, "adapter.canary", tenant=tenant, target=version.ref, percent=percent)
            return registry.require_version(connection, tenant, name, number)

    def promote(self, tenant: str, name: str, number: int | None = None) -> AdapterVersion:
        """The canary (of that number, if there are several) becomes the active version. Conflict: no_canary."""
        with self._database.write() as connection:
            adapter_id = _known_name(connection, tenant, name)
            canaries = alias_rows.canaries(connection, adapter_id)
            chosen = [each for each in canaries if number in (None, each)]
            if len(chosen) != 1:
                found = ", ".join(f"{name}@{each}" for each in canaries) or "none"
                message = f"promote needs one canary of {name}; there is {found}"
                raise Conflict("no_canary", message, param="model")
            alias_rows.set_active(connection, adapter_id, chosen[0])
            audit.note(connection, "adapter.promote", tenant=tenant, target=f"{name}@{chosen[0]}")
            return registry.require_version(connection, tenant, name, chosen[0])

    def roll_back(self, tenant: str, name: str) -> AdapterVersion:
        """End the canaries; if there are none, activate the previous version. Conflict: nothing_before."""
        with self._database.write() as connection:
            adapter_id = _known_name(connection, tenant, name)
            had_canaries = alias_rows.drop_canaries(connection, adapter_id) > 0
            if not had_canaries and alias_rows.go_back(connection, adapter_id) is None:
                message = f"no version of {name} that is in service was active before this one"
                raise Conflict("nothing_before", message, param="model")
            version = registry.require_version(connection, tenant, name, None)
            audit.note(connection, "adapter.rollback", tenant=tenant, target=version.ref)
            return version

    def unload(self, tenant: str, name: str, number: int | None = None) -> list[AdapterDigest]:
        """Take one version, or all of a name, out of service until activated again; its files stay.

        Returns the digests that no version in service has any more.
        """
        with self._database.write() as connection:
            versions = registry.require_versions(connection, tenant, name, number)
            adapter_id = registry.name_id(connection, tenant, name)
            numbers = [version.version for version in versions]
            alias_rows.withdraw(connection, adapter_id, numbers, is_gone=False)
            audit.note(connection, "adapter.unload", tenant=tenant, target=name, versions=numbers)
            return registry.not_in_service(connection, [version.digest for version in versions])


def _known_name(connection: Connection, tenant: str, name: str) -> int:
    registry.require_versions(connection, tenant, name, None)
    return registry.name_id(connection, tenant, name)


def _check_canary(connection: Connection, adapter_id: int, version: AdapterVersion, percent: int) -> None:
    active = registry.find_versions(connection, tenant=version.tenant, name=version.name, active_only=True)
    if not active or not active[0].loaded:
        message = f"{version.name} has no active version in service; a canary needs one"
        raise Conflict("no_active_version", message, param="model")
    if version.active:
        raise Conflict("is_active", f"{version.ref} is the active version", param="model")
    if not version.loaded:
        raise _unloaded(version)
    others = alias_rows.canaries(connection, adapter_id)
    others.pop(version.version, None)
    total = sum(others.values()) + percent
    if total > 99:
        raise Conflict(
            "canary_too_large", f"percent: the canaries would have {total}, the limit is 99", param="percent"
        )
