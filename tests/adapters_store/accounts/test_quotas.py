"""What a tenant may use: kept, seen at once, and held where adapters are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.accounts.records import Quotas
from adapters_store.errors import Conflict, NotFound
from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion

Publish = Callable[..., AdapterVersion]


def digests_in(data_dir: Path) -> set[str]:
    return {f"sha256:{folder.name}" for folder in (data_dir / "blobs").glob("??/*")}


def test_a_tenant_without_quotas_and_a_name_that_is_no_tenant_may_use_everything(store: AdapterStore) -> None:
    assert store.quotas.get("acme") == store.quotas.get("nobody") == Quotas()


def test_quotas_are_kept_and_replaced_as_a_whole(store: AdapterStore, data_dir: Path) -> None:
    store.quotas.get("acme")
    store.quotas.set("acme", Quotas(weight=2.5, requests_per_minute=60, max_adapter_bytes=10**12))
    assert store.quotas.get("acme") == Quotas(weight=2.5, requests_per_minute=60, max_adapter_bytes=10**12)
    store.quotas.set("acme", Quotas(tokens_per_minute=0))
    assert store.quotas.get("acme") == Quotas(tokens_per_minute=0)
    store.close()
    again = AdapterStore.open(data_dir)
    assert again.quotas.get("acme") == Quotas(tokens_per_minute=0)
    again.close()


def test_quotas_end_with_their_tenant(store: AdapterStore) -> None:
    store.quotas.set("acme", Quotas(max_concurrent=1))
    store.tenants.delete("acme")
    with pytest.raises(NotFound):
        store.quotas.set("acme", Quotas())
    store.tenants.create("acme")
    assert store.quotas.get("acme") == Quotas()


@pytest.mark.parametrize("bad", [{"weight": 0.0}, {"weight": float("nan")}, {"max_adapters": -1}, {"weight": 101.0}])
def test_a_quota_out_of_range_is_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Quotas(**bad)  # type: ignore[arg-type]


def test_one_adapter_more_than_the_quota_is_refused_and_the_same_content_is_not_one_more(
    store: AdapterStore, publish: Publish, data_dir: Path
) -> None:
    store.quotas.set("acme", Quotas(max_adapters=2))
    first = publish("law", seed=1)
    publish("med", seed=2)
    assert publish("law", seed=1) == first
    with pytest.raises(Conflict, match="has 2 adapter versions, its quota is 2") as refusal:
        publish("law", seed=3)
    assert refusal.value.code == "quota_adapters"
    assert {version.digest for version in store.list_versions()} == digests_in(data_dir)  # nothing of the refused one
    store.delete("acme", "med")
    publish("law", seed=3)


def test_bytes_beyond_the_quota_are_refused_and_count_by_tenant(
    store: AdapterStore, publish: Publish, data_dir: Path
) -> None:
    first = publish("law", seed=1)
    store.quotas.set("acme", Quotas(max_adapter_bytes=2 * first.num_bytes - 1))
    with pytest.raises(Conflict, match=f"{first.num_bytes} of the tenant's {2 * first.num_bytes - 1}") as refusal:
        publish("med", seed=2)
    assert refusal.value.code == "quota_bytes"
    store.quotas.set("acme", Quotas(max_adapter_bytes=2 * first.num_bytes))
    publish("med", seed=2)
    other = store.tenants.create("globex")
    publish("law", seed=3, tenant=other.tenant)
    assert {version.tenant for version in store.list_versions()} == {"acme", "globex"}
