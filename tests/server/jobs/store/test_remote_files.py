"""Training files in an object store: uploaded at one server, used at another that has a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.errors import BlobDamaged, StoreError, StoreUnavailable
from adapters_store.remote.settings import RemoteSettings
from adapters_store.store import AdapterStore
from server.jobs.limits import JobLimits
from server.jobs.store.data_files import FileStore
from support.servers import object_store

DATA = b'{"prompt": "a", "completion": "b"}\n' * 50


@pytest.fixture(scope="module")
def objects() -> Iterator[object_store.ObjectStore]:
    with object_store.running() as store:
        yield store


class Pair:
    """Two views of one database and bucket; `a` uploads, `b` has an empty cache."""

    def __init__(self, root: Path, url: str) -> None:
        self.source = root / "upload.jsonl"
        self.source.write_bytes(DATA)
        self.store = AdapterStore.open(root / "a", remote=RemoteSettings(url=url))
        self.store.tenants.create("acme")
        remote = self.store.remote
        self.a = FileStore(self.store.database, root / "a", JobLimits(), remote=remote)
        self.b = FileStore(self.store.database, root / "b", JobLimits(), remote=remote)


@pytest.fixture
def pair(tmp_path: Path, objects: object_store.ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    for name, value in objects.environment.items():
        monkeypatch.setenv(name, value)
    own = Pair(tmp_path, objects.bucket(f"files-{abs(hash(tmp_path))}"))
    yield own
    own.store.close()


def url_of(pair: Pair) -> str:
    assert pair.store.remote is not None
    return pair.store.remote.settings.url


def test_a_file_is_read_and_linked_at_another_server(pair: Pair, tmp_path: Path) -> None:
    file = pair.a.add(tenant="acme", filename="x.jsonl", purpose="fine-tune", source=pair.source)
    assert pair.b.present_path(file).read_bytes() == DATA
    pair.b.path(file).unlink()  # evicted
    pair.b.link(file, tmp_path / "job.jsonl")
    assert (tmp_path / "job.jsonl").read_bytes() == DATA


def test_a_deleted_file_leaves_its_bytes_until_a_sweep(pair: Pair, objects: object_store.ObjectStore) -> None:
    file = pair.a.add(tenant="acme", filename="x.jsonl", purpose="fine-tune", source=pair.source)
    pair.a.delete("acme", file.id)
    assert pair.a.sweep_remote(grace_s=3600) == 0
    again = pair.b.add(tenant="acme", filename="x.jsonl", purpose="fine-tune", source=pair.source)
    assert pair.a.sweep_remote(grace_s=0) == 0
    assert pair.a.present_path(again).read_bytes() == DATA
    pair.b.delete("acme", again.id)
    assert pair.a.sweep_remote(grace_s=0) == 1
    assert not any(key.startswith("files/") for key in objects.keys(url_of(pair)))


def test_wrong_bytes_are_refused_and_missing_ones_named(pair: Pair, objects: object_store.ObjectStore) -> None:
    file = pair.a.add(tenant="acme", filename="x.jsonl", purpose="fine-tune", source=pair.source)
    [key] = [key for key in objects.keys(url_of(pair)) if key.startswith("files/")]
    objects.write(url_of(pair), key, DATA[:-1] + b" ")
    with pytest.raises(StoreError) as refused:
        pair.b.present_path(file)
    assert refused.value.code == "blob_damaged"
    pair.b.add(tenant="acme", filename="x.jsonl", purpose="fine-tune", source=pair.source)
    assert objects.read(url_of(pair), key) == DATA
    objects.delete(url_of(pair), key)
    pair.b.path(file).unlink()
    with pytest.raises(BlobDamaged) as missing:
        pair.b.present_path(file)
    assert missing.value.code == "blob_missing"
    objects.delete(url_of(pair), "store.json")
    with pytest.raises(StoreUnavailable):
        pair.b.present_path(file)


def test_a_damaged_copy_in_the_cache_is_fetched_again(pair: Pair, tmp_path: Path) -> None:
    file = pair.a.add(tenant="acme", filename="x.jsonl", purpose="fine-tune", source=pair.source)
    pair.b.present_path(file)
    pair.b.path(file).write_bytes(DATA[:-1] + b" ")
    assert pair.b.present_path(file).read_bytes() == DATA
    pair.b.path(file).write_bytes(b"")
    pair.b.link(file, tmp_path / "job.jsonl")
    assert (tmp_path / "job.jsonl").read_bytes() == DATA
