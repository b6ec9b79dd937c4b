"""Adapters in an object store: several servers with a folder each, faults of the bucket, and what is never removed."""

from __future__ import annotations

import os
import shutil

import pytest

from adapters_store.errors import BlobDamaged, NotFound, StoreError, StoreUnavailable
from adapters_store.storage.blobs import Blobs
from adapters_store.store import AdapterStore
from support.servers.object_store import ObjectStore

from .conftest import Fleet

ROUNDS = 100 if os.environ.get("MULTILORA_FLEET") == "long" else 10


def test_what_one_server_publishes_others_load_at_once_and_a_new_one_quarantines_nothing(fleet: Fleet) -> None:
    a, b = fleet.replica("a"), fleet.replica("b")
    a.tenants.create("acme")
    made = {f"n{i}": fleet.publish(a, f"n{i}", seed=i).digest for i in range(20)}
    assert {name: fleet.load(b, name) for name in made} == made
    c = fleet.replica("c")
    assert c.check_integrity().quarantined == []
    assert c.sweep().blobs == []
    assert c.sweep_remote().blobs == []
    assert {name: fleet.load(c, name) for name in made} == made
    assert a.quarantine.entries() == []


def test_delete_against_publish_of_the_same_bytes_is_always_served(fleet: Fleet) -> None:
    """Each round removes the object as well: the sweep of a server that allows no grace."""
    a, b, c = (fleet.replica(name) for name in "abc")
    a.tenants.create("acme")
    digest = fleet.publish(a, "old", seed=7).digest
    for i in range(ROUNDS):
        a.delete("acme", "old" if i == 0 else f"new{i - 1}")
        if i % 2:
            assert a.sweep_remote(grace_s=0).blobs == [digest]
        fleet.publish(b, f"new{i}", seed=7)  # its cache still has the bytes: they say nothing of the object store
        assert fleet.load(c, f"new{i}") == digest
        shutil.rmtree(fleet.root / "c" / "blobs" / digest[7:9])
    assert a.quarantine.entries() == []


def test_replacing_the_local_copy_leaves_the_object(fleet: Fleet, objects: ObjectStore) -> None:
    store = fleet.replica("a")
    store.tenants.create("acme")
    fleet.publish(store, "law")
    before = objects.keys(fleet.blob_url)
    fleet.publish(store, "again")
    assert objects.keys(fleet.blob_url) == before
    assert sum(key.startswith("blobs/") for key in before) == 2


def test_a_delete_leaves_the_object_until_a_sweep_has_seen_it_without_a_row_for_the_grace(
    fleet: Fleet, objects: ObjectStore
) -> None:
    a, b = fleet.replica("a"), fleet.replica("b")
    a.tenants.create("acme")
    version = fleet.publish(a, "law")
    keys = [key for key in objects.keys(fleet.blob_url) if key.startswith("blobs/")]
    a.delete("acme", "law")
    assert b.sweep_remote(grace_s=3600).blobs == []  # marks it
    assert b.sweep_remote(grace_s=3600).blobs == []
    assert set(keys) < set(objects.keys(fleet.blob_url))
    fleet.publish(a, "law")  # takes the mark away
    assert not any(key.startswith("orphans/") for key in objects.keys(fleet.blob_url))
    a.delete("acme", "law")
    b.sweep_remote(grace_s=3600)
    assert b.sweep_remote(grace_s=0).blobs == [version.digest]
    assert not set(keys) & set(objects.keys(fleet.blob_url))
    with pytest.raises(NotFound):
        b.load_packed(version.digest, fleet.base)


def test_only_one_server_sweeps_and_not_while_a_publish_runs(fleet: Fleet) -> None:
    a, b = fleet.replica("a"), fleet.replica("b")
    a.tenants.create("acme")
    digest = fleet.publish(a, "law").digest
    a.delete("acme", "law")
    assert a.remote is not None
    with a.remote.leader.tried() as is_held:
        assert is_held
        assert b.sweep_remote(grace_s=0).blobs == []
    with a.remote.locks.shared():
        assert b.sweep_remote(grace_s=0).blobs == []
    assert b.sweep_remote(grace_s=0).blobs == [digest]


def test_an_object_that_is_gone_is_missing_only_where_the_bucket_is_ours(fleet: Fleet, objects: ObjectStore) -> None:
    a, b = fleet.replica("a"), fleet.replica("b")
    a.tenants.create("acme")
    digest = fleet.publish(a, "law").digest
    mark = objects.read(fleet.blob_url, "store.json")
    objects.delete(fleet.blob_url, "store.json")
    weights = next(key for key in objects.keys(fleet.blob_url) if key.endswith(".safetensors"))
    objects.delete(fleet.blob_url, weights)
    with pytest.raises(StoreUnavailable) as refused:
        fleet.load(b, "law")
    assert (refused.value.code, refused.value.retry_after_s) == ("blobs_unavailable", 2.0)
    with pytest.raises(StoreUnavailable):
        b.sweep_remote(grace_s=0)
    assert b.quarantine.entries() == []
    objects.write(fleet.blob_url, "store.json", mark)
    assert fleet.load(a, "law") == digest  # its cache has it
    b.sweep_remote()
    assert [entry.code for entry in b.quarantine.entries()] == ["blob_missing"]
    fleet.publish(b, "law")
    assert b.quarantine.entries() == []
    assert fleet.load(fleet.replica("c"), "law") == digest


def test_a_damaged_object_is_refused_by_its_digest_and_the_same_upload_heals_it(
    fleet: Fleet, objects: ObjectStore
) -> None:
    a, b = fleet.replica("a"), fleet.replica("b")
    a.tenants.create("acme")
    digest = fleet.publish(a, "law").digest
    weights = next(key for key in objects.keys(fleet.blob_url) if key.endswith(".safetensors"))
    whole = objects.read(fleet.blob_url, weights)
    objects.write(fleet.blob_url, weights, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BlobDamaged) as refused:
        fleet.load(b, "law")
    assert refused.value.code == "blob_damaged"
    assert [entry.code for entry in a.quarantine.entries()] == ["blob_damaged"]
    fleet.publish(b, "law")
    assert a.quarantine.entries() == []
    assert objects.read(fleet.blob_url, weights) == whole
    assert fleet.load(fleet.replica("c"), "law") == digest


def test_a_damaged_local_copy_is_fetched_again_and_blames_nobody(fleet: Fleet) -> None:
    store = fleet.replica("a")
    store.tenants.create("acme")
    digest = fleet.publish(store, "law").digest
    for path in store.weights_of(digest).parent.iterdir():
        if path.suffix in (".bin", ".safetensors"):
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fleet.load(store, "law") == digest
    assert store.quarantine.entries() == []


def test_while_the_bucket_is_away_the_cache_serves_and_the_rest_is_unavailable(fleet: Fleet) -> None:
    a, b = fleet.replica("a"), fleet.replica("b")
    a.tenants.create("acme")
    digest = fleet.publish(a, "law").digest
    fleet.faults.is_away = True
    assert fleet.load(a, "law") == digest
    for _ in range(2):  # the second does not wait for the object store again
        with pytest.raises(StoreUnavailable) as refused:
            fleet.load(b, "law")
        assert (refused.value.code, refused.value.status, refused.value.retry_after_s) == ("blobs_unavailable", 503, 2)
    num_requests = len(fleet.faults.methods)
    with pytest.raises(StoreUnavailable):
        fleet.publish(b, "med", seed=1)
    assert len(fleet.faults.methods) <= num_requests + 3
    with pytest.raises(NotFound):
        b.resolve("acme", "med")  # no row without its bytes
    fleet.faults.is_away = False
    assert b.remote is not None
    b.remote.bucket.forget_absence()
    assert fleet.load(b, "law") == digest
    assert b.quarantine.entries() == []


@pytest.mark.parametrize("where", ["short", "wrong"])
def test_a_transfer_that_is_cut_or_changed_is_never_served(fleet: Fleet, where: str) -> None:
    a, b = fleet.replica("a"), fleet.replica("b")
    a.tenants.create("acme")
    digest = fleet.publish(a, "law").digest
    change = {"short": lambda body: body[: len(body) // 2], "wrong": lambda body: body[:-4] + b"\0\1\2\3"}[where]
    fleet.faults.change = lambda body: change(body) if len(body) > 1000 else body
    with pytest.raises(StoreError):
        fleet.load(b, "law")
    fleet.faults.change = lambda body: body
    a.quarantine.heal(digest)
    assert fleet.load(b, "law") == digest


def test_the_cache_stays_within_its_bytes_and_evicts_what_was_not_used_longest(fleet: Fleet) -> None:
    a = fleet.replica("a")
    a.tenants.create("acme")
    digests = [fleet.publish(a, f"n{i}", seed=i).digest for i in range(6)]
    assert a.remote is not None
    one = a.remote.cache.num_bytes() // 6
    b = fleet.replica("b", cache_mib=one * 3.5 / (1 << 20))
    for i in (0, 1, 2, 0, 3, 4, 5):
        fleet.load(b, f"n{i}")
    assert b.remote is not None
    assert b.remote.cache.num_bytes() <= one * 3.5
    held = {path.name for path in (fleet.root / "b" / "blobs").glob("??/*")}
    assert held <= {digest.removeprefix("sha256:") for digest in digests}
    assert digests[1].removeprefix("sha256:") not in held
    assert digests[5].removeprefix("sha256:") in held
    for i in range(6):  # what was evicted comes back
        assert fleet.load(b, f"n{i}") == digests[i]
    assert b.quarantine.entries() == []


def test_both_kinds_of_blobs_keep_one_protocol(fleet: Fleet, store: AdapterStore) -> None:
    remote: Blobs = fleet.replica("a")._blobs
    local: Blobs = store._blobs
    assert (remote.is_remote, local.is_remote) == (True, False)
