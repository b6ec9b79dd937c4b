"""Replicas: stores with a data directory each, over one real PostgreSQL and one bucket of a real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from adapters_store.base.description import BaseDescription
from adapters_store.remote.settings import RemoteSettings
from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.servers import object_store, postgres
from support.servers.bucket_proxy import Faults, proxied

_numbers = count()


@pytest.fixture(scope="package")
def database() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.fixture(scope="package")
def objects() -> Iterator[object_store.ObjectStore]:
    with object_store.running() as store:
        yield store


class Fleet:
    """One database, one bucket; `replica(name)` opens a store in its own folder. Requests go through `faults`."""

    def __init__(self, root: Path, database_url: str, blob_url: str, faults: Faults) -> None:
        self.root = root
        self.database_url = database_url
        self.blob_url = blob_url
        self.faults = faults
        self.base: BaseDescription = tiny_base()
        self.stack = ExitStack()

    def replica(self, name: str, **changes: object) -> AdapterStore:
        settings = RemoteSettings(url=self.blob_url, **changes)  # type: ignore[arg-type]
        store = AdapterStore.open(self.root / name, database_url=self.database_url, remote=settings)
        self.stack.callback(store.close)
        return store

    def publish(self, store: AdapterStore, name: str, seed: int = 0) -> AdapterVersion:
        weights = write(self.root / f"upload-{next(_numbers)}", safetensors_bytes(lora_tensors(self.base, seed=seed)))
        return store.publish(tenant="acme", name=name, config=config_bytes(), weights=weights, base=self.base)

    def load(self, store: AdapterStore, name: str) -> str:
        """The digest that was loaded under this name."""
        version = store.resolve("acme", name)
        return str(store.load_packed(version.digest, self.base).digest)


@pytest.fixture
def fleet(
    tmp_path: Path,
    database: postgres.PostgresServer,
    objects: object_store.ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Fleet]:
    number = next(_numbers)
    with proxied(objects.endpoint) as (endpoint, faults):
        for name, value in {**objects.environment, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        url = database.database(f"fleet-{number}")
        own = Fleet(tmp_path, url, objects.bucket(f"bucket-{number}"), faults)
        with own.stack:
            yield own


MakeFleet = Callable[..., Fleet]
