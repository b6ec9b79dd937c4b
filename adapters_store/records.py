"""The nouns that the store hands out. Knows no database."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters_store.base import AdapterDigest


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of a tenant's adapter.

    rank: the largest of its modules. target_modules: the targeted layers' last names, sorted.
    num_bytes: what it takes in host and device memory, packed. created_at: Unix seconds.
    active: whether the bare name means this version.
    """

    tenant: str
    name: str
    version: int
    digest: AdapterDigest
    base_digest: str
    rank: int
    target_modules: tuple[str, ...]
    num_bytes: int
    created_at: int
    active: bool

    @property
    def ref(self) -> str:
        """ "name@3" """
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Tenant:
    """created_at: Unix seconds. A disabled tenant's keys open nothing."""

    name: str
    created_at: int
    disabled: bool


@dataclass(frozen=True, slots=True)
class TenantKey:
    """A key as it is shown, once: the store keeps only its hash."""

    tenant: str
    api_key: str = field(repr=False)
