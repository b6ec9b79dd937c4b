"""A version of an adapter, as the store hands it out. Knows no database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapters_store.base.description import AdapterDigest


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of a tenant's adapter.

    rank: the largest of its modules. target_modules: the targeted layers' last names, sorted.
    num_bytes: what it takes in host and device memory, packed. created_at: Unix seconds.
    active: whether the bare name means this version. percent: for how many of the name's users, 0..100.
    loaded: False if it is out of service; requests get adapter_unloaded until it is activated.
    tool_dialect: how its tool calls are written, chat_template: the digest of its own template; None: as the base's.
    invocation_tokens: those that switch an activated LoRA on; None: an ordinary one.
    adapter_dtype: "int8", in which it is kept and served; None: the base's type.
    quarantined: the code why it is not served, as blob_damaged; None if it is served.
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
    tool_dialect: str | None = None
    chat_template: str | None = None
    invocation_tokens: tuple[int, ...] | None = None
    adapter_dtype: str | None = None

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
            "tool_dialect": self.tool_dialect,
            "chat_template": self.chat_template,
            "invocation_tokens": None if self.invocation_tokens is None else list(self.invocation_tokens),
            "adapter_dtype": self.adapter_dtype,
            "bytes": self.num_bytes,
            "created": self.created_at,
        }
