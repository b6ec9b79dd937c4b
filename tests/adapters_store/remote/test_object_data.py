"""Training files of an object store: one fetch each, and none waits for another file's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.filesystem import file_sha256
from adapters_store.remote.object_blobs import ObjectData
from adapters_store.remote.settings import RemoteSettings
from adapters_store.store import AdapterStore

STRIPES = 64  # files were fetched one after the other if their digests were equal modulo this


@pytest.fixture
def data(tmp_path: Path) -> Iterator[ObjectData]:
    store = AdapterStore.open(tmp_path / "data", remote=RemoteSettings(url=f"file://{tmp_path}/bucket"))
    assert store.remote is not None
    root = tmp_path / "data" / "files"
    (root / "staging").mkdir(parents=True)
    yield ObjectData(root, store.remote)
    store.close()


def digest_of(path: Path) -> str:
    return f"sha256:{file_sha256(path)}"


def put(data: ObjectData, folder: Path, number: int) -> str:
    source = folder / f"source-{number}"
    source.write_bytes(str(number).encode())
    digest = digest_of(source)
    data.put_new(source, digest)
    return digest


def test_a_slow_fetch_delays_no_other_file_and_its_own_is_fetched_once(data: ObjectData, tmp_path: Path) -> None:
    slow = put(data, tmp_path, 0)
    other = next(each for n in range(1, 5000) if hash(each := put(data, tmp_path, n)) % STRIPES == hash(slow) % STRIPES)
    begun, allowed, reads = threading.Event(), threading.Event(), []

    def slowly(path: Path) -> str:
        reads.append(path)
        begun.set()
        allowed.wait(60)
        return digest_of(path)

    target = tmp_path / "data" / "files" / "aa" / "slow"
    threads = [threading.Thread(target=data.get, args=(slow, target, slowly)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    beside = threading.Thread(target=data.get, args=(other, tmp_path / "data" / "files" / "bb" / "other", digest_of))
    beside.start()
    beside.join(30)
    was_delayed = beside.is_alive()
    allowed.set()
    for thread in threads:
        thread.join(60)
    assert not was_delayed
    assert target.read_bytes() == b"0"
    assert len(reads) == 1


def test_a_fetch_that_fails_lets_the_next_one_try(data: ObjectData, tmp_path: Path) -> None:
    digest = put(data, tmp_path, 0)
    target = tmp_path / "data" / "files" / "aa" / "law"

    def broken(_: Path) -> str:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        data.get(digest, target, broken)
    data.get(digest, target, digest_of)
    assert target.read_bytes() == b"0"
