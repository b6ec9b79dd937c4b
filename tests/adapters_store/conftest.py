"""A store in a temporary folder, a tiny base, and a publisher of small random adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters_store.base.description import BaseDescription
from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write

Publish = Callable[..., AdapterVersion]


@pytest.fixture
def base() -> BaseDescription:
    return tiny_base()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data_dir: Path) -> Iterator[AdapterStore]:
    store = AdapterStore.open(data_dir)
    store.tenants.create("acme")
    yield store
    store.close()


@pytest.fixture
def publish(store: AdapterStore, base: BaseDescription, tmp_path: Path) -> Publish:
    """publish(name, seed=..., tenant=..., activate=..., **config changes): a small adapter, its tensors by seed."""

    def publish_one(
        name: str = "law", *, seed: int = 0, tenant: str = "acme", activate: bool = True, **changes: object
    ) -> AdapterVersion:
        weights = write(tmp_path / "upload.safetensors", safetensors_bytes(lora_tensors(base, seed=seed)))
        config = config_bytes(**changes)
        return store.publish(tenant=tenant, name=name, config=config, weights=weights, base=base, activate=activate)

    return publish_one
