"""Database, object store and data directory belong together, or nothing starts and nothing is touched."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from adapters_store.errors import StoreError
from adapters_store.remote.bucket import Bucket
from adapters_store.remote.settings import RemoteSettings
from adapters_store.storage.database import adopt
from adapters_store.store import AdapterStore
from support.servers.object_store import ObjectStore
from support.servers.postgres import PostgresServer

from .conftest import Fleet


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as refused:
        action()
    return refused.value.code


def test_a_wrong_pair_is_refused_and_no_blob_touched(
    fleet: Fleet, objects: ObjectStore, database: PostgresServer, tmp_path: os.PathLike[str]
) -> None:
    a = fleet.replica("a")
    a.tenants.create("acme")
    digest = fleet.publish(a, "law").digest
    remote = RemoteSettings(url=fleet.blob_url)
    other_url = database.database(f"other-{os.getpid()}-{fleet.root.name}")
    other_bucket = RemoteSettings(url=objects.bucket(f"other-{fleet.root.name[-8:]}".lower().replace("_", "-")))
    (fleet.root / "full" / "blobs" / "ab" / ("ab" * 32)).mkdir(parents=True)
    before = objects.keys(fleet.blob_url)

    def opening(name: str, url: str | None, remote: RemoteSettings | None) -> Callable[[], object]:
        return lambda: AdapterStore.open(fleet.root / name, database_url=url, remote=remote)

    cases = {
        "another database": opening("new1", other_url, remote),
        "no database URL, new directory": opening("new2", None, remote),
        "no database URL, used directory": opening("a", None, remote),
        "no blob URL, new directory": opening("new3", fleet.database_url, None),
        "no blob URL, used directory": opening("a", fleet.database_url, None),
        "an empty bucket": opening("new4", fleet.database_url, other_bucket),
        "a directory that holds blobs": opening("full", fleet.database_url, remote),
    }
    assert {name: refusal(case) for name, case in cases.items()} == dict.fromkeys(cases, "wrong_store")
    assert objects.keys(fleet.blob_url) == before
    assert (fleet.root / "full" / "blobs" / "ab" / ("ab" * 32)).is_dir()
    assert fleet.load(fleet.replica("b"), "law") == digest


def test_a_bucket_that_ignores_create_only_is_refused_at_start(fleet: Fleet) -> None:
    fleet.faults.ignores_create = True
    assert refusal(lambda: fleet.replica("a")) == "blobs_unsupported"
    fleet.faults.ignores_create = False
    fleet.replica("a")


def test_a_url_of_no_object_store_is_refused(fleet: Fleet) -> None:
    for url in ("http://127.0.0.1/bucket", "ftp://x/y", "bucket", "s3:///nothing"):
        assert refusal(lambda url=url: Bucket.at(url)) == "bad_blob_url"  # type: ignore[misc]


def test_the_object_store_away_at_start_is_said_so(fleet: Fleet) -> None:
    fleet.faults.is_away = True
    assert refusal(lambda: fleet.replica("a")) == "blobs_unavailable"


def test_a_folder_copied_into_a_bucket_is_adopted_and_never_swept(fleet: Fleet, objects: ObjectStore) -> None:
    """Moving from a folder to an object store: copy blobs/, adopt with an empty directory, start."""
    folder = AdapterStore.open(fleet.root / "old", database_url=fleet.database_url)
    folder.tenants.create("acme")
    digest = fleet.publish(folder, "law").digest
    for path in (fleet.root / "old" / "blobs").glob("??/*/adapter_*"):
        objects.write(fleet.blob_url, str(path.relative_to(fleet.root / "old")), path.read_bytes())
    assert refusal(lambda: fleet.replica("a")) == "wrong_store"
    (fleet.root / "a").mkdir(exist_ok=True)
    adopt(fleet.root / "a", fleet.database_url, Bucket.at(fleet.blob_url))
    a = fleet.replica("a")
    assert fleet.load(a, "law") == digest
    a.delete("acme", "law")
    assert a.sweep_remote(grace_s=0).blobs == []  # nothing proves whose it was
    assert refusal(lambda: AdapterStore.open(fleet.root / "old", database_url=fleet.database_url)) == "wrong_store"
    folder.close()
