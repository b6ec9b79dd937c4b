"""Whose key it is, for tests that ask nothing else of it."""

from __future__ import annotations

from adapters_store.store import AdapterStore


def owner_of(store: AdapterStore, api_key: str) -> str | None:
    """The tenant that the key opens."""
    grant = store.tenants.authenticate(api_key)
    return None if grant is None else grant.tenant
