"""The nouns that the store hands out. Knows no database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adapters_store.base.description import AdapterDigest


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of a tenant's adapter.

    rank: the largest of its modules. target_modules: the targeted layers' last names, sorted.
    num_bytes: what it takes in host and device memory, packed. created_at: Unix seconds.
    active: whether the bare name means this version. percent: for how many of the name's users, 0..100.
    loaded: False where it was taken out of service; it is answered with adapter_unloaded until it is activated.
    quarantined: the code for which it is not served, as blob_damaged; None where nothing is wrong.
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
    percent: int = 0
    loaded: bool = True
    quarantined: str | None = None

    @property
    def ref(self) -> str:
        """ "name@3" """
        return f"{self.name}@{self.version}"

    def to_json(self, ref: str | None = None) -> dict[str, Any]:
        """As the API and the commands show it. ref: how the one it is shown to calls exactly this version."""
        return {
            "id": ref or self.ref,
            "object": "adapter",
            "tenant": self.tenant,
            "name": self.name,
            "version": self.version,
            "active": self.active,
            "percent": self.percent,
            "loaded": self.loaded,
            "quarantined": self.quarantined,
            "digest": self.digest,
            "base": self.base_digest,
            "rank": self.rank,
            "target_modules": list(self.target_modules),
            "bytes": self.num_bytes,
            "created": self.created_at,
        }


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
    key_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What a tenant may use; None: no limit. weight: its share of the server beside the others'.

    tokens_per_minute: prompt and answer. max_concurrent: sequences under way. max_adapters: versions kept.
    max_adapter_bytes: of those, packed.
    """

    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_adapters: int | None = None
    max_adapter_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0.01 <= self.weight <= 100.0:
            raise ValueError(f"weight must be in [0.01, 100], got {self.weight}")
        for name in self.__slots__[1:]:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63:
                raise ValueError(f"{name} must be in [0, 2^63), got {value}")


UNLIMITED = Quotas()
