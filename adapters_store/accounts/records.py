"""A tenant, its key and its quotas, as the store hands them out. Knows no database."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_OVERLAP_S = 30 * 86_400  # for which a key that is replaced stays valid


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
